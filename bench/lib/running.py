"""The project's programs, run one after another or side by side, and stopped by signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from lib.measure import ROOT


class RunError(Exception):
    """A command of a run failed; what it said last is in the message."""


class Programs:
    """The programs that run, and the signal that stops them.

    They have sessions of their own, so that a signal comes to them from here alone, and once:
    trainings save at the first one and end at once at a second.
    """

    def __init__(self) -> None:
        # A signal's handler may interrupt the thread that holds it.
        self._lock = threading.RLock()
        self._running: set[subprocess.Popen] = set()
        self._stopped: float | None = None

    @contextlib.contextmanager
    def start(self, command: list[str], threads: int) -> Iterator[subprocess.Popen]:
        """One that says its lines to `stdout`, until it ends.

        Raises:
            RunError: no more programs are to start.
        """
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with self._lock:
            if self._stopped is not None:
                raise RunError("not begun")
            process = subprocess.Popen(
                [sys.executable, str(ROOT / command[0]), *command[1:]],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            with process:
                yield process
        finally:
            with self._lock:
                self._running.discard(process)

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Pass Ctrl-C, SIGTERM and the terminal's end on to what runs; start nothing more."""

        def stop(number: int, _: Any) -> None:
            now = time.monotonic()
            if self._stopped is not None and now - self._stopped < 1:
                return  # the same one, sent to the process and to its group
            self._stopped = now
            with self._lock:
                for process in self._running:
                    # Trainings save at these two.
                    process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)
            with contextlib.suppress(OSError):
                os.write(2, b"stopping: waiting until what runs has saved\n")
            sys.exit(128 + number)

        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        former = {number: signal.getsignal(number) for number in numbers}
        for number, handler in former.items():
            if handler != signal.SIG_IGN:  # as `nohup` asks
                signal.signal(number, stop)
        try:
            yield
        finally:
            self._stopped = None
            for number, handler in former.items():
                signal.signal(number, handler)


programs = Programs()


def run(command: list[str], threads: int, label: str) -> None:
    """Run one program of the project to its end; pass its lines on, each behind `label`.

    Raises:
        RunError: it ended with another code than 0.
    """
    line = ""
    with programs.start(command, threads) as process:
        for line in process.stdout:
            with contextlib.suppress(OSError):  # the terminal may be gone, and the run must save
                print(f"{label} | {line}", end="", flush=True)
    if process.returncode:
        raise RunError(f"{label} ended with code {process.returncode}: {line.strip()}")
