"""What a run leaves to look at: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cac_fast.train.board import Board
from cac_fast.train.errors import writing


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
        """Write one `"kind": "train"` line."""
        if not self.is_main:
            return
        self._write("train", iteration, values)
        losses = (name for name in values if name.startswith("loss"))
        text = "  ".join(f"{name.removeprefix('loss_')} {values[name]:.4f}" for name in losses)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self.say(f"[{iteration}/{self.total}] {text}  {values['images_per_s']:.1f} img/s")

    def val(self, iteration: int, result: dict[str, Any]) -> None:
        """Write one `"kind": "val"` line."""
        if not self.is_main:
            return
        self._write("val", iteration, result)
        self.say(
            f"[{iteration}/{self.total}] val mIoU {result['miou']:.4f}  "
            f"pixel accuracy {result['pixel_accuracy']:.4f}"
        )

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        """Show a picture (H, W, 3) uint8 on TensorBoard."""
        if self.is_main:
            self.board.add_image(name, pixels, iteration, dataformats="HWC")

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
    """The lines of a `metrics.jsonl`; a last line that a crash cut short is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


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
    those of the worst rank. The method's scalars are reduced as its `reductions` say.
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
