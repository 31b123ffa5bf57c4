"""TensorBoard's events, for as long as they can be written: no run ends for want of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Board:
    """A `SummaryWriter` that gives up, with one line, where the disk does not take its events.

    Args:
        folder: where they go.
        purge_step: drop what an earlier try wrote from there on.
        say: prints that line.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.failed = False
        self.excepthook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._try(self._open, purge_step)

    def add_scalar(self, *arguments: Any) -> None:
        """As `SummaryWriter.add_scalar`."""
        self._try(lambda: self.writer.add_scalar(*arguments))

    def add_image(self, *arguments: Any, **more: Any) -> None:
        """As `SummaryWriter.add_image`."""
        self._try(lambda: self.writer.add_image(*arguments, **more))

    def close(self) -> None:
        """Write what is pending."""
        self._try(lambda: self.writer.close())
        threading.excepthook = self.excepthook

    def _open(self, purge_step: int) -> None:
        self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            call(*arguments)
        except OSError as error:
            self.failed = True
            self.say(f"no more TensorBoard events in {self.folder}: {error.strerror or error}")

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """The writer's thread keeps its error for the next call too, which tells of it."""
        if not isinstance(failure.exc_value, OSError):
            self.excepthook(failure)
