"""The one exception that bad input and full memory raise in the trainer, and its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_MEMORY_IS_FULL = (
    "DefaultCPUAllocator",
    "CUDA out of memory",  # as torch.compile quotes it
    "CUDA error: out of memory",
    "'out of memory'",  # NCCL's
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class InputError(Exception):
    """Input that cannot be used: its message is one sentence that names the thing and the remedy.

    The commands print it as a single line and exit with code 2. Under torchrun each
    machine's first rank prints it.
    """


class RankInputError(InputError):
    """Bad input that one rank met alone, in its part of the data: that rank prints it."""


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn what the system says against writing `path` (a full disk, as a rule) into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): mend that, then give the same "
            "command again"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether an exception says that something did not fit in memory, a GPU's or the machine's."""
    # For PyTorch's own allocator on a GPU there is an exception type, else only the message.
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return full or any(words in str(error) for words in _MEMORY_IS_FULL)


@contextmanager
def fitting(message: str) -> Iterator[None]:
    """Turn what is raised where memory is full into `message`.

    Raises:
        RankInputError: memory is full, on this rank perhaps alone.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        raise RankInputError(message) from error


def check_crop(side: int, multiple: int, wanted_by: str = "") -> None:
    """Raise InputError if `side`, in pixels, is not a multiple."""
    if side < multiple or side % multiple:
        lower = max(multiple, side // multiple * multiple)
        raise InputError(
            f"--crop-size {side} is not a multiple of {multiple}{wanted_by}: use {lower} or "
            f"{lower + multiple}"
        )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """As `, did you mean voc?`; empty where no name is similar."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {nearest[0]}?" if nearest else ""
