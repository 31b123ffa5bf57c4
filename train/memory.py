"""Memory that is full, on a GPU or the machine: one line in place of PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cac_fast.train.errors import RankInputError

_WORDS = (
    "DefaultCPUAllocator",
    "CUDA out of memory",  # as torch.compile quotes it
    "CUDA error: out of memory",
    "'out of memory'",  # NCCL's
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_full(error: BaseException) -> bool:
    """Whether an exception says that something did not fit in memory."""
    # For PyTorch's own allocator on a GPU there is an exception type, else only the message.
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return full or any(words in str(error) for words in _WORDS)


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
