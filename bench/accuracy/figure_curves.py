"""Figures 6 and 7: what runs wrote while they trained, a mean over seeds and its band."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from accuracy.figure_runs import Drawn, Log, by_name, data_of, open_logs, picture_of
from cac_fast.train.data.splits import select
from cac_fast.train.errors import InputError

Curve = Mapping[int, float | None]
"""Values by iteration or epoch; None where there is nothing to take one of."""

WITH, WITHOUT = "by pseudo labels", "at random"
COUNTS = {
    WITH: ("false_negatives", "admitted_pairs"),
    WITHOUT: ("false_negatives_random", "random_pairs"),
}


def validation(log: Log) -> Curve:
    """Val mIoU by iteration.

    Raises:
        InputError: the run was never validated.
    """
    lines = (line for line in log.lines if line["kind"] == "val" and "miou" in line)
    found = {line["iteration"]: line["miou"] for line in lines}
    if not found:
        raise InputError(
            f"{log.folder} holds no mIoU: use a run of train/main.py whose data have a val split"
        )
    return found


def band(curves: Sequence[Curve]) -> dict[int, tuple[float, float, float]]:
    """Mean, smallest and largest value, where every curve has one."""
    found = {}
    for step in sorted(set.intersection(*map(set, curves))):
        values = [curve[step] for curve in curves]
        if None not in values:
            found[step] = math.fsum(values) / len(values), min(values), max(values)
    return found


def precision(
    lines: Sequence[Mapping[str, Any]], kind: str, epoch: float, warmup: int = 0
) -> Curve:
    """Precision of the negatives by epoch: the lines' means, weighted by how many pairs they had.

    kind: WITH or WITHOUT. epoch: iterations of one. warmup: iterations that have no pairs.
    """
    share, count = COUNTS[kind]
    sums: dict[int, list[float]] = {}
    before = warmup
    for line in lines:
        if count in line:
            # A line is of the iterations up to its own, and has the pairs of a step.
            pairs = line[count] * (line["iteration"] - before)
            of_epoch = sums.setdefault(math.ceil(line["iteration"] / epoch), [0.0, 0.0])
            of_epoch[0] += pairs * (1 - line[share])
            of_epoch[1] += pairs
            before = line["iteration"]
    return {number: right / pairs if pairs else None for number, (right, pairs) in sums.items()}


def epoch_length(log: Log, data_dir: Path | None) -> float:
    """Iterations in which a run draws as many unlabeled images as there are."""
    part, data = log.config.data, data_of(log.config, data_dir)
    lists = (path and Path(path) for path in (part.labeled, part.unlabeled))
    _, unlabeled = select(data, *lists, part.labeled_share, part.data_list)
    return len(unlabeled) / log.config.optim.batch_size


def make_negatives(options: argparse.Namespace) -> Drawn:
    """Figure 6: of the pairs of anchor and negative, the share of two true classes, by epoch.

    Raises:
        InputError: a run or its data cannot be used, or it did not measure false negatives.
    """
    logs = open_logs(options.runs, options.captions)
    curves = {}
    for name, of_name in by_name(logs).items():
        for log in of_name:
            if not any(COUNTS[WITHOUT][1] in line for line in log.lines):
                raise InputError(
                    f"{log.folder} did not measure its negatives: train it with --false-negatives"
                )
        lengths = [epoch_length(log, options.data_dir) for log in of_name]
        for kind in COUNTS:
            curves[f"{name}, {kind}"] = [
                precision(log.lines, kind, length, log.config.num_warmup)
                for log, length in zip(of_name, lengths, strict=True)
            ]
    image, numbers = drawn(curves, "epoch of the unlabeled images", "precision of the negatives")
    return Drawn(image, numbers)


def make_validation(options: argparse.Namespace) -> Drawn:
    """Figure 7: val mIoU by iteration.

    Raises:
        InputError: a run cannot be used.
    """
    logs = open_logs(options.runs, options.captions)
    curves = {name: [validation(log) for log in same] for name, same in by_name(logs).items()}
    return Drawn(*drawn(curves, "iteration", "val mIoU"))


def drawn(
    curves: Mapping[str, Sequence[Curve]], xlabel: str, ylabel: str
) -> tuple[Image.Image, dict[str, Any]]:
    """The figure of the named curves, several seeds each, and the numbers in it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), dpi=100, layout="constrained")
    axis = figure.subplots()
    numbers: dict[str, Any] = {}
    for name, of_name in curves.items():
        found = band(of_name)
        runs = f"{len(of_name)} seed{'s' if len(of_name) > 1 else ''}"
        numbers[name] = {
            "seeds": len(of_name),
            "mean": {step: found[step][0] if step in found else None for step in of_name[0]},
            "low": {step: low for step, (_, low, _) in found.items()},
            "high": {step: high for step, (_, _, high) in found.items()},
        }
        if found:
            mean, low, high = zip(*found.values(), strict=True)
            (line,) = axis.plot(
                list(found), mean, marker="o", markersize=3, label=f"{name} ({runs})"
            )
            axis.fill_between(
                list(found), low, high, color=line.get_color(), alpha=0.2, linewidth=0
            )
            step = max(found)
            print(f"{name}, {runs}: {100 * found[step][0]:.1f} at {xlabel.split()[0]} {step}")
        else:
            print(f"{name}, {runs}: nothing to show")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=9)
    return picture_of(figure), numbers
