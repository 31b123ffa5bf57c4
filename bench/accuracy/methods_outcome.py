"""Methods compared: the score after equal steps and after equal time, and the cost of each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accuracy.arms import ARMS, footnote
from accuracy.outcome import cell, chosen, draw, headroom_share, paired, panel_title
from accuracy.pace import Pace, val_at
from accuracy.runs import Job
from lib.measure import can_plot

TWO_METHODS = frozenset(
    ("supervised", "supervised_all", "supervised_adapted", "control", "cac", "cac_adapted")
)
"""Arms that the summary is enough for."""
SORTED = {"steps": "gain", "time": "gain_at_equal_time"}
"""What each choice of `--sort-by` sorts the rows by."""
LEGEND = """\
Sorted by the gain after equal {of}. Gain: mean ± standard error of the paired difference from
supervised in points of mIoU, last states, after equal steps. mIoU: of the last states. Of the
headroom: of what the masks of all images gain. Cost: hours of a run over those of supervised,
planned from ten measured steps of each, without evaluations; that of a method with a teacher
includes the teacher's run, and an adapted arm costs what its run does. At equal time: val mIoU
when a run has used the hours of a whole supervised run, on a line between evaluations, and its
paired difference from the end of supervised. The learning rate has not decayed by then. It is empty
where no evaluation came before, as where the teacher took all of the time."""


def rank(
    results: list[dict],
    data: str,
    scored_on: str,
    paces: Mapping[str, Pace],
    missing: Sequence[Job],
    sort_by: str = "steps",
) -> list[dict[str, Any]]:
    """A row for each setting and method, the best gain of a setting first; all in points of mIoU.

    Empty where there is no other method than those of the summary. paces: of the arms whose hours
    are known. missing: runs that are asked for and have no result. sort_by: a key of SORTED.
    """
    there = {run["method"] for run in results} | {arm for arm, _, _ in missing}
    if there <= TWO_METHODS:
        return []
    shares = dict.fromkeys([*(r["share"] for r in results), *(share for _, share, _ in missing)])
    rows = []
    for share in shares:
        left = [arm for arm, of_job, _ in missing if of_job == share]
        runs = {arm: chosen(results, share, arm) for arm in ARMS}
        reference = runs["supervised"]
        points = {arm: _last(runs[arm], scored_on) for arm in ARMS}
        of_share = [
            {
                "method": arm,
                "setting": f"{data} {share}",
                "scored_on": scored_on,
                **_equal_steps(arm, points),
                **_equal_time(runs[arm], reference, paces.get(arm), paces.get("supervised")),
                "missing_seeds": left.count(arm),
            }
            for arm in ARMS
            if arm != "supervised_all" and (runs[arm] or arm in left)
        ]
        rows += sorted(of_share, key=partial(_place, by=SORTED[sort_by]))
    return rows


def _place(row: dict[str, Any], by: str) -> tuple[bool, float]:
    gain = 0.0 if row["method"] == "supervised" else row[by]
    return gain is None, 0.0 if gain is None else -gain


def _last(runs: list[dict], scored_on: str) -> dict[int, float]:
    column = f"{scored_on}_last"
    return {run["seed"]: 100 * run["scores"][column] for run in runs if column in run["scores"]}


def _equal_steps(arm: str, points: Mapping[str, dict[int, float]]) -> dict[str, Any]:
    of_arm, reference = points[arm], arm == "supervised"
    gain = paired(points["supervised"], of_arm)
    if reference:
        gain |= {"mean": None, "standard_error": None}
    return {
        "mean": statistics.mean(of_arm.values()) if of_arm else None,
        "gain": gain["mean"],
        "gain_standard_error": gain["standard_error"],
        "share_of_headroom": None if reference else headroom_share(points, arm),
        "seeds": gain["seeds"],
    }


def _equal_time(
    runs: list[dict], reference: list[dict], pace: Pace | None, alone: Pace | None
) -> dict[str, Any]:
    if pace is None or alone is None:
        names = "cost planned_hours val_at_equal_time gain_at_equal_time"
        return dict.fromkeys([*names.split(), "gain_at_equal_time_standard_error"])
    points = {}
    for run in runs:
        value = val_at(run["curve"], pace.iteration_at(alone.hours[-1]))
        if value is not None:
            points[run["seed"]] = 100 * value
    ends = {run["seed"]: 100 * run["curve"][-1][1] for run in reference}
    gain = paired(ends, points)
    if runs is reference:
        gain = dict.fromkeys(gain)
    return {
        "cost": pace.hours[-1] / alone.hours[-1],
        "planned_hours": pace.hours[-1] - pace.hours[0],
        "val_at_equal_time": statistics.mean(points.values()) if points else None,
        "gain_at_equal_time": gain["mean"],
        "gain_at_equal_time_standard_error": gain["standard_error"],
    }


def methods_table(rows: list[dict[str, Any]], sort_by: str = "steps") -> str:
    """The rows as Markdown, with the legend. sort_by: what they are sorted by, a key of SORTED."""
    heads = ["setting", "method", f"mIoU on {rows[0]['scored_on']}", "gain", "of the headroom"]
    heads += ["seeds", "cost", "val at equal time", "gain then", "to do"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        share, cost = row["share_of_headroom"], row["cost"]
        then = row["gain_at_equal_time"], row["gain_at_equal_time_standard_error"]
        cells = [
            row["setting"],
            row["method"],
            _number(row["mean"]),
            cell(row["gain"], row["gain_standard_error"]),
            "" if share is None else f"{100 * share:.0f} %",
            str(row["seeds"] or ""),
            "" if cost is None else f"{cost:.2f}",
            _number(row["val_at_equal_time"]),
            cell(*then),
            _to_do(row["missing_seeds"], row["planned_hours"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = footnote(row["method"] for row in rows)
    return "\n".join(lines) + f"\n\n{LEGEND.format(of=sort_by)}{note}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _to_do(count: int, hours: float | None) -> str:
    if not count:
        return ""
    runs = f"{count} run{'s' if count > 1 else ''}"
    return runs if hours is None else f"{runs}, {count * hours:.2f} h"


def to_do(missing: Sequence[Job], paces: Mapping[str, Pace]) -> str:
    """A line on runs that are asked for and have no result, with the hours that are left; empty if
    there is none."""
    parts = []
    for arm in dict.fromkeys(arm for arm, _, _ in missing):
        count, pace = sum(job[0] == arm for job in missing), paces.get(arm)
        hours = None if pace is None else pace.hours[-1] - pace.hours[0]
        parts.append(f"{arm} {_to_do(count, hours)}")
    return f"To do: {'; '.join(parts)}." if parts else ""


def plot_methods(results: list[dict], path: Path, paces: Mapping[str, Pace]) -> None:
    """Validation mIoU against the iteration, and beside it against the hours; a row a setting.

    The dotted line is where a whole supervised run ends.
    """
    if not can_plot():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = list(dict.fromkeys(result["share"] for result in results))
    figure, axes = pyplot.subplots(
        len(shares), 2, figsize=(15, 5 * len(shares)), squeeze=False, layout="constrained"
    )
    timed = [result for result in results if result["method"] in paces]
    for (left, right), share in zip(axes, shares, strict=True):
        draw(left, results, share, faint=0.12)
        draw(right, timed, share, lambda arm, step: paces[arm].hours_at(step), faint=0.12)
        left.set(title=panel_title(share), xlabel="iteration", ylabel="val mIoU")
        right.set(xlabel="hours, planned from ten steps, without evaluations")
        if "supervised" in paces:
            right.axvline(paces["supervised"].hours[-1], color="black", linestyle=":", linewidth=1)
        handles, labels = left.get_legend_handles_labels()
        ends = [[0.0, *handle.get_ydata()][-1] for handle in handles]
        order = sorted(range(len(handles)), key=lambda place: -ends[place])
        right.legend(
            [handles[place] for place in order],
            [labels[place] for place in order],
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
        )
        for axis in (left, right):
            axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
