"""The parts of the page that tell classes apart: IoU of each, and what is taken for what."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from cac_fast.train.reporting.charts import bar
from cac_fast.train.reporting.gather import Run, number
from cac_fast.train.reporting.sections import section, swatch
from cac_fast.train.reporting.text import cell, escape, head, table

MOST_CLASSES = 40
"""Above them no matrix is shown but as many pairs of classes."""

_MIOU = (
    "mIoU is of the set, not a mean over images: one confusion matrix over all val images gives "
    "the IoU of each class, and mIoU is the mean of those. A class that occurs neither in a mask "
    "nor in a prediction has no IoU: it shows - and is not in the mean."
)


def with_same_classes(runs: Sequence[Run]) -> list[list[int]]:
    """Places of the runs, those with the same classes together."""
    found: dict[tuple[str, ...], list[int]] = {}
    for place, run in enumerate(runs):
        found.setdefault(run.classes, []).append(place)
    return list(found.values())


def iou(runs: Sequence[Run]) -> str:
    """IoU of each class at the best evaluation; a table for each set of classes."""
    groups = [group for group in with_same_classes(runs) if any(runs[place].iou for place in group)]
    if not groups:
        text = '<p class="nothing">No run folder holds the IoU of classes.</p>'
        return section("classes", "IoU of each class", text)
    content = f'<p class="note">Of the best evaluation of each run. {_MIOU}</p>'
    if len(groups) > 1:
        content += (
            '<p class="note">The runs have different classes: those with the same ones share a '
            "table, and a mIoU compares only within it.</p>"
        )
    return section("classes", "IoU of each class", content + "".join(_iou(runs, g) for g in groups))


def _iou(runs: Sequence[Run], group: Sequence[int]) -> str:
    classes, first = runs[group[0]].classes, group[0]
    heads = ["class"]
    for place in group:
        heads.append(f"IoU, {runs[place].name}" if len(runs) > 1 else "IoU")
        if place != first:
            heads.append("difference to the first")
    scored = next((runs[place].scored for place in group if runs[place].scored), None)
    shares = None
    if scored is not None:
        heads.append("share of the pixels")
        shares = (scored.counts.sum(1) / scored.counts.sum()).tolist()
    values = {place: runs[place].iou or [None] * len(classes) for place in group}
    rows = []
    for index, name in enumerate(classes):
        row = f'<th scope="row">{escape(name)}</th>'
        for place in group:
            value = values[place][index]
            row += _with_bar(value, place, name)
            if place != first:
                row += _difference(value, values[first][index])
        rows.append(row + (cell(shares[index], ".2%") if shares else ""))
    foot = "".join(
        f'<tr><th scope="row">{text}</th>{_totals(runs, group, key)}'
        f"{'<td></td>' * bool(shares)}</tr>"
        for key, text in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy"))
    )
    names = [runs[place].name for place in group]
    lines = [
        (name, *(values[place][index] for place in group)) for index, name in enumerate(classes)
    ]
    lines.append(("mIoU", *((runs[place].best or {}).get("miou") for place in group)))
    return table(head(heads), rows, foot=foot, kind="iou") + copyable(
        "IoU as CSV, to copy", [("class", *names), *lines]
    )


def _with_bar(value: float | None, place: int, name: str) -> str:
    return cell(value, name="iou").replace("</td>", f"{bar(value, place)}</td>")


def _totals(runs: Sequence[Run], group: Sequence[int], key: str) -> str:
    values = [(runs[place].best or {}).get(key) for place in group]
    return cell(values[0]) + "".join(
        cell(value) + _difference(value, values[0]) for value in values[1:]
    )


def _difference(value: float | None, first: float | None) -> str:
    if number(value) is None or number(first) is None:
        return cell(None)
    difference = value - first
    kind = "up" if difference > 0 else "down" if difference < 0 else "same"
    return cell(difference, "+.4f").replace('"number"', f'"number {kind}"', 1)


def copyable(title: str, rows: Sequence[Sequence[object]]) -> str:
    """Rows as CSV in a folded text field, with a button where scripts run."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(
        ["" if item is None else item for item in row] for row in rows
    )
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<textarea class="csv" readonly rows="{min(12, len(rows) + 1)}" spellcheck="false" '
        f'aria-label="{escape(title)}">{escape(file.getvalue())}</textarea>'
        '<button type="button" class="copy" hidden>Copy</button></details>'
    )


def confusion(runs: Sequence[Run]) -> str:
    """The confusion matrix of each run, or its most confused pairs."""
    parts = [_confusion(place, run) for place, run in enumerate(runs) if run.scored is not None]
    content = f'<div class="matrices">{"".join(parts)}</div>'
    if not parts:
        content = (
            '<p class="nothing">No network could be run over its val images: the cards above say '
            "why.</p>"
        )
    return section("confusion", "Confusion matrix", content)


def _confusion(place: int, run: Run) -> str:
    scored = run.scored
    measured = (
        f"{escape(scored.file)} over {len(scored.samples)} val images, in float32: mIoU of the set "
        f"{scored.miou:.4f}, mean over images of the image's mIoU {scored.mean_over_images:.4f}."
    )
    if len(run.classes) > MOST_CLASSES:
        text = f"The {MOST_CLASSES} pairs of classes that share the most wrong pixels. {measured}"
        body = _pairs(run)
    else:
        text = (
            "A row is a true class; its cells say which percentage of the class's pixels is "
            f"predicted as what. Empty: below half a percent. {measured}"
        )
        body = _matrix(run)
    title = f"<h3>{swatch(place)}{escape(run.name)}</h3>"
    return f'<div>{title}{body}<p class="note">{text}</p></div>'


def _matrix(run: Run) -> str:
    heads = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in run.classes)
    corner = '<td class="corner">true \\ predicted</td>'
    rows = []
    for true, counts in zip(run.classes, run.scored.counts.tolist(), strict=True):
        row, total = f'<th scope="row">{escape(true)}</th>', sum(counts)
        for predicted, count in zip(run.classes, counts, strict=True):
            said = escape(f"true {true}, predicted {predicted}: {count:,} pixels")
            if not total:
                row += f'<td title="{said}">-</td>'
                continue
            share = count / total
            strong = ' class="strong"' if share > 0.75 else ""
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            row += f'<td{strong} style="--share:{share:.3f}" title="{said}">{text}</td>'
        rows.append(row)
    return table(f"<thead><tr>{corner}{heads}</tr></thead>", rows, kind="matrix")


def _pairs(run: Run) -> str:
    counts = run.scored.counts
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    found = wrong.flatten().sort(descending=True, stable=True).indices[:MOST_CLASSES].tolist()
    rows = []
    for place in found:
        true, predicted = divmod(place, len(counts))
        if count := int(wrong[true, predicted]):
            rows.append(
                f'<th scope="row">{escape(run.classes[true])}</th>'
                f"<th>{escape(run.classes[predicted])}</th>"
                + cell(count, ",d")
                + cell(count / int(counts[true].sum()), ".2%")
            )
    heads = "true class", "predicted as", "pixels", "share of the true class"
    return table(head(heads, words=2), rows, kind="pairs")
