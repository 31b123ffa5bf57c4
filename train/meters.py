"""What is measured between two lines of metrics.jsonl, on one rank."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter, defaultdict
from typing import Any

import torch

from cac_fast.train.batch import Step


class Meters:
    """Means of named scalars over the steps since the last reading, kept on the device.

    Adding never waits for the device; only `read` does. The first iteration whose loss was
    not finite is kept too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.sums: dict[str, torch.Tensor] = defaultdict(int)
        self.counts: Counter[str] = Counter()
        self.steps, self.images = 0, 0
        self.waited, self.since = 0.0, time.perf_counter()

    def add(self, iteration: int, values: dict[str, torch.Tensor], step: Step) -> None:
        """Take in one step and its named scalars."""
        bad = (self.first_bad < 0) & ~torch.isfinite(values["loss"].detach())
        self.first_bad = torch.where(bad, iteration, self.first_bad)
        for name, value in values.items():
            self.sums[name] += value.detach().double()
            self.counts[name] += 1
        self.steps += 1
        self.images += step.images
        self.waited += step.waited

    def read(self) -> dict[str, Any]:
        """Take the reading of this rank and start anew.

        Returns `means` by name, `images` of a step, seconds a step waited for data `data_s`,
        `steps_per_s`, `peak_memory_mb` and `first_bad`, the first iteration whose loss was
        not finite or -1.
        """
        means = {name: (total / self.counts[name]).item() for name, total in self.sums.items()}
        elapsed, steps = time.perf_counter() - self.since, max(1, self.steps)
        reading = {
            "means": means,
            "images": self.images / steps,
            "data_s": self.waited / steps,
            "steps_per_s": self.steps / elapsed,
            "peak_memory_mb": peak_memory_mb(self.device),
            "first_bad": int(self.first_bad.item()),
        }
        self.sums.clear()
        self.counts.clear()
        self.steps, self.images = 0, 0
        self.waited, self.since = 0.0, time.perf_counter()
        return reading

    def restart_clock(self) -> None:
        """Leave an evaluation's time and memory out of the next reading."""
        self.since = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
