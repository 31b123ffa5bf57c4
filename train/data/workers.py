"""A loader's processes, and the signals that end a run.

`timeout`, torchrun, schedulers and Ctrl-C send theirs to the trainer's whole process group; without
its loaders it could not go on to the end of the step, where it saves.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

_STOP = {signal.SIGINT, signal.SIGTERM}


def start(loader: DataLoader) -> Iterator[Any]:
    """``iter(loader)``, its processes safe from those signals from their first moment on.

    loader: has `leave_signals_to_trainer` as its ``worker_init_fn``.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)  # which processes inherit
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_trainer(worker: int) -> None:
    """Put a loader's process in a group of its own; signals that came before do not count."""
    os.setpgid(0, 0)
    while _STOP & signal.sigpending():
        signal.sigwait(_STOP)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)  # PyTorch ends slow workers by SIGTERM
