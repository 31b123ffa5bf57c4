"""How the trainer's step scales over processes: torchrun, NCCL on GPUs and gloo on CPUs.

    python bench/scaling.py [--processes 1,2] [--images 4] [--json FILE] [-- TRAINER'S OPTIONS]

Real runs of `train/main.py --method cac` with data, both losses and the gather of the negatives.
Weak: each process has `--images` images, so the batch and the negatives that every process meets
grow with their number. Strong: the batch is that of the most processes throughout. All runs take
turns. What follows `--` goes to `train/main.py` as it is, behind what is given here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cac_fast.train.log import read_metrics
from lib.measure import ROOT, command_line, facts, percentiles, progress, write_record
from lib.report import aligned, three_digits

DATA = ["--dataset", "toycity", "--data-dir", str(ROOT / "data" / "toycity")]
# Every step with unlabeled images; nothing but steps between two log lines.
SETTINGS = "--warmup 0 --eval-every 100000 --save-every 100000 --log-every 5 --workers 0".split()

Size = tuple[int, int]
"""Processes and images of a step, of all of them."""


def step_times(size: Size, options: argparse.Namespace) -> list[float]:
    """Seconds a step of one run, a mean over 5 steps each; the first five are left out."""
    processes, batch = size
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), str(ROOT / "train" / "main.py")]
        command += ["--method", "cac", *DATA]
        command += ["--batch-size", str(batch), "--iterations", str(options.steps), *SETTINGS]
        done = subprocess.run(
            [*command, "--output", folder, *options.rest],
            env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"error: {processes} processes, {batch} images: {done.stderr[-2000:]}")
        lines = read_metrics(Path(folder) / "metrics.jsonl")
        # The labeled and the unlabeled images of a step.
        return [2 * batch / line["images_per_s"] for line in lines if line["kind"] == "train"][1:]


def rows(times: dict[Size, list[float]]) -> list[dict[str, Any]]:
    """Medians, and how they stand to those of one process: 1 is perfect."""
    sizes = [
        {"processes": processes, "batch": batch, **percentiles(values)}
        for (processes, batch), values in times.items()
        if values
    ]
    medians = {(row["processes"], row["batch"]): row["median_ms"] for row in sizes}
    for row in sizes:
        processes, batch = row["processes"], row["batch"]
        share = medians.get((1, batch // processes))
        whole = medians.get((1, batch))
        row["weak"] = share and share / row["median_ms"]
        row["strong"] = whole and whole / row["median_ms"] / processes
    return sizes


def table(found: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    names = ("processes", "batch", "median_ms", "p20_ms", "p80_ms", "weak", "strong")
    lines = [[three_digits(row[name]) for name in names] for row in found]
    return aligned([list(names), *lines])


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments before `--`; keep the rest for `train/main.py`."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes",
        type=lambda text: [int(word) for word in text.split(",")],
        default="1,2",
        help="numbers of processes; 1 is what the others are compared with",
    )
    parser.add_argument("--images", type=int, default=4, help="images a process [4]")
    parser.add_argument("--steps", type=int, default=25, help="steps a run, a multiple of 5 [25]")
    parser.add_argument("--turns", type=int, default=2, help="runs of each size [2]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a process [1]")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments[:cut])
    options.command, options.rest = arguments, arguments[cut + 1 :]
    return options


def main(arguments: list[str]) -> None:
    """Measure all sizes in turns; print the table, write the record."""
    options = parse(arguments)
    most = options.images * max(options.processes)
    times: dict[Size, list[float]] = {}
    for count in sorted({1, *options.processes}):
        times |= {(count, count * options.images): [], (count, most): []}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"command": command_line("bench/scaling.py", arguments), **facts(device)}
    for turn in range(options.turns):
        for size in times:
            progress(f"turn {turn + 1} of {options.turns}: {size[0]} processes, {size[1]} images")
            times[size] += step_times(size, options)
            write_record(options.json, {**record, "rows": rows(times)})
    print(table(rows(times)))
    print("weak, strong: efficiency against one process with a share of the batch, or all of it")


if __name__ == "__main__":
    main(sys.argv[1:])
