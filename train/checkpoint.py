"""Checkpoint files: written whole or not at all, read without running code from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from cac_fast.train.data.workers import is_lost_worker
from cac_fast.train.errors import InputError, is_full

FORMAT = 1


def write(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`; a crash at any moment leaves the old file or the new one.

    Raises:
        InputError: it cannot be written (a full disk, as a rule); a former file is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is what PyTorch makes of the former
        temporary.unlink(missing_ok=True)
        if is_lost_worker(error) or is_full(error):
            raise
        raise InputError(
            f"{path} cannot be written ({error}): make room, then give the same command again"
        ) from error
    # The rename itself is only durable once the folder is synced.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def find(path: Path) -> Path:
    """The file that a path means: of a run folder `best.pt`, or `last.pt` where that is not."""
    if not path.is_dir():
        return path
    files = [path / name for name in ("best.pt", "last.pt")]
    return next((file for file in files if file.is_file()), files[0])


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `write` made, onto the CPU, with `weights_only=True`.

    Raises:
        InputError: the file is missing, truncated, or no checkpoint of this program.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if is_full(error):
            raise
        # PyTorch's own message runs over many lines and speaks of its internals.
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): "
            "it is truncated or no checkpoint"
        ) from error
    version = state.get("format") if isinstance(state, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise InputError(
            f"checkpoint {path} is of a newer version of this program (format {version}, here "
            f"{FORMAT}): update the program"
        )
    if version != FORMAT:
        raise InputError(
            f"{path} is not a checkpoint of this program (use --weights for ImageNet weights)"
        )
    return state


def load_model(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load `weights` strictly into `module`.

    Raises:
        InputError: names or shapes differ: the checkpoint is of another architecture.
    """
    expected = module.state_dict()
    shapes, given = ({name: x.shape for name, x in each.items()} for each in (expected, weights))
    differing = sorted({name for name, _ in shapes.items() ^ given.items()})
    if differing:
        raise InputError(
            f"checkpoint {path} is of another architecture: {len(differing)} tensors differ, "
            f"first {differing[0]}; use the --network, --backbone and classes it was made with"
        )
    module.load_state_dict(weights)


def is_finite(module: torch.nn.Module) -> bool:
    """Whether all numbers that `module` would put into a checkpoint are finite."""
    tensors = [value for value in module.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in tensors]).all())


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """This process's random state, on the CPU and on its GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Take back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
