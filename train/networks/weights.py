"""ImageNet weights of a torchvision classifier into the backbone of a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cac_fast.train.errors import InputError
from cac_fast.train.networks.segmenter import Segmenter

# With a smaller share of tensors in common the file is another architecture's. A resnet50 and a
# resnet101 have half in common.
_LEAST_COMMON = 0.75
_WRAPPERS = ("state_dict", "model")


@dataclass(frozen=True)
class WeightsReport:
    """Tensors copied, names of the file not used, names of the backbone left as they were."""

    loaded: int
    skipped: list[str]
    missing: list[str]

    def __str__(self) -> str:
        parts = [f"loaded {self.loaded} tensors"]
        parts += [
            f"{what} {len(names)} ({_shorten(names)})" if names else f"{what} none"
            for what, names in (("skipped", self.skipped), ("missing", self.missing))
        ]
        return ", ".join(parts)


def load_backbone_weights(network: Segmenter, path: str | Path) -> WeightsReport:
    """Copy the tensors of a torchvision checkpoint into `network.backbone`, in place.

    The file holds a state_dict, bare or under "state_dict" or "model", its names with or without
    "module." in front, its floats in any precision. BatchNorm's `num_batches_tracked`, absent from
    old files, is neither loaded nor counted. A tensor of another shape is skipped and missing.

    Raises InputError if the file cannot be read (not there, truncated, not only tensors) or holds
    another architecture.
    """
    given = {
        name.removeprefix("module."): tensor
        for name, tensor in _read_state_dict(Path(path)).items()
        if isinstance(tensor, Tensor) and not name.endswith("num_batches_tracked")
    }
    expected = {
        name: tensor
        for name, tensor in network.backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    common = {
        name: given[name]
        for name, tensor in expected.items()
        if name in given and given[name].shape == tensor.shape
    }
    skipped = [name for name in given if name not in common]

    # A resnet101 file fills a resnet50 completely: its layers without a place count as well.
    stages = {name.split(".")[0] for name in expected}
    unplaced = [name for name in skipped if name.split(".")[0] in stages]
    if len(common) < _LEAST_COMMON * len(set(expected).union(unplaced)):
        raise InputError(
            f"weights file '{path}' is of another architecture: {len(common)} of its {len(given)} "
            f"tensors fit the {len(expected)} of the backbone; give a file for this backbone"
        )
    network.backbone.load_state_dict(common, strict=False)
    return WeightsReport(len(common), skipped, [name for name in expected if name not in common])


def _read_state_dict(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise InputError(f"weights file '{path}' not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types, by where the file is broken
        raise InputError(
            f"weights file '{path}' cannot be read ({type(error).__name__}): it is truncated or "
            "holds more than tensors; download it again or save its state_dict alone"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise InputError(
            f"weights file '{path}' holds a {type(content).__name__}: a state_dict is expected"
        )
    return {str(name): value for name, value in content.items()}


def _shorten(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
