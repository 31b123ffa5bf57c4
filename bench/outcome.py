"""What a comparison found, and of which experiment: tables, paired differences, a plot."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

from measure import can_plot

from cac_fast.train.config import Config
from cac_fast.train.data.layouts import SegmentationData
from cac_fast.train.registry import LAYOUTS

COLORS = {
    "supervised": "tab:gray",
    "supervised_all": "tab:green",
    "control": "tab:orange",
    "cac": "tab:blue",
}
"""Of each arm, in the order they run in: cheap ones first."""

LEAST_HEADROOM = 4.0
"""Points of mIoU that all masks must gain, and standard errors of it, before unlabeled images can
be expected to gain anything that a few seeds tell."""
LEAST_ERRORS = 3.0
KNOWN_IOU = 0.1
"""A class that supervised training leaves below this IoU is one that pseudo labels do not hold."""


def content_digests(data: SegmentationData, files: dict[str, list[Path]]) -> dict[str, str]:
    """Short hashes of what the runs of one record share, wherever it lies.

    Of the names of the data's classes, images and masks, and of each entry of ``files``.
    """

    def short(*texts: str) -> str:
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]

    images = [
        (split, [(item.name, item.mask is not None) for item in samples])
        for split, samples in sorted(data.splits.items())
    ]
    found = {"names of images and classes": short(repr((data.classes, images)))}
    return found | {key: short(*(p.read_text() for p in paths)) for key, paths in files.items()}


def unlike(here: Namespace, settings: Config, there: Namespace, former: Config) -> list[str]:
    """Data, lists and lengths in which a call of ``compare.py`` differs from a former one.

    ``here`` and ``there`` are the options before ``--``, the others those behind it.
    """
    pairs: dict[str, tuple[Any, Any]] = {
        "--shrink": (here.shrink, there.shrink),
        "--data-dir": (_data_folder(here), _data_folder(there)),
    }
    pairs |= {
        name: (getattr(settings, name), getattr(former, name))
        for name in ("iterations", "labeled", "unlabeled")
    }
    for name, paths in (("lists", _lists_by_share), ("names", _names_by_part)):
        one, other = paths(here), paths(there)
        pairs |= {f"--{name} {key}": (one[key], other[key]) for key in one if key in other}
    return [
        f"{name}: {former!s} there, {now!s} here"
        for name, (now, former) in pairs.items()
        if now != former and not _may_be_one(now, former)
    ]


def _data_folder(options: Namespace) -> str | None:
    return options.data_dir or LAYOUTS.entry(options.dataset).made_in


def _lists_by_share(options: Namespace) -> dict[str, str | None]:
    if options.lists is not None:
        return {Path(options.lists).name: options.lists}
    return dict.fromkeys(options.shares.split(","))


def _names_by_part(options: Namespace) -> dict[str, str]:
    return {path.stem: str(path) for path in options.names}


def _may_be_one(one: Any, other: Any) -> bool:
    # Records keep of a path what lies in the project, and of others the last part.
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    parts = [
        [part for part in Path(os.path.normpath(path)).parts if part not in ("..", os.sep)]
        for path in (one, other)
    ]
    length = min(map(len, parts))
    return length == 0 or parts[0][-length:] == parts[1][-length:]


def chosen(results: list[dict], share: str, method: str) -> list[dict]:
    """The runs of one arm in one setting."""
    return [item for item in results if item["share"] == share and item["method"] == method]


def table(results: list[dict]) -> str:
    """Mean and spread over the seeds in points of mIoU, and CAC's gain, as Markdown.

    The gain is left out as long as the two methods have not run with the same seeds.
    """
    columns = [name for name in results[0]["scores"] if all(name in r["scores"] for r in results)]
    rows = ["| share | method | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for share in dict.fromkeys(result["share"] for result in results):
        means: dict[str, list[float]] = {}
        seeds = {}
        for method in COLORS:
            runs = chosen(results, share, method)
            if not runs:
                continue
            seeds[method] = {item["seed"] for item in runs}
            cells = []
            means[method] = []
            for column in columns:
                values = [100 * item["scores"][column] for item in runs]
                means[method].append(statistics.mean(values))
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{means[method][-1]:.1f}{spread}")
            rows.append(f"| {share} | {method} | " + " | ".join(cells) + " |")
        if "cac" in seeds and seeds["cac"] == seeds.get("supervised"):
            gains = [
                f"{b - a:+.1f}" for a, b in zip(means["supervised"], means["cac"], strict=True)
            ]
            rows.append(f"| {share} | gain | " + " | ".join(gains) + " |")
    return "\n".join(rows)


def paired(one: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    """Mean of ``other`` minus ``one`` over the seeds that both have, with its standard error.

    ``mean`` is None without such a seed, ``standard_error`` with fewer than two.
    """
    differences = [other[seed] - one[seed] for seed in sorted(one.keys() & other.keys())]
    count = len(differences)
    return {
        "seeds": count,
        "mean": statistics.mean(differences) if count else None,
        "standard_error": statistics.stdev(differences) / math.sqrt(count) if count > 1 else None,
    }


def known_classes(runs: list[dict], column: str) -> list[int]:
    """Classes whose IoU, over the seeds of supervised training, is above KNOWN_IOU in the mean."""
    by_class = zip(*(run["iou"][column] for run in runs), strict=True)
    return [
        index
        for index, ious in enumerate(by_class)
        if None not in ious and statistics.mean(ious) > KNOWN_IOU
    ]


def differences(points: dict[str, dict[int, float]]) -> dict[str, Any]:
    """What all masks, the control and CAC gain over supervised: points by arm and seed.

    ``informative`` says whether the headroom is LEAST_HEADROOM points and LEAST_ERRORS standard
    errors; None as long as two seeds do not tell.
    """
    empty: dict[int, float] = {}
    base = points.get("supervised", empty)
    headroom, control, gain = (
        paired(base, points.get(arm, empty)) for arm in ("supervised_all", "control", "cac")
    )
    room, error = headroom["mean"], headroom["standard_error"]
    informative = None
    if room is not None and room < LEAST_HEADROOM:
        informative = False
    elif error is not None:
        informative = room >= LEAST_ERRORS * error
    share = None
    if room is not None and room > 0 and gain["mean"] is not None:
        share = gain["mean"] / room
    return {
        "seeds": gain["seeds"],
        "headroom": room,
        "headroom_standard_error": error,
        "headroom_seeds": headroom["seeds"],
        "informative": informative,
        "gain": gain["mean"],
        "gain_standard_error": gain["standard_error"],
        "control_gain": control["mean"],
        "control_gain_standard_error": control["standard_error"],
        "control_seeds": control["seeds"],
        "share_of_headroom": share,
    }


def summarize(results: list[dict], data: str, scored_on: str) -> list[dict[str, Any]]:
    """A row for each setting: paired differences in points of mIoU on ``scored_on``.

    The row itself is of the last state over all classes; ``best`` is of the best state on val,
    ``known`` of the last state over the classes that supervised training knows. Runs of a record
    that were scored on something else, or without the classes' IoU, are left out.
    """
    rows = []
    for share in dict.fromkeys(result["share"] for result in results):
        arms = {arm: runs for arm in COLORS if (runs := chosen(results, share, arm))}

        def points(column: str, arms: dict[str, list[dict]] = arms) -> dict[str, Any]:
            scores = {
                arm: {r["seed"]: 100 * r["scores"][column] for r in runs if column in r["scores"]}
                for arm, runs in arms.items()
            }
            return differences(scores)

        row = {"setting": f"{data} {share}", "scored_on": scored_on}
        row |= points(f"{scored_on}_last") | {"best": points(f"{scored_on}_best")}
        column = f"{scored_on}_last"
        scored = all(column in run.get("iou", {}) for runs in arms.values() for run in runs)
        if "supervised" in arms and scored:
            known = known_classes(arms["supervised"], column)
            means = {
                arm: {run["seed"]: 100 * _mean(run["iou"][column], known) for run in runs}
                for arm, runs in arms.items()
                if known
            }
            row["known"] = {"classes": known} | differences(means)
        rows.append(row)
    return rows


def _mean(ious: list[float | None], classes: list[int]) -> float:
    return statistics.mean(ious[index] or 0.0 for index in classes)


def summary_table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown: mean ± standard error of the paired differences, in points."""
    lines = [
        "| setting | scored on | headroom | control | gain | of the headroom | seeds | |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        cells = [
            _cell(row[name], row[f"{name}_standard_error"])
            for name in ("headroom", "control_gain", "gain")
        ]
        share = row["share_of_headroom"]
        cells += ["" if share is None else f"{100 * share:.0f} %", str(row["seeds"])]
        says = {True: "", False: "not informative", None: "headroom not known yet"}
        names = [row["setting"], row["scored_on"]]
        lines.append("| " + " | ".join([*names, *cells, says[row["informative"]]]) + " |")
    return "\n".join(lines)


def report(results: list[dict], summary: list[dict[str, Any]]) -> str:
    """The table, and the summary where the headroom has been measured."""
    tables = [table(results)]
    if any(row["headroom"] is not None for row in summary):
        tables.append(summary_table(summary))
    return "\n\n".join(tables)


def _cell(mean: float | None, error: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:+.1f}" + ("" if error is None else f" ± {error:.1f}")


def plot(results: list[dict], path: Path) -> None:
    """Validation mIoU against the iteration: a thin line a run, a thick one for the mean."""
    if not can_plot():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = list(dict.fromkeys(result["share"] for result in results))
    figure, axes = pyplot.subplots(
        1, len(shares), figsize=(6 * len(shares), 4), squeeze=False, layout="constrained"
    )
    for axis, share in zip(axes[0], shares, strict=True):
        for method, color in COLORS.items():
            curves = [item["curve"] for item in chosen(results, share, method)]
            if not curves:
                continue
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=color, alpha=0.3, linewidth=1)
            # Runs may have been validated at other iterations, or not be over.
            points = [dict(curve) for curve in curves]
            iterations = sorted(set.intersection(*map(set, points)))
            mean = [statistics.mean(run[step] for run in points) for step in iterations]
            axis.plot(iterations, mean, color=color, label=f"{method} (mean of {len(curves)})")
        title = f"{share} labeled" if "/" in share else f"labeled by list: {share}"
        axis.set(
            title="labeled by list" if share == "lists" else title,
            xlabel="iteration",
            ylabel="val mIoU",
        )
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
