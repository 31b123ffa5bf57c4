"""Weights to begin from: of a backbone, as others publish them, or of a run of this program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cac_fast.train.checkpoint import find
from cac_fast.train.errors import InputError
from cac_fast.train.networks.segmenter import Segmenter

# With a smaller share of tensors in common the file is another architecture's. A resnet50 and a
# resnet101 have half in common.
_LEAST_COMMON = 0.75
# What programs keep a state_dict under; an averaged network before the one it is averaged from.
_WRAPPERS = ("ema", "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# What they put in front of a backbone's names.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")


@dataclass(frozen=True)
class WeightsReport:
    """What was copied into what: tensors copied, names of the file not used, names of the target
    left as they were. target: "backbone", or "network" from a run of this program."""

    target: str
    loaded: int
    skipped: list[str]
    missing: list[str]

    def __str__(self) -> str:
        skipped, missing = (
            f"{len(names)} ({_shorten(names)})" if names else "none"
            for names in (self.skipped, self.missing)
        )
        loaded = f"loaded {self.loaded} tensors into the {self.target}"
        return f"{loaded}, skipped {skipped}, missing {missing}"


def load_backbone_weights(network: Segmenter, path: str | Path) -> WeightsReport:
    """Copy the tensors of a file into `network`, in place.

    The file holds a backbone's state_dict in its library's names, bare or wrapped as other programs
    do ("state_dict", "model", "ema", ...; "module.", "backbone.", ... before each name), its floats
    in any precision; or it is a checkpoint of this program, or the folder of a run: then all of the
    network is loaded, but for what other classes or another head do not fit.
    BatchNorm's `num_batches_tracked`, absent from old files, is neither loaded nor counted. A
    tensor of another shape is skipped and missing.

    Raises:
        InputError: the file cannot be read (not there, truncated, not only tensors) or holds
            another architecture.
    """
    content = network.backbone.read_weights(Path(path))
    path, of_run = find(Path(path)), is_run(content)
    target = network if of_run else network.backbone
    expected = floats(target.state_dict())
    given = floats(content["network"]) if of_run else bare(content, expected)
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    common = {name: tensor for name, tensor in given.items() if shapes.get(name) == tensor.shape}
    skipped = [name for name in given if name not in common]

    # A resnet101 file fills a resnet50 completely: its layers without a place count as well.
    backbone = {name for name in expected if not of_run or name.startswith("backbone.")}
    stages = {_stage(name) for name in backbone}
    unplaced = {name for name in skipped if _stage(name) in stages}
    fitting = backbone & common.keys()
    if len(fitting) < _LEAST_COMMON * len(backbone | unplaced):
        raise InputError(
            f"weights file '{path}' is of another architecture: {len(fitting)} of its {len(given)} "
            f"tensors fit the {len(backbone)} of the backbone; give a file for this backbone"
        )
    target.load_state_dict(common, strict=False)
    missing = [name for name in expected if name not in common]
    return WeightsReport("network" if of_run else "backbone", len(common), skipped, missing)


def is_run(content: dict[str, Any]) -> bool:
    """Whether the content of a file is a checkpoint of this program."""
    return "format" in content and isinstance(content.get("network"), dict)


def bare(content: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file's content under the names that are expected, as far as prefixes and
    dicts around them hide these."""
    found: dict[str, Tensor] = {}
    for given, tensor in floats(_unwrapped(content)).items():
        name, former = given, None
        while name not in expected and name != former:
            former = name
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
        found.setdefault(name, tensor)
    return found


def floats(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state_dict but for BatchNorm's counters."""
    return {
        str(name): value
        for name, value in state.items()
        if isinstance(value, Tensor) and not str(name).endswith("num_batches_tracked")
    }


def _stage(name: str) -> str:
    """The part of the backbone that a name belongs to."""
    return name.removeprefix("backbone.").split(".")[0]


def _unwrapped(content: dict[str, Any]) -> dict[str, Any]:
    """The state_dict in a file's content: the innermost under one of the usual names."""
    for _ in range(3):
        inner = next((content[key] for key in _WRAPPERS if _has_tensors(content.get(key))), None)
        if inner is None:
            break
        content = inner
    return content


def _has_tensors(content: object, depth: int = 2) -> bool:
    """Whether there are tensors in a dict, or in those that it holds."""
    return isinstance(content, dict) and any(
        isinstance(value, Tensor) or (depth > 0 and _has_tensors(value, depth - 1))
        for value in content.values()
    )


def read_file(path: Path) -> dict[str, Any]:
    """The content of a weights file, .safetensors or PyTorch's, without running code from it.

    path: a file, or the folder of a run.

    Raises:
        InputError: it is not there, truncated, or holds more than tensors.
    """
    path = find(path)
    if not path.is_file():
        raise InputError(f"weights file '{path}' not found")
    try:
        content = _load(path)
    except ImportError as error:
        raise InputError(
            f"weights file '{path}' needs safetensors ({error}): pip install safetensors"
        ) from error
    except Exception as error:  # torch.load raises many types, by where the file is broken
        raise InputError(
            f"weights file '{path}' cannot be read ({type(error).__name__}): it is truncated or "
            "holds more than tensors; download it again or save its state_dict alone"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"weights file '{path}' holds a {type(content).__name__}: a state_dict is expected"
        )
    return content


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _shorten(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
