"""What a comparison found: tables, paired differences, a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy.arms import ARMS
from lib.measure import can_plot

LEAST_HEADROOM = 4.0
"""Points of mIoU that all masks must gain, and standard errors of it, before unlabeled images can
be expected to gain anything that a few seeds tell."""
LEAST_ERRORS = 3.0
KNOWN_IOU = 0.1
"""A class that supervised training leaves below this IoU is one that pseudo labels do not hold."""


def gain_name(arm: str) -> str:
    """What a row of the summary calls an arm's difference from supervised."""
    return {"supervised_all": "headroom", "cac": "gain"}.get(arm, f"{arm}_gain")


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
        for method in ARMS:
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
    """Mean of `other` minus `one` over the seeds that both have, with its standard error.

    `mean` is None without such a seed, `standard_error` with fewer than two.
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
    """What every arm gains over supervised: points by arm and seed.

    Of CAC `gain`, `gain_standard_error` and `seeds`, of all masks `headroom` and so on, of
    any other arm `NAME_gain` and so on. `share_of_headroom` is CAC's. `informative` says whether
    the headroom is LEAST_HEADROOM points and LEAST_ERRORS standard errors; None as long as two
    seeds do not tell.
    """
    found: dict[str, Any] = {}
    for arm in list(ARMS)[1:]:
        gain, name = paired(points.get("supervised", {}), points.get(arm, {})), gain_name(arm)
        found[name] = gain["mean"]
        found[f"{name}_standard_error"] = gain["standard_error"]
        found[f"{name}_seeds".replace("gain_", "")] = gain["seeds"]
    room, error = found["headroom"], found["headroom_standard_error"]
    informative = None
    if room is not None and room < LEAST_HEADROOM:
        informative = False
    elif error is not None:
        informative = room >= LEAST_ERRORS * error
    return found | {"informative": informative, "share_of_headroom": headroom_share(points, "cac")}


def headroom_share(points: Mapping[str, dict[int, float]], arm: str) -> float | None:
    """An arm's gain over supervised, as a share of that of all masks, over the seeds that the three
    have; None without such a seed, or if all masks gain nothing."""
    three = [points.get(name, {}) for name in ("supervised", "supervised_all", arm)]
    seeds = set.intersection(*map(set, three))
    base, room, other = (sum(each[seed] for seed in seeds) for each in three)
    return (other - base) / (room - base) if room > base else None


def summarize(results: list[dict], data: str, scored_on: str) -> list[dict[str, Any]]:
    """A row for each setting: paired differences in points of mIoU on `scored_on`.

    The row itself is of the last state, `best` of the best state on val; each is over all
    classes, and its `known` over those that supervised training knows. Runs of a record that were
    scored on something else, or without the classes' IoU, are left out.
    """
    rows = []
    for share in dict.fromkeys(result["share"] for result in results):
        arms = {arm: runs for arm in ARMS if (runs := chosen(results, share, arm))}
        last, best = (_of_state(arms, f"{scored_on}_{state}") for state in ("last", "best"))
        rows.append({"setting": f"{data} {share}", "scored_on": scored_on, **last, "best": best})
    return rows


def _of_state(arms: dict[str, list[dict]], column: str) -> dict[str, Any]:
    found = differences(
        {
            arm: {r["seed"]: 100 * r["scores"][column] for r in runs if column in r["scores"]}
            for arm, runs in arms.items()
        }
    )
    scored = all(column in run.get("iou", {}) for runs in arms.values() for run in runs)
    if "supervised" in arms and scored:
        known = known_classes(arms["supervised"], column)
        means = {
            arm: {run["seed"]: 100 * _mean(run["iou"][column], known) for run in runs}
            for arm, runs in arms.items()
            if known
        }
        found["known"] = {"classes": known} | differences(means)
    return found


def _mean(ious: list[float | None], classes: list[int]) -> float:
    return statistics.mean(ious[index] or 0.0 for index in classes)


def summary_table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown: mean ± standard error of the paired differences, in points."""
    # The three that every table has, then further arms that have run.
    names = ["headroom", "control_gain", "gain"]
    further = [name for name in map(gain_name, list(ARMS)[1:]) if name not in names]
    names += [name for name in further if any(row[name] is not None for row in rows)]
    heads = [name.replace("_gain", "") for name in names]
    columns = ["setting", "scored on", *heads, "of the headroom", "seeds", ""]
    lines = ["| " + " | ".join(columns).rstrip() + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [cell(row[name], row[f"{name}_standard_error"]) for name in names]
        share = row["share_of_headroom"]
        counts = {name: row[f"{name}_seeds".replace("gain_", "")] for name in names}
        other = [
            f"{head} {count}"
            for head, count in zip(heads, counts.values(), strict=True)
            if count not in (0, row["seeds"])
        ]
        seeds = f"{row['seeds']} ({', '.join(other)})" if other else str(row["seeds"])
        cells += ["" if share is None else f"{100 * share:.0f} %", seeds]
        unknown = "no headroom yet" if row["headroom"] is None else "one seed: not judged"
        says = {True: "", False: "not informative", None: unknown}
        cells = [row["setting"], row["scored_on"], *cells, says[row["informative"]]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(results: list[dict], summary: list[dict[str, Any]]) -> str:
    """The table, and the summary where the headroom has been measured."""
    tables = [table(results)]
    if any(row["headroom"] is not None for row in summary):
        tables.append(summary_table(summary))
    return "\n\n".join(tables)


def cell(mean: float | None, error: float | None) -> str:
    """A difference with its standard error, as far as they are known."""
    if mean is None:
        return ""
    return f"{mean:+.1f}" + ("" if error is None else f" ± {error:.1f}")


def panel_title(share: str) -> str:
    """What a panel of this setting is called."""
    if share == "lists":
        return "labeled by list"
    return f"{share} labeled" if "/" in share else f"labeled by list: {share}"


def draw(
    axis: Any,
    results: list[dict],
    share: str,
    place: Callable[[str, int], float] = lambda method, step: step,
    faint: float = 0.3,
) -> None:
    """The curves of one setting: a thin line a run, a thick one for each arm's mean.

    axis: matplotlib's. place: where an arm's iteration lies on the x axis. faint: opacity of the
        thin lines.
    """
    for method, arm in ARMS.items():
        curves = [item["curve"] for item in chosen(results, share, method)]
        if not curves:
            continue
        for curve in curves:
            steps, values = zip(*curve, strict=True)
            where = [place(method, step) for step in steps]
            axis.plot(where, values, **line(values), color=arm.color, alpha=faint, linewidth=1)
        # Runs may have been validated at other iterations, or not be over.
        points = [dict(curve) for curve in curves]
        iterations = sorted(set.intersection(*map(set, points)))
        mean = [statistics.mean(run[step] for run in points) for step in iterations]
        where = [place(method, step) for step in iterations]
        label = f"{method} (mean of {len(curves)})"
        axis.plot(where, mean, **line(mean), color=arm.color, label=label)


def line(values: Sequence[float]) -> dict[str, str]:
    """How matplotlib draws a curve: one of a single point would not be seen without a marker."""
    return {"marker": "o"} if len(values) == 1 else {}


def plot(results: list[dict], path: Path) -> None:
    """Validation mIoU against the iteration: a thin line a run, a thick one for the mean."""
    if not can_plot():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = list(dict.fromkeys(result["share"] for result in results))
    figure, axes = pyplot.subplots(
        1, len(shares), figsize=(8 * len(shares), 4), squeeze=False, layout="constrained"
    )
    for axis, share in zip(axes[0], shares, strict=True):
        draw(axis, results, share)
        axis.set(title=panel_title(share), xlabel="iteration", ylabel="val mIoU")
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside what it would hide
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
