"""Shared fixtures: a data set small enough to train on in a test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny_scenes import write_scenes

from accuracy.arms import ARMS

pytest_plugins = ["rows_contract", "stand_ins"]

# The same cases in every run, so that a failure is a change's doing;
# `pytest --hypothesis-profile new` draws others, and `long` 72 times as many: 10,080 of the loss on
# the CPU (docs/trust.md). No deadline: runners are busy.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("new", deadline=None)
settings.register_profile("long", derandomize=True, deadline=None, max_examples=7200)
settings.load_profile("same")

# Sums over threads differ with their number: tests that compare bits need it fixed.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `folder` data set: 4 labeled, 3 unlabeled, 3 validation and 2 test images."""
    return write_scenes(
        tmp_path_factory.mktemp("folder"), {"train": (4, 3), "val": (3, 0), "test": (2, 0)}
    )


@pytest.fixture(scope="session")
def reported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the supervised method to report, trained once; its data lies beside it."""
    from reported import train, write_data

    root = tmp_path_factory.mktemp("reported")
    train(write_data(root / "data"), root / "supervised", "--method", "supervised")
    return root / "supervised"


@pytest.fixture(autouse=True)
def own_arms() -> Iterator[None]:
    """Arms that a call of bench/accuracy/compare.py adds are gone after a test."""
    before = dict(ARMS)
    yield
    ARMS.clear()
    ARMS.update(before)


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where commands are started; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
