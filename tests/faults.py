"""Trainings to stop at a drawn moment: started fast, watched and hit from outside.

As a program: a server that has imported the trainer and forks a process for every training, since
the import takes longer than the training. A line of stdin is one request.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PHASES = ("start", "step", "evaluation", "save", "cache")
LIMIT = 300  # seconds, of every wait
ITERATIONS, EVAL_EVERY, ENTRIES = 8, 4, 28
OPTIONS = (
    f"--deterministic --network lraspp --iterations {ITERATIONS} --save-every 3 "
    f"--eval-every {EVAL_EVERY} --bank-past-steps 1"
).split()


class HangError(Exception):
    """A process did not end or answer within LIMIT."""


@dataclass(frozen=True)
class Place:
    """The folders of one training: by the names it is given, and by those we see them under."""

    given: Path
    seen: Path

    def phase(self) -> str:
        """What the training, the first one in this place, is doing, as its files tell."""
        run = self.seen / "run"
        try:
            noted = (run / "metrics.jsonl").stat().st_mtime_ns
        except FileNotFoundError:
            return "cache" if 0 <= self._cached() < ENTRIES else "start"
        if any((run / f"{name}.pt.tmp").exists() for name in ("last", "best")):
            return "save"
        try:
            line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            saved = (run / "last.pt").stat().st_mtime_ns
        except (OSError, ValueError, IndexError):
            return "step"
        due = line["kind"] == "train" and line["iteration"] % EVAL_EVERY == 0
        return "evaluation" if due and saved >= noted else "step"

    def _cached(self) -> int:
        try:
            return sum(name.endswith(".raw") for name in os.listdir(self.seen / "cache"))
        except FileNotFoundError:
            return -1


@dataclass
class Training:
    """A running training: its first process, and how to ask for its exit code."""

    pid: int
    log: Path
    code: Callable[[], int | None]
    size: int = 1
    found: dict[int, int] = field(default_factory=dict)

    def said(self, stream: str) -> str:
        """What it wrote to "out" or "err"."""
        return self.log.with_suffix(f".{stream}").read_text()

    def wait(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + LIMIT
        while (code := self.code()) is None:
            if time.monotonic() > deadline:
                raise HangError(f"no end after {LIMIT} s: {self.said('out')}{self.said('err')}")
            time.sleep(0.01)
        return code

    def ranks(self) -> dict[int, int]:
        """Process ids by rank; empty while torchrun has not started all of them."""
        if self.size == 1:
            return {0: self.pid}
        if len(self.found) < self.size:
            self.found = {}
            for pid in _descendants(self.pid):
                with suppress(OSError):
                    settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    ranks = [int(x[5:]) for x in settings if x.startswith(b"RANK=")]
                    self.found |= {rank: pid for rank in ranks}
        return self.found if len(self.found) == self.size else {}

    def freeze(self) -> None:
        """Stop all its processes, and return when they stand."""
        pids = [self.pid, *_descendants(self.pid)]
        self.send(signal.SIGSTOP, pids)
        deadline = time.monotonic() + LIMIT
        while not all(_state(pid) in "TZX" for pid in pids):
            if time.monotonic() > deadline:
                raise HangError("a process does not stop")
            time.sleep(0.0005)

    def send(self, number: int, pids: Sequence[int] = ()) -> None:
        """Send a signal to its processes, all unless told otherwise."""
        for pid in pids or [self.pid, *_descendants(self.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End all its processes and wait for it."""
        if self.code() is None:
            self.send(signal.SIGKILL)
            self.wait()


def _descendants(pid: int) -> list[int]:
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def looks(training: Training, place: Place) -> Iterator[tuple[str, float]]:
    """The phase and the seconds since the last look, until the training ends."""
    began = last = time.monotonic()
    while training.code() is None:
        now = time.monotonic()
        if now - began > LIMIT:
            raise HangError(f"still {place.phase()} after {LIMIT} s: {training.said('err')}")
        yield (place.phase() if training.ranks() else "launch"), now - last
        last = now
        time.sleep(0.0005)


def meet(training: Training, place: Place, wanted: str, seconds: float) -> Iterator[None]:
    """Every look at the wanted phase after that many seconds of it."""
    for phase, passed in looks(training, place):
        seconds -= passed * (phase == wanted)
        if phase == wanted and seconds <= 0:
            yield


def kill_in(training: Training, place: Place, wanted: str, seconds: float) -> bool:
    """Kill a training after so many seconds of a phase, but in it; False if it has passed by."""
    for _ in meet(training, place, wanted, seconds):
        training.freeze()
        if training.code() is None and place.phase() == wanted:
            training.kill()
            return True
        training.send(signal.SIGCONT)
    return False


class Server:
    """Starts trainings of one process.

    command: what the server is started by; words that come before those of Python.
    """

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [*command, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, arguments: list[str], log: Path) -> Training:
        """Start a training of one process."""
        ended = log.with_suffix(".code")
        ended.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps([arguments, str(log)]) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        return Training(pid, log, lambda: int(ended.read_text()) if ended.exists() else None)

    def close(self) -> None:
        """End the server."""
        self.process.stdin.close()
        self.process.wait(LIMIT)


def torchrun(script: Path, arguments: list[str], log: Path, restarts: int) -> Training:
    """Start a training of two processes."""
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts {restarts}"
    with open(log.with_suffix(".out"), "w") as out, open(log.with_suffix(".err"), "w") as err:
        process = subprocess.Popen(
            [sys.executable, *command.split(), str(script), *arguments],
            stdout=out,
            stderr=err,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return Training(process.pid, log, process.poll, size=2)


def serve() -> None:
    """Fork a training for every line of stdin: its arguments, and where it writes."""
    import torch

    from cac_fast.train import engine, main  # noqa: F401 (the engine is what takes long)

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        arguments, log = json.loads(line)
        if (child := os.fork()) == 0:
            for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
                with open(log + suffix, "w") as file:
                    os.dup2(file.fileno(), stream.fileno())
            sys.exit(main.main(arguments))
        print(child, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        Path(log + ".new").write_text(str(code))
        os.replace(log + ".new", log + ".code")


if __name__ == "__main__":
    serve()
