"""The parts of the page that come from files alone: headline, settings, curves, speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from cac_fast.train.log import COLUMNS
from cac_fast.train.reporting.charts import Series, color_class, line_chart
from cac_fast.train.reporting.gather import (
    Run,
    all_settings,
    defaults,
    differing_settings,
    number,
    setting,
)
from cac_fast.train.reporting.text import cell, escape, head, span, table

_SPEED = "images_per_s", "data_s", "peak_memory_mb"


def section(name: str, title: str, content: str) -> str:
    """A part of the page under a heading."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>'


def swatch(index: int) -> str:
    """The color of the run at a place."""
    return f'<span class="swatch {color_class(index)}"></span>'


def headline(runs: Sequence[Run]) -> str:
    """A card for each run, with what is missing."""
    cards = "".join(_card(index, run) for index, run in enumerate(runs))
    return section("headline", "Results", f'<div class="cards">{cards}</div>')


def _card(index: int, run: Run) -> str:
    best, last = run.best or {}, run.val[-1] if run.val else {}
    at = f" at iteration {best['iteration']}" if best else ""
    planned = run.settings.get("iterations")
    of = f" of {escape(planned)}" if planned is not None else ""
    used = [run.settings[key] for key in ("method", "network", "backbone") if key in run.settings]
    device = ", ".join(run.devices) or "not recorded"
    if not run.devices and "device" in run.settings:
        device += f" (--device {run.settings['device']})"
    facts = {
        "last mIoU": span(last.get("miou"), name="last-miou")
        + (f" at iteration {last['iteration']}" if last else ""),
        "pixel accuracy": span(best.get("pixel_accuracy"), name="best-accuracy"),
        "iterations": span(run.iterations, "d", "iterations") + of,
        "trained with": escape(", ".join(map(str, used)) or "not recorded"),
        "commit": escape(", ".join(run.commits) or "not recorded"),
        "device": escape(device),
        "folder": escape(run.path),
    }
    rows = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts.items())
    gaps = "".join(f"<li>{escape(gap)}</li>" for gap in run.gaps)
    gaps = f'<div class="gaps"><strong>Missing</strong><ul>{gaps}</ul></div>' if gaps else ""
    return (
        f'<article class="card" data-run="{escape(run.name)}"><h3>{swatch(index)}'
        f'{escape(run.name)}</h3><p class="score">{span(best.get("miou"), name="best-miou")}'
        f"<small>best mIoU{at}</small></p><dl>{rows}</dl>{gaps}</article>"
    )


def settings(runs: Sequence[Run]) -> str:
    """The settings that differ between the runs, or a single run's from the defaults."""
    title = "Settings that differ" if len(runs) > 1 else "Settings that differ from the defaults"
    names = differing_settings(runs)
    if not any(run.settings for run in runs):
        return section("settings", title, _nothing("No run folder holds a config.json."))
    if not names:
        return section("settings", title, _nothing("None, apart from the folder."))
    columns = [*runs, defaults()] if len(runs) == 1 else runs
    return section("settings", title, _settings_table(names, columns))


def all_of_them(runs: Sequence[Run]) -> str:
    """All settings, folded."""
    names = all_settings(runs)
    if not names:
        return ""
    content = f"<details><summary>{len(names)} settings</summary>{_settings_table(names, runs)}"
    return section("all-settings", "All settings", content + "</details>")


def _settings_table(names: Sequence[str], columns: Sequence[Run]) -> str:
    texts = "setting", *(run.name for run in columns)
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in texts)
    rows = [
        f'<th scope="row"><code>{escape(name)}</code></th>'
        + "".join(
            f"<td>{escape(_value(setting(run, name))) if run.settings else '-'}</td>"
            for run in columns
        )
        for name in names
    ]
    return table(f"<thead><tr>{heads}</tr></thead>", rows, kind="settings")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value == "":
        return "-"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def curves(runs: Sequence[Run]) -> str:
    """Scores and losses over iterations; other values and all evaluations folded."""
    scores = [
        _figure(title, runs, "val", name)
        for name, title in (("miou", "mIoU on val"), ("pixel_accuracy", "pixel accuracy on val"))
    ]
    names = dict.fromkeys(name for run in runs for line in run.train for name in line)
    values = [name for name in names if name not in ("kind", "iteration") and _varies(runs, name)]
    losses = [name for name in values if name.startswith("loss")]
    others = [name for name in values if name not in losses]
    main = "".join(
        filter(None, [*scores, *(_figure(name, runs, "train", name) for name in losses)])
    )
    if not main:
        return section("curves", "Curves", _nothing("No run folder holds metrics to draw."))
    more = "".join(_figure(name, runs, "train", name) for name in others)
    legend = "".join(
        f"<li>{swatch(index)}{escape(run.name)}</li>" for index, run in enumerate(runs)
    )
    legend = f'<ul class="legend">{legend}</ul>' if len(runs) > 1 else ""
    content = f'{legend}<div class="charts">{main}</div>'
    if more:
        content += (
            f"<details><summary>{len(others)} more curves</summary>"
            f'<div class="charts">{more}</div></details>'
        )
    return section("curves", "Curves", content + _evaluations(runs))


def _figure(title: str, runs: Sequence[Run], kind: str, name: str) -> str:
    series = [
        Series(index, run.name, list(_points(run, kind, name))) for index, run in enumerate(runs)
    ]
    chart = line_chart(title, series, marks=kind == "val")
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>" if chart else ""


def _points(run: Run, kind: str, name: str) -> Iterator[tuple[float, float]]:
    for line in run.val if kind == "val" else run.train:
        if number(line.get(name)) is not None:
            yield line["iteration"], line[name]


def _varies(runs: Sequence[Run], name: str) -> bool:
    """Whether there is more to see than the value that `COLUMNS` has where a step has none."""
    values = {value for run in runs for _, value in _points(run, "train", name)}
    return bool(values - {COLUMNS.get(name)})


def _evaluations(runs: Sequence[Run]) -> str:
    rows = [
        f'<th scope="row">{escape(run.name)}</th>'
        + cell(line["iteration"], "d", "iteration")
        + cell(line.get("miou"), name="miou")
        + cell(line.get("pixel_accuracy"), name="pixel_accuracy")
        for run in runs
        for line in run.val
    ]
    if not rows:
        return ""
    heads = head(("run", "iteration", "mIoU", "pixel accuracy"))
    evaluations = table(heads, rows, kind="evaluations")
    return f"<details><summary>{len(rows)} evaluations</summary>{evaluations}</details>"


def speed(runs: Sequence[Run]) -> str:
    """Speed and memory of the training."""
    if not any(run.train for run in runs):
        return section("speed", "Speed and memory", _nothing("No run folder holds its speed."))
    rows = []
    for index, run in enumerate(runs):
        rate, wait, memory = (
            [line[name] for line in run.train if number(line.get(name)) is not None]
            for name in _SPEED
        )
        rows.append(
            f'<th scope="row">{swatch(index)}{escape(run.name)}</th>'
            + cell(statistics.median(rate) if rate else None, ".1f", "images_per_s")
            + cell(rate[-1] if rate else None, ".1f", "last_images_per_s")
            + cell(statistics.median(wait) if wait else None, ".4f", "data_s")
            + cell(max(memory, default=None), ".0f", "peak_memory_mb")
        )
    heads = head(("run", "images/s, median", "images/s, last", "s/step waited", "peak MiB"))
    text = (
        "Training alone, over the lines of metrics.jsonl. <em>s/step waited</em> is the median "
        "time that a step waited for data. The peak is that of the GPU's allocator, or of the "
        "process on a CPU. Compare speeds only between runs on the same device."
    )
    return section("speed", "Speed and memory", table(heads, rows, kind="speed") + _note(text))


def _nothing(text: str) -> str:
    return f'<p class="nothing">{text}</p>'


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'
