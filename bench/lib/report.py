"""Rows of the loss bench as a table, as headlines and as a plot."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lib.cases import TEMPERATURE, Case
from lib.measure import Times, can_plot, percentiles

# What the others are compared with; eager and triton are back ends as well.
BASELINES = ("dense", "compiled", "chunked", "flex", "eager", "triton")
# Back ends that are there to be fast, each with all its paths ("cuda:sm_90a").
FAST = ("eager", "cpp", "triton", "cuda")
HEADLINE_CASES = ("goal", "asked", "dense labels")
MARKERS = "osD^vP*X"
LEGEND = """
n: timed runs; median, p20, p80: milliseconds for loss and gradient, on a GPU without the host's;
host, wall: until the call returns, until its result is there; MB: peak memory beyond the arguments,
in 10^6 bytes; TFLOP/s: effective ones, active x M x 4 D / median; /bare: median / that of two bare
matrix products of as many pairs as are admitted; then how many times faster than the others. dense,
compiled, chunked, flex: see bench/lib/baselines.py."""

Row = dict[str, Any]


def describe(case: Case) -> Row:
    """The columns that say what was computed."""
    columns = asdict(case) | {"case": case.name, "temperature": TEMPERATURE}
    columns["active"] = round(columns.pop("share") * case.anchors)
    del columns["name"]
    return columns


def time_columns(times: list[Times], case: Row) -> Row:
    """Milliseconds, the device's and the medians of host and wall; the rates of the device."""
    device, host, wall = 1e3 * np.array(times).T
    milliseconds = percentiles(device / 1e3)
    median = milliseconds["median_ms"] / 1e3
    flop = 4 * case["channels"]
    return {
        "runs": len(times),
        **milliseconds,
        "host_ms": float(np.median(host)),
        "wall_ms": float(np.median(wall)),
        "tflops": case["admitted"] * flop / median / 1e12,
        "effective_tflops": case["active"] * case["negatives"] * flop / median / 1e12,
    }


def add_ratios(rows: list[Row]) -> None:
    """Time over that of the bare products, and how many times faster than each baseline."""
    medians = {row["provider"]: row["median_ms"] for row in rows if row["status"] == "ok"}
    for row in rows:
        if row["status"] == "ok":
            if "products" in medians:
                row["over_products"] = row["median_ms"] / medians["products"]
            row["faster_than"] = {
                name: medians[name] / row["median_ms"] for name in BASELINES if name in medians
            }


def table(rows: list[Row]) -> str:
    """The rows of one case as aligned Markdown."""
    measured = next((list(row["faster_than"]) for row in rows if "faster_than" in row), [])
    head = ["", "n", "median", "p20", "p80", "host", "wall", "MB", "TFLOP/s", "/bare"]
    head += measured
    lines, notes = [head], defaultdict(list)
    for row in rows:
        if row["status"] != "ok":
            notes[row["status"]].append(row["provider"])
            continue
        columns = "median_ms p20_ms p80_ms host_ms wall_ms peak_extra_mb".split()
        columns += ["effective_tflops", "over_products"]
        cells = [three_digits(row.get(name)) for name in columns]
        cells += [three_digits(row["faster_than"][name]) + "x" for name in measured]
        lines.append([row["provider"], str(row["runs"]), *cells])
    text = aligned(lines) if len(lines) > 1 else ""
    return text + "".join(f"- {', '.join(names)} {status}\n" for status, names in notes.items())


def aligned(lines: list[list[str]]) -> str:
    """A head and lines of cells as a Markdown table, numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    text = ""
    for first, *others in (lines[0], rule, *lines[1:]):
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def three_digits(number: float | None) -> str:
    """1234, 123, 12.3, 1.23, 0.123, 0.00123: for people; a dash where nothing was measured."""
    if number is None:
        return "-"
    if number == 0 or number >= 100:
        return f"{number:.0f}"
    return f"{number:#.3g}" if number >= 1e-3 else f"{number:.2g}"


def headlines(rows: list[Row]) -> list[str]:
    """The fast back ends on the rows that matter most, a line each."""
    lines = []
    in_float32 = {
        (row["provider"], row["case"], row["anchors"], row["negatives"], row["labels"]): row
        for row in rows
        if (row["dtype"], row["status"]) == ("float32", "ok")
    }
    for row in rows:
        wanted = row["case"] in HEADLINE_CASES and row["provider"].split(":")[0] in FAST
        if not wanted or row["status"] != "ok":
            continue
        ratios = {f"vs {name}": ratio for name, ratio in row["faster_than"].items()}
        ratios.pop(f"vs {row['provider']}", None)
        size = row["anchors"], row["negatives"], row["labels"]
        for rival in ("eager", "chunked"):
            other = in_float32.get((rival, row["case"], *size))
            if other and row["dtype"] != "float32":
                ratios[f"vs {rival} in float32"] = other["median_ms"] / row["median_ms"]
        name = "{}, A {:,}, M {:,}, {}, {}".format(row["case"], *size, row["dtype"])
        parts = [
            f"{three_digits(row['median_ms'])} ms",
            f"{three_digits(row['effective_tflops'])} effective TFLOP/s",
            f"{three_digits(row['peak_extra_mb'])} MB",
            f"{three_digits(row.get('over_products'))} /bare",
            *(f"{three_digits(ratio)}x {text}" for text, ratio in ratios.items()),
        ]
        lines.append(f"- {name}: {row['provider']} " + ", ".join(parts))
    return lines


def plot(rows: list[Row], device: str, path: Path) -> None:
    """Time and peak memory against M, log-log, for the A, labels and dtype with the most M."""
    if not can_plot():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = defaultdict(set)
    for row in rows:
        sizes[row["anchors"], row["active"], row["labels"], row["dtype"]].add(row["negatives"])
    chosen = max(sizes, key=lambda group: len(sizes[group]))
    anchors, active, labels, dtype = chosen
    lines = defaultdict(list)
    for row in rows:
        group = row["anchors"], row["active"], row["labels"], row["dtype"]
        if group == chosen and row["status"] == "ok":
            lines[row["provider"]].append(row)

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    columns = (("median_ms", "time, ms"), ("peak_extra_mb", "peak extra memory, MB"))
    for axis, (column, title) in zip(axes, columns, strict=True):
        for number, (name, of_provider) in enumerate(lines.items()):
            points = sorted(
                (row["negatives"], row[column]) for row in of_provider if row.get(column)
            )
            if points:
                style = MARKERS[number % len(MARKERS)] + ("--" if name == "products" else "-")
                look = {"color": f"C{number}", "markersize": 4, "label": name}
                axis.plot(*zip(*points, strict=True), style, **look)
        axis.set(xscale="log", yscale="log", xlabel="negatives M", ylabel=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    size = f"A = {anchors:,} ({active:,} active)"
    figure.suptitle(f"loss and gradient, {size}, {labels} labels, {dtype}: {device}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
