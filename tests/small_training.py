"""Trainings of seconds: a small network on the scenes of tiny_scenes, on the CPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cac_fast.train import checkpoint, config, engine
from cac_fast.train.distributed import World
from cac_fast.train.log import read_metrics

ROOT = Path(__file__).resolve().parents[1]

CPU = World(0, 1, torch.device("cpu"))
SMALL = (
    "--backbone mobilenet_v2 --batch-size 2 --crop-size 32 --iterations 10 --warmup 2 --workers 0 "
    "--device cpu --eval-every 100 --log-every 1 --learning-rate 0.001 --threshold 0.3"
).split()


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    lists = [] if "--labeled-share" in more else ["--labeled-share", "full"]
    return [
        "--dataset",
        "folder",
        "--data-dir",
        str(data),
        "--output",
        str(output),
        *SMALL,
        *lists,
        *more,
    ]


def run(data: Path, output: Path, *more: str) -> list[dict]:
    """Train in this process; return the lines of metrics.jsonl."""
    engine.train(config.parse(arguments(data, output, *more)), CPU)
    return read_metrics(output / "metrics.jsonl")


@contextmanager
def stopped_after(iteration: int) -> Iterator[None]:
    """Trainings in this process get a SIGTERM at the end of that step, and must end by it."""
    step = engine.Trainer._train_step

    def interrupted(self: engine.Trainer, batches: object) -> None:
        step(self, batches)
        if self.iteration == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Trainer, "_train_step", interrupted)
        with pytest.raises(SystemExit):
            yield


def losses(lines: list[dict], name: str = "loss") -> list[float]:
    return [line[name] for line in lines if line["kind"] == "train"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(path)["method"]


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []
