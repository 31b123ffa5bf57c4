"""Every setting of the method reaches the part that it governs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_step import method
from tiny_scenes import write_scenes
from torch import nn

from cac_fast.train import config
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.stream import Stream
from cac_fast.train.distributed import World


@pytest.mark.parametrize(
    ("options", "part", "value"),
    [
        ("--dc-weight 0.7", "weight", 0.7),
        ("--temperature 0.7", "dc_loss.temperature", 0.7),
        ("--threshold 0.7", "dc_loss.threshold", 0.7),
        ("--normalization active", "dc_loss.normalization", "active"),
        ("--no-directional", "dc_loss.directional", False),
        ("--no-contrastive", "dc_loss.contrastive", False),
        ("--no-negative-sampling", "dc_loss.negative_sampling", False),
        ("--negatives-per-view 7", "dc_loss.negatives_per_view", 7),
        ("--max-negatives 7", "dc_loss.max_negatives", 7),
        ("--seed 7", "dc_loss.seed", 7),
        ("--dc-backend eager", "dc_loss.backend", "eager"),
        ("--bank-past-steps 2", "bank.steps", 3),
        ("--forward joint", "joint", True),
    ],
)
def test_loss(options: str, part: str, value: Any) -> None:
    def setting(*options: str) -> Any:
        found = method(*options)
        for name in part.split("."):
            found = getattr(found, name)
        return found

    assert setting(*options.split()) == value != setting()


def test_positive_filtering() -> None:
    assert method("--threshold", "0.7", "--no-positive-filtering").dc_loss.threshold == 0


def test_projector() -> None:
    assert isinstance(method("--no-projector").projector, nn.Identity)
    assert method("--no-projector").bank.dim == 8 != method().bank.dim


@pytest.mark.parametrize(
    ("options", "view", "part", "value"),
    [
        ("--crop-size 48", "both", "crop", 48),
        ("--base-size 50", "both", "base_size", 50),
        ("--labeled-scale 0.6,0.7", "labeled", "scale", (0.6, 0.7)),
        ("--unlabeled-scale 0.6,0.7", "unlabeled", "scale", (0.6, 0.7)),
        ("--jitter-labeled", "labeled", "jitter", True),
        ("--iou-range 0.6,0.7", "unlabeled", "iou_range", (0.6, 0.7)),
        ("--no-context", "unlabeled", "iou_range", (1.0, 1.0)),
    ],
)
def test_crops(tmp_path, options: str, view: str, part: str, value: Any) -> None:
    data = open_data("folder", write_scenes(tmp_path / "data", {"train": (4, 0)}))
    samples = list(data.splits["train"])

    def setting(name: str, *options: str) -> Any:
        settings = config.parse(["--dataset", "folder", "--data-dir", "x", *options])
        stream = Stream(settings, World(0, 1, torch.device("cpu")), data, samples, samples)
        return getattr(stream._loader(0, unlabeled=name == "unlabeled").dataset.transform, part)

    for name in ("labeled", "unlabeled") if view == "both" else (view,):
        assert setting(name, *options.split()) == value != setting(name)
