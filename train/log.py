"""What a run leaves to look at: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import resource
import sys
import time
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cac_fast.train.board import Board
from cac_fast.train.errors import writing

IGNORED_COLOR = (0, 0, 0)


class RunLog:
    """Metrics and messages of one run; on other ranks than 0 every call does nothing.

    Args:
        folder: the run folder.
        total: iterations of the run.
        start, evaluated: iteration that the run goes on from, and of its last finished evaluation;
            later lines of an earlier try are dropped.
    """

    def __init__(self, folder: Path, total: int, start: int, evaluated: int, is_main: bool) -> None:
        self.is_main = is_main
        if not is_main:
            return
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        last = {"train": start, "val": evaluated}
        kept = [x for x in read_metrics(self.path) if x["iteration"] <= last[x["kind"]]]
        temporary = self.path.with_suffix(".tmp")
        with writing(self.path):
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.path)
        # A bar only where somebody can watch it; in a file its carriage returns would be noise.
        self.bar = (
            tqdm(total=total, initial=start, unit="it", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self.total = total
        self.board = Board(folder / "tensorboard", start + 1, self.say)

    def say(self, line: str) -> None:
        """Print one line (above the bar where there is one)."""
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def step(self) -> None:
        """One iteration is done."""
        if self.is_main and self.bar is not None:
            self.bar.update()

    def train(self, iteration: int, values: dict[str, float | None]) -> None:
        """Write one ``"kind": "train"`` line."""
        if not self.is_main:
            return
        self._write("train", iteration, values)
        text = f"loss {values['loss']:.4f}  ce {values['loss_ce']:.4f}  dc {values['loss_dc']:.4f}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self.say(f"[{iteration}/{self.total}] {text}  {values['images_per_s']:.1f} img/s")

    def val(self, iteration: int, result: dict[str, Any]) -> None:
        """Write one ``"kind": "val"`` line."""
        if not self.is_main:
            return
        self._write("val", iteration, result)
        self.say(
            f"[{iteration}/{self.total}] val mIoU {result['miou']:.4f}  "
            f"pixel accuracy {result['pixel_accuracy']:.4f}"
        )

    def sample(self, iteration: int, picture: Image.Image) -> None:
        """Keep one picture of image, truth and prediction side by side."""
        if not self.is_main:
            return
        path = self.folder / "samples" / f"{iteration:07d}.png"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        self.board.add_image(
            "val/image_truth_prediction", np.asarray(picture), iteration, dataformats="HWC"
        )

    def close(self) -> None:
        """Flush what is pending."""
        if self.is_main:
            self.board.close()
            if self.bar is not None:
                self.bar.close()

    def _write(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, "iteration": iteration, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{kind}/{name}", value, iteration)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a crash cut short is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


class Meters:
    """Means of named scalars over the steps since the last reading, kept on the device.

    Adding never waits for the device; only :meth:`read` does. The first iteration whose loss was
    not finite is kept too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.steps = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    def add(self, iteration: int, values: dict[str, torch.Tensor], waited: float) -> None:
        """Take in one step: its named scalars and the seconds spent waiting for data."""
        bad = (self.first_bad < 0) & ~torch.isfinite(values["loss"].detach())
        self.first_bad = torch.where(bad, iteration, self.first_bad)
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.steps += 1
        self.waited += waited

    def read(self) -> dict[str, Any]:
        """Take the reading of this rank and start anew.

        Returns ``means`` by name, seconds a step waited for data ``data_s``, ``steps_per_s``,
        ``peak_memory_mb`` and ``first_bad``, the first iteration whose loss was not finite or -1.
        """
        means = {name: (total / self.counts[name]).item() for name, total in self.sums.items()}
        elapsed = time.perf_counter() - self.since
        reading = {
            "means": means,
            "data_s": self.waited / max(1, self.steps),
            "steps_per_s": self.steps / elapsed,
            "peak_memory_mb": peak_memory_mb(self.device),
            "first_bad": int(self.first_bad.item()),
        }
        self._reset()
        return reading

    def restart_clock(self) -> None:
        """Leave an evaluation's time and memory out of the next reading."""
        self.since = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def train_line(
    readings: list[dict[str, Any]], batch_size: int, rate: float
) -> dict[str, float | None]:
    """The values of a ``"kind": "train"`` line from the readings of all ranks.

    ``active`` and ``pairs`` count the whole step, ``images_per_s`` the labeled and unlabeled
    images of all ranks; memory and waiting are those of the worst rank.
    """
    means = {
        name: sum(item["means"][name] for item in readings) / len(readings)
        for name in readings[0]["means"]
    }
    pairs = [item["means"].get("pairs", 0.0) for item in readings]
    if "positive_cosine" in means:  # a mean over pairs, of which ranks have more or fewer
        cosines = [item["means"]["positive_cosine"] for item in readings]
        means["positive_cosine"] = sum(map(mul, cosines, pairs)) / (sum(pairs) or 1)
    images = batch_size * (2 if "loss_dc" in means else 1)
    line: dict[str, float | None] = {
        "loss": means["loss"],
        "loss_ce": means["loss_ce"],
        "loss_dc": means.get("loss_dc", 0.0),
        "active": means.get("active", 0.0) * len(readings),
        "pairs": sum(pairs),
        "negatives": means.get("negatives", 0.0),
        "lr": rate,
        "images_per_s": images * min(item["steps_per_s"] for item in readings),
        "data_s": max(item["data_s"] for item in readings),
        "peak_memory_mb": max(item["peak_memory_mb"] for item in readings),
        "positive_cosine": means.get("positive_cosine"),
        "skipped_images": sum(item["skipped"] for item in readings),
    }
    if "false_negatives" in means:
        line["false_negatives"] = means["false_negatives"]
    return line


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def colorize(labels: np.ndarray, palette: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Colors (H, W, 3) uint8 of class ids (H, W) uint8; 255 is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[255] = IGNORED_COLOR
    return table[labels]
