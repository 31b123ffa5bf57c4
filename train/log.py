"""What a run measures and leaves to look at: metrics.jsonl, TensorBoard, a bar or plain lines."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cac_fast.train.batch import Step
from cac_fast.train.errors import writing


class RunLog:
    """Metrics and messages of one run, on rank 0.

    Args:
        folder: the run folder.
        total: iterations of the run.
        start, evaluated: iteration that the run goes on from, and of its last finished evaluation;
            later lines of an earlier try are dropped.
    """

    def __init__(self, folder: Path, total: int, start: int, evaluated: int) -> None:
        self.path = folder / "metrics.jsonl"
        last = {"train": start, "val": evaluated}
        kept = [x for x in read_metrics(self.path) if x["iteration"] <= last[x["kind"]]]
        temporary = self.path.with_suffix(".tmp")
        with writing(self.path):
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.path)
        self.total = total
        # A bar only where somebody can watch it; in a file its carriage returns would be noise.
        self.bar = tqdm(total=total, initial=start, unit="it", dynamic_ncols=True, disable=None)
        self.board = Board(folder / "tensorboard", start + 1, self.say)

    def say(self, line: str) -> None:
        """Print one line (above the bar where there is one)."""
        self.bar.write(line)
        sys.stdout.flush()

    def step(self) -> None:
        """One iteration is done."""
        self.bar.update()

    def train(self, iteration: int, values: dict[str, float | None]) -> None:
        """Write one `"kind": "train"` line."""
        self._write("train", iteration, values)
        losses = (name for name in values if name.startswith("loss"))
        text = "  ".join(f"{name.removeprefix('loss_')} {values[name]:.4f}" for name in losses)
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            self.say(f"[{iteration}/{self.total}] {text}  {values['images_per_s']:.1f} img/s")

    def val(self, iteration: int, result: dict[str, Any]) -> None:
        """Write one `"kind": "val"` line."""
        self._write("val", iteration, result)
        self.say(
            f"[{iteration}/{self.total}] val mIoU {result['miou']:.4f}  "
            f"pixel accuracy {result['pixel_accuracy']:.4f}"
        )

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        """Show a picture (H, W, 3) uint8 on TensorBoard."""
        self.board.add_image(name, pixels, iteration, dataformats="HWC")

    def close(self) -> None:
        """Flush what is pending."""
        self.board.close()
        self.bar.close()

    def _write(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, "iteration": iteration, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{kind}/{name}", value, iteration)


class SilentLog:
    """The `RunLog` of other ranks: every call does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class Board:
    """A `SummaryWriter` that gives up, with one line, where the disk does not take its events.

    No run ends for want of them.

    Args:
        folder: where they go.
        purge_step: drop what an earlier try wrote from there on.
        say: prints that line.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]) -> None:
        self.folder, self.say, self.failed = folder, say, False
        self.excepthook = threading.excepthook
        threading.excepthook = self._thread_failed
        self.writer = self._try(lambda: SummaryWriter(str(folder), purge_step=purge_step))

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

    def _try(self, call: Callable[[], Any]) -> Any:
        if self.failed:
            return None
        try:
            return call()
        except OSError as error:
            self.failed = True
            self.say(f"no more TensorBoard events in {self.folder}: {error.strerror or error}")

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """The writer's thread keeps its error for the next call too, which tells of it."""
        if not isinstance(failure.exc_value, OSError):
            self.excepthook(failure)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a crash cut short is left out."""
    lines = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        for text in path.read_text().splitlines():
            lines.append(json.loads(text))
    return lines


class Meters:
    """Means of named scalars over the steps since the last reading, kept on the device.

    Adding never waits for the device; only `read` does. The first iteration whose loss was
    not finite is kept too.

    Args:
        device: where the scalars are.
        reductions: of the method. A scalar that another one weights on the ranks is weighted so
            over the steps too.
    """

    def __init__(self, device: torch.device, reductions: Mapping[str, str] | None = None) -> None:
        self.device = device
        kinds = (reductions or {}).items()
        self.weight_of = {name: kind for name, kind in kinds if kind != "sum"}
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.sums: dict[str, torch.Tensor] = defaultdict(int)
        self.weights: dict[str, torch.Tensor | int] = defaultdict(int)
        self.steps, self.images = 0, 0
        self.waited, self.since = 0.0, time.perf_counter()

    def add(self, iteration: int, values: dict[str, torch.Tensor], step: Step) -> None:
        """Take in one step and its named scalars."""
        bad = (self.first_bad < 0) & ~torch.isfinite(values["loss"].detach())
        self.first_bad = torch.where(bad, iteration, self.first_bad)
        for name, value in values.items():
            weight = values[self.weight_of[name]].detach() if name in self.weight_of else 1
            self.sums[name] += value.detach().double() * weight
            self.weights[name] += weight
        self.steps += 1
        self.images += step.images
        self.waited += step.waited

    def read(self) -> dict[str, Any]:
        """Take the reading of this rank and start anew.

        Returns `means` by name, `images` of a step, seconds a step waited for data `data_s`,
        `steps_per_s`, `peak_memory_mb` and `first_bad`, the first iteration whose loss was
        not finite or -1.
        """
        means = {
            name: total.item() / (float(self.weights[name]) or 1.0)
            for name, total in self.sums.items()
        }
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
        self.weights.clear()
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


COLUMNS: dict[str, float | None] = dict.fromkeys(
    "loss loss_ce loss_dc active pairs negatives lr images_per_s data_s peak_memory_mb".split(), 0.0
) | {"positive_cosine": None, "skipped_images": 0}
"""What every `"kind": "train"` line begins with, so that those of all runs can be read alike, and
the value where a step has none."""


def train_line(
    readings: list[dict[str, Any]], rate: float, reductions: Mapping[str, str]
) -> dict[str, float | None]:
    """The values of a `"kind": "train"` line from the readings of all ranks.

    `images_per_s` counts the labeled and unlabeled images of all ranks; memory and waiting are
    those of the worst rank. The method's scalars are reduced as its `reductions` say; a mean over
    a rank's steps is already weighted (`Meters`).
    """

    def values(name: str) -> list[float]:
        return [item["means"].get(name, 0.0) for item in readings]

    def reduced(name: str) -> float:
        match reductions.get(name):
            case None:
                return sum(values(name)) / len(readings)
            case "sum":
                return sum(values(name))
            case weight:
                weights = values(weight)
                return sum(map(mul, values(name), weights)) / (sum(weights) or 1)

    return (
        COLUMNS
        | {name: reduced(name) for name in readings[0]["means"]}
        | {
            "lr": rate,
            "images_per_s": sum(item["images"] for item in readings)
            * min(item["steps_per_s"] for item in readings),
            "data_s": max(item["data_s"] for item in readings),
            "peak_memory_mb": max(item["peak_memory_mb"] for item in readings),
            "skipped_images": sum(item["skipped"] for item in readings),
        }
    )
