"""A loader's processes: the signals that end a run, and faults of the machine that they meet.

`timeout`, torchrun, schedulers and Ctrl-C send their signal to the trainer's whole process group;
without its loaders it could not go on to the end of the step, where it saves.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, get_worker_info

from cac_fast.train.errors import InputError, RankInputError
from cac_fast.train.progress import warn

_STOP = {signal.SIGINT, signal.SIGTERM}


def start(loader: DataLoader) -> Iterator[Any]:
    """The loader's items, its processes safe from those signals from their first moment on.

    loader: has `leave_signals_to_trainer` as its `worker_init_fn`, and hands its items over with
    `share`.

    Raises:
        InputError: the machine lacks what processes need.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)  # which processes inherit
    try:
        items = iter(loader)
    except OSError as error:
        raise InputError(
            f"loader processes cannot be started ({error.strerror or error}): use --workers 0"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _received(items)


def leave_signals_to_trainer(worker: int) -> None:
    """Put a loader's process in a group of its own; signals that came before do not count."""
    os.setpgid(0, 0)
    while _STOP & signal.sigpending():
        signal.sigwait(_STOP)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)  # PyTorch ends slow workers by SIGTERM


def share(item: Any) -> Any:
    """In a loader's process: `item` with its tensors in shared memory, as they would be anyway.

    PyTorch does this in a thread of the queue, and where the memory is full the item is lost there
    and waited for for ever. Here such an item goes through a pipe.
    """
    if get_worker_info() is None:
        return item
    try:
        for value in tree_leaves(item):
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    except (RuntimeError, OSError) as error:
        return _Piped(pickle.dumps(item), f"{error}".partition("\n")[0])
    return item


def is_lost_worker(error: BaseException) -> bool:
    """Whether an exception is PyTorch's word about a loader's process that has ended."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


@contextmanager
def lost_workers() -> Iterator[None]:
    """Turn PyTorch's word about a loader's process that was killed into one line.

    It may be raised anywhere, since it comes with a signal.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_worker(error):
            raise
        # Each process that ends from here on would raise the same once more.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise RankInputError(
            f"a loader's process has ended ({str(error).partition('. ')[0]}), as a rule for want "
            "of memory: use fewer --workers, or 0"
        ) from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put off PyTorch's word about a lost process to the end of what must be done as a whole."""
    former = signal.getsignal(signal.SIGCHLD)
    if not callable(former):  # no loader has processes
        yield
        return
    noted: list[int] = []
    signal.signal(signal.SIGCHLD, lambda number, _: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, former)
    if noted:
        former(signal.SIGCHLD, None)


@dataclass(frozen=True)
class _Piped:
    """An item as bytes, and why."""

    content: bytes
    reason: str


def _received(items: Iterator[Any]) -> Iterator[Any]:
    warned = False
    try:
        for item in items:
            if isinstance(item, _Piped):
                if not warned:
                    warn(
                        f"shared memory (/dev/shm) is full ({item.reason}): loading goes on more "
                        "slowly; give a container more (docker run --shm-size=2g), or use "
                        "--workers 0"
                    )
                warned, item = True, pickle.loads(item.content)
            yield item
    except (ConnectionError, EOFError) as error:
        raise RuntimeError("DataLoader worker lost while it handed a batch over") from error
