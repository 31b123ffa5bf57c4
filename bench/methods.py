"""What a step of each method costs: time and peak memory beside those of supervised, in one run.

    python bench/methods.py [--methods all|LIST] [--json FILE] [-- OPTIONS OF train/main.py]

A step has unlabeled images and is one of the end of a run, when every loss takes part. Its time
begins when its batch is loaded, and ends with all optimizers. All methods take turns, so that what
slows the machine down for a while hits all alike. The peak memory is that of a process of its own
for each. Labels that a method needs are made up, and so are the data unless the options name some.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accuracy.arms import footnote, method_names
from cac_fast.train import config
from cac_fast.train.batch import Step
from cac_fast.train.distributed import World, pick_device, run_command
from cac_fast.train.engine import Trainer
from cac_fast.train.errors import InputError
from cac_fast.train.options import Parser, at_least
from lib.made_up import with_labels, write_folder
from lib.measure import (
    command_line,
    facts,
    host_and_wall,
    peak_extra_bytes,
    percentiles,
    progress,
    write_record,
)
from lib.report import aligned, three_digits
from lib.side_by_side import side_by_side
from lib.train_step_case import CLASSES, spread_labels

CASES = {
    "cpu": "--backbone resnet18 --crop-size 64 --batch-size 4",
    "cuda": "--backbone resnet50 --crop-size 720 --batch-size 8",
}
# Every pair counts, the most that CAC's loss can cost, and all steps meet the same weights.
SETTINGS = "--workers 0 --threshold 0 --normalization active --learning-rate 1e-9"
WARM_UPS = 2
MEMORY_SECONDS = 600.0
LEGEND = """
n: timed steps; median, p20, p80: milliseconds a step, the wait for its batch left out; time,
p20, p80: over supervised's in the same turn; MB: peak memory in 10^6 bytes beyond what Python and
PyTorch take before: weights, gradients, momentum, activations; memory: over supervised's."""


class Contender:
    """A method's steps, one after another, and the seconds that they took."""

    def __init__(self, name: str, words: list[str]) -> None:
        self.name, self.words = name, words
        self.times: list[float] = []
        self.peak: int | None = None
        self.status = "ok"
        self.trainer: Trainer | None = None
        self.steps: Iterator[Step] = iter(())

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something unless something before was refused or did not fit into the GPU's memory.

        Raises:
            InputError: supervised, with which all are compared, does not take the options.
        """
        if self.status != "ok":
            return
        try:
            action()
            return
        except torch.cuda.OutOfMemoryError as error:
            self.status = f"failed: {str(error).splitlines()[0]}"
        except InputError as error:
            if self.name == "supervised":
                raise
            self.status = f"refused: {error}"
        progress(f"{self.name} {self.status}")
        # Only here, as the error held the tensors of the frames that it came through.
        self.release()

    def prepare(self) -> None:
        """Make the trainer, and its first steps.

        Raises:
            InputError: as a training with these settings would.
        """
        self.trainer = make_trainer(self.words)
        self.steps = steps_of(self.trainer)
        for _ in range(WARM_UPS):
            self.trainer.optimize(next(self.steps))

    def run(self) -> None:
        """Make one step and keep its time."""
        waited = 0.0

        def step() -> None:
            nonlocal waited
            batch = next(self.steps)
            waited = batch.waited
            self.trainer.optimize(batch)

        _, wall = host_and_wall(step, self.trainer.world.device)
        self.times.append(wall - waited)

    def release(self) -> None:
        """Give the memory back."""
        self.trainer, self.steps = None, iter(())
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def take_peak(self) -> None:
        """Measure the peak memory of a process of its own."""
        progress(f"memory: {self.name}")
        ((self.peak, problem),) = side_by_side([partial(peak_bytes, self.words)], MEMORY_SECONDS)
        if problem:
            self.status = f"memory not measured: {problem}"


def make_trainer(words: list[str]) -> Trainer:
    """A trainer before the last iteration of a run with the options `words` of `train/main.py`.

    The labels that its random networks give are of all classes.

    Raises:
        InputError: as a training with these settings would.
    """
    settings = config.parse(words)
    trainer = Trainer(settings, World(0, 1, pick_device(settings.run.device)))
    trainer.iteration = trainer.iterations - 1
    trainer.use_unlabeled(bool(trainer.method.views))
    images = next(steps_of(trainer)).labeled["image"]
    for network in trainer.method.segmenters():
        spread_labels(trainer.method, network, images)
    return trainer


def steps_of(trainer: Trainer) -> Iterator[Step]:
    """Steps with unlabeled images, where the method sees any, without an end."""
    return trainer.stream.steps(0, sys.maxsize - 1, bool(trainer.method.views))


def peak_bytes(words: list[str]) -> int | None:
    """Peak memory of a few steps and of all that they need; to be called in a new process."""

    def train() -> None:
        trainer = make_trainer(words)
        steps = steps_of(trainer)
        for _ in range(WARM_UPS):
            trainer.optimize(next(steps))

    return peak_extra_bytes(train, pick_device(config.parse(words).run.device))[1]


def rows(contenders: list[Contender]) -> list[dict[str, Any]]:
    """Columns of the table, the cheapest step first; ratios of the same turn."""
    base = next(one for one in contenders if one.name == "supervised")
    found = []
    for one in contenders:
        row: dict[str, Any] = {"method": one.name, "status": one.status, "runs": len(one.times)}
        row |= dict.fromkeys("median_ms p20_ms p80_ms time time_p20 time_p80 memory".split())
        row["peak_mb"] = None if one.peak is None else one.peak / 1e6
        count = min(len(one.times), len(base.times))
        if count:
            ratios = np.divide(one.times[:count], base.times[:count])
            spread = np.percentile(ratios, (50, 20, 80)).tolist()
            row |= percentiles(one.times)
            row |= dict(zip(("time", "time_p20", "time_p80"), spread, strict=True))
        if one.peak and base.peak:
            row["memory"] = one.peak / base.peak
        found.append(row)
    return sorted(found, key=lambda row: (row["time"] is None, row["time"] or 0.0))


def table(found: list[dict[str, Any]]) -> str:
    """All rows as Markdown, and a line for each that is not whole."""
    names = "median_ms p20_ms p80_ms time time_p20 time_p80 peak_mb memory".split()
    lines = [["", "n", "median", "p20", "p80", "time", "p20", "p80", "MB", "memory"]]
    for row in found:
        lines.append([row["method"], str(row["runs"]), *(three_digits(row[n]) for n in names)])
    problems = [f"- {row['method']} {row['status']}\n" for row in found if row["status"] != "ok"]
    return aligned(lines) + "".join(problems) + footnote(row["method"] for row in found)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments before `--`; keep the rest for the trainer.

    Raises:
        InputError: one cannot be used.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "names between commas (%(default)s); supervised comes with them"
    parser.add_argument(
        "--methods", type=method_names, default="all", metavar="all|LIST", help=text
    )
    parser.add_argument("--turns", type=at_least(1), default=10, help="steps of each (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="for timing; then no further turn (%(default)s)"
    )
    parser.add_path("--json", "FILE", "write the record", writable=True)
    options = parser.parse_args(arguments[:cut])
    options.command, options.rest = arguments, arguments[cut + 1 :]
    return options


def words_of(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The options of `train/main.py` for each method; what they lack is made up in `folder`.

    Raises:
        InputError: one cannot be used.
    """
    given = any(word.partition("=")[0] == "--dataset" for word in options.rest)
    where = [] if given else ["--dataset", "folder", "--data-dir", str(folder / "data")]
    device = pick_device(config.parse([*where, *options.rest]).run.device)
    shared = [*where, *SETTINGS.split(), *CASES[device.type].split(), *options.rest]
    if not given:
        settings = config.parse(shared)
        (folder / "data").mkdir()
        side, count = 2 * settings.data.crop_size, settings.optim.batch_size
        write_folder(folder / "data", CLASSES, side, count)
    return {
        name: [
            *with_labels([*shared, "--method", name], folder / f"labels-{name}"),
            "--output",
            str(folder / name),
        ]
        for name in dict.fromkeys(["supervised", *options.methods])
    }


def main(arguments: list[str]) -> int:
    """Measure and report; 1 where supervised could not be measured.

    Raises:
        InputError: an argument cannot be used.
    """
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        words = words_of(options, Path(folder))
        device = pick_device(config.parse(words["supervised"]).run.device)
        machine = facts(device) | {"threads": torch.get_num_threads()}
        print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
        record = {"command": command_line("bench/methods.py", arguments), **machine}
        contenders = [Contender(name, of_method) for name, of_method in words.items()]

        def write() -> list[dict[str, Any]]:
            found = rows(contenders)
            write_record(options.json, {**record, "rows": found})
            return found

        for one in contenders:
            progress(f"warm-up: {one.name}")
            one.attempt(one.prepare)
        begin = time.monotonic()
        for turn in range(options.turns):
            for one in contenders:
                one.attempt(one.run)
            progress(f"turn {turn + 1} of {options.turns}")
            write()
            if time.monotonic() - begin > 60 * options.minutes:
                progress(f"the {options.minutes:g} minutes are over")
                break
        for one in contenders:
            one.release()
        for one in contenders:
            one.attempt(one.take_peak)
            write()
    print(f"{LEGEND}\n\n{table(write())}")
    return int(not contenders[0].times)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
