"""What one training step costs, on a synthetic batch that is already on the device.

    python bench/train_step.py --baseline [--json FILE] [-- OPTION OF train/main.py ...]

The step is the trainer's own, from the forward passes to the optimizer; data and logging are left
out. The baseline (lib/train_step_baseline.py) is the same step as the paper's authors do it. Both
start from equal weights, batch and negatives, and their losses and gradients must agree in float32
before anything is timed; then all take turns. With it comes the trainer's step with the baseline's
heads ("plain heads"). What follows `--` goes to the trainer as it is. Without options: the goal
row of the device. The record is written after every turn, and a step that does not fit into the
GPU's memory gets a row that says so.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cac_fast import build_info
from cac_fast.train.errors import InputError
from cac_fast.train.registry import BACKBONES, NETWORKS
from lib import measure, report
from lib.measure import progress
from lib.report import three_digits
from lib.train_step_case import Case, plain, problem
from lib.train_step_contenders import (
    TIMES,
    Contender,
    baseline_step,
    plain_heads_step,
    trainer_step,
)

# The goal rows.
GOALS = {
    "cpu": {"backbone": "resnet18", "crop_size": 128, "negatives": 25_600},
    "cuda": {"backbone": "resnet50", "crop_size": 720, "negatives": 129_600},
}
LEGEND = """
median, p20, p80: milliseconds a step, on a GPU without the host's; cpu: of all threads of the
process, steadier than the clock's where others use the machine; img/s: labeled and unlabeled
images; then the medians of the parts; MB: peak memory in 10^6 bytes: weights, gradients, momentum,
bank, what the step adds; syncs: how often a step makes the host wait for a GPU; host: milliseconds
until the call of a step returns there."""


def take_turns(
    contenders: list[Contender], steps: int, minutes: float, write: Callable[[], Any]
) -> None:
    """Round-robin, so that what slows the machine down for a while hits all alike.

    write: called after every warm-up and every turn, as the run may be ended before its time.
    """
    begin = time.monotonic()
    for contender in contenders:
        progress(f"warm-up: {contender.name}, M {contender.case.negatives:,}")
        contender.attempt(contender.warm_up)
        write()
    for turn in range(steps):
        for contender in contenders:
            contender.attempt(contender.run)
        shown = ", ".join(f"{1e3 * c.times[-1]:.0f}" if c.times else "-" for c in contenders)
        progress(f"step {turn + 1} of {steps}: {shown} ms")
        write()
        if time.monotonic() - begin > 60 * minutes:
            progress(f"the {minutes:g} minutes are over")
            break


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    parts = dict.fromkeys(name for row in rows for name in row["parts_ms"])
    head = ["", "M", "n", "median", "p20", "p80", "cpu", "img/s", *parts, "MB", "syncs", "host"]
    lines = [head]
    for row in rows:
        numbers = [row[name] for name in TIMES]
        numbers += [row["parts_ms"].get(name) for name in parts]
        numbers += [row["peak_mb"], row["host_syncs"], row["host_ms"]]
        first = [row["provider"], f"{row['negatives']:,}", str(row["runs"])]
        lines.append([*first, *map(three_digits, numbers)])
    return report.aligned(lines)


def add_ratios(contenders: list[Contender], rows: list[dict[str, Any]]) -> list[str]:
    """Compare all with the first, the trainer's step; turn by turn, as these ran side by side.

    A line each, and one for each that failed.
    """
    lines = []
    first, ours = contenders[0], rows[0]
    for contender, row in zip(contenders, rows, strict=True):
        if row["status"] != "ok":
            lines.append(f"- {row['provider']}, M {row['negatives']:,}: {row['status']}")
        if contender is first or not (contender.times and first.times):
            continue
        ratio = float(np.median(np.divide(contender.times, first.times)))
        row["time_over_first"], row["cpu_over_first"] = ratio, row["cpu_ms"] / ours["cpu_ms"]
        line = f"- {row['provider']}, M {row['negatives']:,}: {three_digits(ratio)} of the time"
        line += f" ({three_digits(row['cpu_over_first'])} of the CPU time)"
        if row["peak_mb"] is not None:
            row["memory_over_first"] = row["peak_mb"] / ours["peak_mb"]
            extra = row["peak_mb"] - ours["peak_mb"]
            line += f", {three_digits(row['memory_over_first'])} of the memory ({extra:+.0f} MB)"
        lines.append(f"{line} of the trainer's step with M {ours['negatives']:,}")
    shares = ", ".join(
        f"{100 * row['loss_share']:.2g}% with M {row['negatives']:,}"
        for row in rows
        if row["provider"] == "trainer" and row["loss_share"] is not None
    )
    return [*lines, f"- the loss's share of the step, without its backward: {shares or '-'}"]


def parse(arguments: list[str]) -> argparse.Namespace:
    def count(text: str) -> int:
        factors = {"k": 1_000, "M": 1_000_000}
        digits, factor = (text[:-1], factors[text[-1]]) if text[-1:] in factors else (text, 1)
        number = round(float(digits) * factor)
        if number < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not positive")
        return number

    def counts(text: str) -> list[int]:
        return [count(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    size = {"type": count, "metavar": "N"}
    parser.add_argument("--network", default="deeplabv3plus", type=NETWORKS.checked)
    parser.add_argument("--backbone", type=BACKBONES.checked, help="resnet18; on a GPU resnet50")
    parser.add_argument("--batch-size", **size, default=8, help="labeled, and as many unlabeled")
    parser.add_argument("--crop-size", **size, help="128; on a GPU 720")
    parser.add_argument("--negatives", **size, help="M in all: 25.6k; on a GPU 129.6k")
    parser.add_argument(
        "--sweep-negatives", type=counts, default=[], metavar="M,...", help="the trainer's step too"
    )
    parser.add_argument(
        "--baseline", action="store_true", help="the authors' step and plain heads too"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--device", default=devices[0], choices=devices)
    parser.add_argument("--steps", **size, default=10, help="timed, of each (%(default)s)")
    parser.add_argument("--minutes", type=float, default=5.0, help="for timing (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows, device, versions")
    more: list[str] = []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, more = arguments[:cut], arguments[cut + 1 :]
    options = parser.parse_args(arguments)
    for name, value in GOALS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.more = more
    return options


def main(arguments: list[str]) -> int:
    """Measure and report.

    1 where the two steps differ or the trainer's does not fit, 2 for options that cannot be used.
    """
    options = parse(arguments)
    names = "network backbone batch_size crop_size negatives precision more".split()
    case = Case(device=torch.device(options.device), **{n: getattr(options, n) for n in names})
    facts = measure.facts(case.device) | {"threads": torch.get_num_threads()}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    record = {
        "command": measure.command_line("bench/train_step.py", arguments),
        **facts,
        "extension": build_info(),
    }
    contenders = [Contender("trainer", case, trainer_step)]
    if options.baseline:
        contenders.append(Contender("plain heads", case, plain_heads_step))
        contenders.append(Contender("baseline", plain(case), baseline_step))
    for negatives in options.sweep_negatives:
        contenders.append(Contender("trainer", replace(case, negatives=negatives), trainer_step))

    def write() -> tuple[list[dict[str, Any]], list[str]]:
        rows = [contender.row() for contender in contenders]
        lines = add_ratios(contenders, rows)
        gpu = measure.gpu_state(case.device)
        measure.write_record(options.json, {**record, "gpu": gpu, "rows": rows})
        return rows, lines

    try:
        if options.baseline:
            progress("comparing losses and gradients with the baseline's")
            # What was not compared is not timed: without the memory to compare, the baseline fails.
            if wrong := contenders[2].attempt(problem, case):
                print(f"nothing was timed: {wrong}")
                return 1
            gc.collect()
        for contender in contenders:
            contender.attempt(contender.prepare)
    except (InputError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    take_turns(contenders, options.steps, options.minutes, write)
    rows, lines = write()
    print(f"{LEGEND}\n\n{table(rows)}\n" + "\n".join(lines))
    return int(not contenders[0].times)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
