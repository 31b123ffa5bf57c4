"""Where the time of a step goes: a Chrome trace of a few steps, and the share of each phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cac_fast.train.batch import Step

WARM_UP_STEPS = 5  # steps; the first ones choose algorithms, compile and allocate

_clock: Clock | None = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name a part of the step; phases do not nest. Nothing is timed unless a profile is running."""
    clock = _clock
    with record_function(name):
        if clock is None:
            yield
            return
        start = clock.now()
        yield
        clock.spans.append((name, start, clock.now()))


@contextmanager
def clocked(device: torch.device) -> Iterator[Clock]:
    """Time the phases of what runs inside."""
    global _clock
    _clock = Clock(device)
    try:
        yield _clock
    finally:
        _clock = None


class StepProfile:
    """Profiles `count` steps of a run, which goes on unchanged (but slower) meanwhile.

    It begins `WARM_UP_STEPS` steps after the unlabeled images, or for a method without them after
    the first step. `path` gets the Chrome trace. `say` gets one line: milliseconds a step, and each
    phase's share of them, in time of the device. "data wait" is what the loaders kept the step
    waiting; "to device" the copies there, color changes and normalization. The rest is what has
    no name: logging, and evaluations that fell due.
    """

    def __init__(
        self, count: int, device: torch.device, path: Path, say: Callable[[str], None]
    ) -> None:
        self.count, self.device, self.path, self.say = count, device, path, say

    def watch(self, steps: Iterator[Step], with_unlabeled: bool) -> Iterator[Step]:
        """Hand on `steps`. `with_unlabeled`: wait for those that have unlabeled images."""
        missing = yield from _some(steps, WARM_UP_STEPS, with_unlabeled)
        if not missing:
            parts = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            parts = parts if self.device.type == "cuda" else parts[:1]
            with profile(activities=parts) as profiler, clocked(self.device) as clock:
                began = _settled(self.device)
                missing = yield from _some(steps, self.count, with_unlabeled)
                seconds = _settled(self.device) - began
        if missing:
            self.say(f"the run was too short to profile {self.count} steps: no trace")
            return
        profiler.export_chrome_trace(str(self.path))
        totals = clock.totals()
        totals["rest"] = seconds - sum(totals.values())
        shares = ", ".join(f"{name} {value / seconds:.1%}" for name, value in totals.items())
        self.say(
            f"profile of {self.count} steps, {1000 * seconds / self.count:.1f} ms each: {shares}; "
            f"trace in {self.path}"
        )
        yield from steps


def _some(steps: Iterator[Step], count: int, with_unlabeled: bool) -> Generator[Step, None, int]:
    """Hand on steps until `count` of them have counted; return how many are missing."""
    for step in steps:
        yield step
        count -= step.unlabeled is not None or not with_unlabeled
        if not count:
            break
    return count


class Clock:
    """Times on the device, read at the end: taking one never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = []

    def now(self) -> torch.cuda.Event | float:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def totals(self) -> dict[str, float]:
        """Seconds by phase, in the order in which they first came."""
        sums: dict[str, float] = {}
        for name, start, end in self.spans:
            seconds = start.elapsed_time(end) / 1000 if self.cuda else end - start
            sums[name] = sums.get(name, 0.0) + seconds
        return sums


def _settled(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
