"""What the runs of a table found: numbers beside the paper's, Markdown, a plot."""

from __future__ import annotations

import argparse
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from accuracy.outcome import paired
from accuracy.paper_tables import CAC, GPUS, NEGATIVES, PAPER, Row, Table
from accuracy.plan import is_alone
from accuracy.runs import val_curve, val_scores
from accuracy.table_plan import Cell, Run, all_rows, flags, is_done
from cac_fast.train.config import FREE, Config, unused
from cac_fast.train.distributed import World
from cac_fast.train.log import read_metrics
from cac_fast.train.registry import METHODS
from cac_fast.train.run_state import pick_precision
from cac_fast.train.settings import FIELDS
from cac_fast.train.weak.labels import FROM_MASKS
from lib.measure import can_plot

SETTLED = 20
"""Steps after which steps are timed."""
_NO_DIFFERENCE = frozenset(
    "dataset labeled_share data_list network backbone weights method warmup precision "
    "false_negatives seed deterministic".split()
)
"""Settings that are compared elsewhere, or change no score."""


def median_step_seconds(lines: list[dict], settings: Config) -> float | None:
    """Median seconds of a step from the lines of a metrics.jsonl: of those with unlabeled images,
    if the method sees any, after the first SETTLED; None if there are no such lines."""
    alone = is_alone(settings.loss.method)
    images = settings.optim.batch_size * (1 if alone else 2)
    first = SETTLED + (0 if alone else settings.num_warmup)
    train = [line for line in lines if line["kind"] == "train"]
    # A line is of the steps since the one before it.
    found = [
        images / line["images_per_s"]
        for before, line in pairwise(train)
        if before["iteration"] >= first
    ]
    return statistics.median(found) if found else None


def result_of(run: Run, options: argparse.Namespace) -> dict[str, Any] | None:
    """What a training that is over has found, from its metrics.jsonl; None of another one."""
    if run.settings is None or not is_done(run, options):
        return None
    lines = read_metrics(run.folder(options) / "metrics.jsonl")
    curve = val_curve(lines)
    memory = [line["peak_memory_mb"] for line in lines if line["kind"] == "train"]
    return {
        "folder": run.folder(options).name,
        "scores": val_scores(curve),
        "curve": curve,
        "step_s": median_step_seconds(lines, run.settings),
        "peak_memory_mb": max(memory, default=None),
    }


def _spread(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": sd, "values": values}


def summary_of(cell: Cell, results: dict[str, dict], seeds: list[int]) -> dict[str, Any]:
    """A cell's numbers, mIoU in percent, over the seeds that are there."""
    there = {seed: results[run.key] for seed, run in cell.runs.items() if run.key in results}
    steps = [found["step_s"] for found in there.values() if found["step_s"] is not None]
    memory = [found["peak_memory_mb"] for found in there.values()]
    return {
        "row": cell.row,
        "column": cell.column,
        "paper": cell.paper,
        "seeds": list(there),
        "folders": [found["folder"] for found in there.values()],
        "missing": [seed for seed in seeds if seed not in there],
        **{
            state: _spread([100 * found["scores"][f"val_{state}"] for found in there.values()])
            for state in ("last", "best")
        },
        "step_s": statistics.median(steps) if steps else None,
        "peak_memory_mb": max((item for item in memory if item is not None), default=None),
        "note": cell.note,
    }


def differences(table: Table, all_cells: list[Cell], options: argparse.Namespace) -> list[str]:
    """In which settings our runs differ from the paper's, and in which rows."""
    rows = {row.name: row for row in all_rows(table)}
    found: dict[str, list[str]] = {}
    for cell in all_cells:
        for run in cell.runs.values():
            assert run.settings is not None
            for text in _unlike(rows[cell.row], run.settings, table.dataset):
                found.setdefault(text, []).append(cell.row)
    trained = {cell.row for cell in all_cells if cell.runs}
    lines = []
    for text, names in found.items():
        where = "" if set(names) == trained else f" (rows {', '.join(dict.fromkeys(names))})"
        lines.append(text + where)
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    runs = [run.settings for cell in all_cells for run in cell.runs.values() if run.settings]
    if wrong := {pick_precision(settings, world) for settings in runs} - {"fp32"}:
        lines.append(f"precision: {', '.join(sorted(wrong))}, the paper states none")
    gpus = GPUS[table.dataset]
    lines.append(f"processes: 1, the paper's {gpus} GPUs, each with as many negatives")
    if table.weakly and options.image_labels == FROM_MASKS:
        lines.append("image labels: read from masks, those of unlabeled images among them")
    return [*lines, _lists_text(all_cells, options)]


def _unlike(row: Row, ours: Config, dataset: str) -> list[str]:
    wanted = {**PAPER[dataset], **row.network}
    if row.method == "cac":
        wanted |= {**NEGATIVES[dataset], **CAC}
    wanted |= row.own
    flat = ours.flat()
    lines = [
        f"{name}: {_text(flat[name])}, the paper's {_text(value)}"
        for name, value in wanted.items()
        if flat[name] != value
    ]
    preset = METHODS.entry(ours.loss.method).preset_for(flat)
    lines += [
        f"{name}: {_text(value)}, the default is {_text(FIELDS[name].default, 'None')}"
        for name, value in flat.items()
        if name not in {*wanted, *_NO_DIFFERENCE, *FREE, *_unread(ours)}
        and value not in (FIELDS[name].default, preset.get(name))
    ]
    lines += _warmup_lines(ours, preset.get("warmup"))
    if ours.model.weights is None:
        lines.append("weights: random, the paper's ImageNet")
    return lines


def _unread(ours: Config) -> set[str]:
    """Settings that the method of a run does not read."""
    method = ours.loss.method
    # A row's teacher is no setting of its run, and what the data's preset sets may be unread too.
    asked = ours.changed(teacher="the row's", dataset="folder")
    given = {flag.split()[0] for flag in unused(asked)}
    found = {name for name, value in vars(ours.loss).items() if flags({name: value})[0] in given}
    if method == "supervised":
        found |= vars(ours.loss).keys()
    if is_alone(method):
        found |= {"unlabeled_scale", "iou_range"}
    uses = METHODS.entry(method).uses
    if uses is not None and "context" not in uses.split():
        found.add("iou_range")
    return found


def _warmup_lines(ours: Config, preset: int | None) -> list[str]:
    """What to say of the iterations before the unlabeled images take part; preset: the method's,
    None where it has none."""
    sixteenth = ours.optim.iterations // 16
    if is_alone(ours.loss.method) or ours.num_warmup == (sixteenth if preset is None else preset):
        return []
    if preset is not None:
        return [f"warmup: {ours.num_warmup}, the method's preset is {preset}"]
    whose = "the paper's" if ours.loss.method == "cac" else "the default is"
    return [f"warmup: {ours.num_warmup}, {whose} 1/16 of the iterations"]


def _text(value: Any, none: str = "all") -> str:
    """A value as the options take it, but for None."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return none if value is None else str(value)


def _lists_text(all_cells: list[Cell], options: argparse.Namespace) -> str:
    if options.lists is not None:
        # Of a pattern the folder around all lists too, as `{list}` alone names nothing.
        parts = Path(options.lists).parts
        braces = [index for index, part in enumerate(parts) if "{" in part]
        first = min(braces, default=len(parts))
        return f"lists: {Path(*parts[max(0, first - 1) :])} of the call"
    runs = [run.settings for cell in all_cells for run in cell.runs.values() if run.settings]
    if any(settings.data.labeled is not None for settings in runs):
        return "lists: those that --labeled names"
    if any(settings.data.labeled_share is not None for settings in runs):
        return "lists: derived by --labeled-share and --data-list, not the paper's"
    return "lists: the data's own"


def orderings(table: Table, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a table of one column: the paper's neighbors in its ranking, and our difference between
    them, paired by seed, in points of the last state. Two rows with the same runs are none."""
    if len(table.columns) > 1:
        return []
    ranked = sorted(
        (row for row in rows if row["paper"] is not None), key=lambda row: -row["paper"]
    )
    found = []
    for above, below in pairwise(ranked):
        if above["folders"] == below["folders"]:
            continue
        one, other = (
            dict(zip(row["seeds"], row["last"]["values"], strict=True)) if row["last"] else {}
            for row in (below, above)
        )
        difference = paired(one, other)
        if difference["seeds"]:
            names = {"above": above["row"], "below": below["row"]}
            found.append({**names, "paper": above["paper"] - below["paper"], **difference})
    return found


def _points(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return "-"
    return f"{spread['mean']:.1f}" + ("" if spread["sd"] is None else f" ± {spread['sd']:.1f}")


def _seeds(row: dict[str, Any]) -> str:
    if not row["seeds"]:
        return "-"
    count = len(row["seeds"])
    return f"{count}, lacks {','.join(map(str, row['missing']))}" if row["missing"] else str(count)


def markdown(number: int, table: Table, record: dict[str, Any]) -> str:
    """The table with the paper's number beside each of ours, and what differs below it."""
    other = record["data"] != table.dataset
    head = f"paper ({table.dataset}, other data)" if other else "paper"
    columns = ["row", "column", head, "ours, last", "ours, best", "n"]
    columns += ["s a step", "MB"] if number == 4 else []
    lines = ["| " + " | ".join([*columns, "note"]) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in record["cells"]:
        cells = [row["row"], row["column"], "-" if row["paper"] is None else f"{row['paper']:.1f}"]
        cells += [_points(row["last"]), _points(row["best"]), _seeds(row)]
        if number == 4:
            step, memory = row["step_s"], row["peak_memory_mb"]
            cells.append("-" if step is None else f"{step:.3f}")
            cells.append("-" if memory is None else f"{memory:.0f}")
        lines.append("| " + " | ".join([*cells, row["note"]]) + " |")
    where = "other data than the paper's" if other else "the paper's data"
    parts = [
        f"# {table.caption}",
        f"Ours: {record['title']}, {where}. mIoU on val in percent, one scale: mean ± standard "
        "deviation over n seeds, of the last state and of the best one on val.",
        "\n".join(lines),
    ]
    if record["orderings"]:
        heads = "| pair | paper | ours, last | seeds |\n|---|---|---|---|"
        pairs = [
            f"| {item['above']} - {item['below']} | {item['paper']:+.1f} | {item['mean']:+.1f}"
            + (f" ± {item['standard_error']:.1f}" if item["standard_error"] is not None else "")
            + f" | {item['seeds']} |"
            for item in record["orderings"]
        ]
        parts.append("Neighbors in the paper's ranking, ± standard error of the paired difference:")
        parts.append("\n".join([heads, *pairs]))
    parts.append("Settings that differ from the paper's:")
    parts.append("\n".join(f"- {line}" for line in record["differences"]))
    parts.append("\n".join(f"- {note}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def plot(number: int, record: dict[str, Any], path: Path) -> None:
    """Our mIoU with its standard deviation and the paper's; of Table 4 time and memory too."""
    rows = [row for row in record["cells"] if row["last"] is not None]
    if not rows or not can_plot():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    extra = {"step_s": "s a step", "peak_memory_mb": "peak memory, MB"} if number == 4 else {}
    width = max(6.0, 0.6 * len(rows))
    figure, axes = pyplot.subplots(
        1 + len(extra), 1, figsize=(width, 4 + 2 * len(extra)), squeeze=False, layout="constrained"
    )
    places = range(len(rows))
    names = [f"{row['row']} {row['column']}".removesuffix(" mIoU") for row in rows]
    means = [row["last"]["mean"] for row in rows]
    spreads = [row["last"]["sd"] or 0.0 for row in rows]
    axis = axes[0, 0]
    axis.bar(places, means, yerr=spreads, capsize=3, color="tab:blue", label="ours, last state")
    theirs = [(place, row["paper"]) for place, row in enumerate(rows) if row["paper"] is not None]
    other = "" if record["data"] == record["paper_data"] else " (other data)"
    if theirs:
        axis.plot(*zip(*theirs, strict=True), "D", color="tab:orange", label=f"paper{other}")
    axis.set(ylabel="val mIoU, percent", title=record["title"])
    axis.legend()
    for axis, (name, label) in zip(axes[1:, 0], extra.items(), strict=True):
        known = [(place, row[name]) for place, row in enumerate(rows) if row[name] is not None]
        if known:
            axis.plot(*zip(*known, strict=True), "o-", color="tab:gray")
        axis.set(ylabel=label)
    for axis in axes[:, 0]:
        axis.set_xticks(places, names, rotation=30, ha="right")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
