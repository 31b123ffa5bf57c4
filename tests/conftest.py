"""Shared fixtures: a data set small enough to train on in a test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_scenes import write_scenes

pytest_plugins = ["rows_contract"]

# Sums over threads differ with their number: tests that compare bits need it fixed.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``folder`` data set: 4 labeled, 3 unlabeled, 3 validation and 2 test images."""
    return write_scenes(
        tmp_path_factory.mktemp("folder"), {"train": (4, 3), "val": (3, 0), "test": (2, 0)}
    )
