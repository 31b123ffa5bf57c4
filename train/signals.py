"""Ctrl-C and SIGTERM, which end a run after its current step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

_STOP = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered: notes a signal to stop in place of its handler.

    A second one ends the process at once.

    received: the signal's number, or None. at: when it came, by time.monotonic().
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.at = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._former = {number: signal.signal(number, self._note) for number in _STOP}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self.at = number, time.monotonic()
        # Not the first one's double, sent to the group.
        elif time.monotonic() - self.at > 1:
            signal.signal(number, self._former[number])
            signal.raise_signal(number)
