"""Curves and bars as SVG, whose colors the page's style sheet sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cac_fast.train.reporting.text import escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 26
COLORS = 8
"""Colors of runs; more runs get dashes too."""
MOST_POINTS = 400

Point = tuple[float, float]


class Series(NamedTuple):
    """One run's curve: its place among the runs, its name, and (iteration, value) pairs."""

    index: int
    name: str
    points: Sequence[Point]


def color_class(index: int) -> str:
    """The style sheet's class for the run at a place."""
    dashes = f" dashed-{index // COLORS % 3}" if index >= COLORS else ""
    return f"run-{index % COLORS}{dashes}"


def line_chart(title: str, series: Sequence[Series], *, marks: bool) -> str:
    """A chart of curves over iterations as `<svg>`; empty where no series has a point.

    marks: a dot at each point, which shows its numbers when pointed at.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    xs = ticks(0, max(x for x, _ in points), 4)
    ys = ticks(min(y for _, y in points), max(y for _, y in points), 4)

    def place(point: Point) -> Point:
        x, y = ((v - t[0]) / (t[-1] - t[0]) for v, t in zip(point, (xs, ys), strict=True))
        return (
            LEFT + x * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for tick in ys:
        _, y = place((xs[0], tick))
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class="y" x="{LEFT - 7}" y="{y + 3.5:.1f}">{label(tick, ys)}</text>')
    for tick in xs:
        x, _ = place((tick, ys[0]))
        anchor, x = ("end", WIDTH) if tick == xs[-1] else ("middle", x)
        parts.append(
            f'<text class="x {anchor}" x="{x:.1f}" y="{HEIGHT - 8}">{label(tick, xs)}</text>'
        )
    for one in series:
        color = color_class(one.index)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, thinned(one.points)))
        parts.append(f'<polyline class="{color}" points="{line}"/>')
        for point in one.points if marks or len(one.points) == 1 else ():
            x, y = place(point)
            said = f"{one.name}, iteration {point[0]}: {point[1]:.4g}"
            parts.append(
                f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(said)}</title></circle>"
            )
    said = f"{title} over iterations: " + "; ".join(
        f"{one.name} ends at {one.points[-1][1]:.4g}" for one in series if one.points
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(said)}">{"".join(parts)}</svg>'
    )


def bar(share: float | None, index: int) -> str:
    """A bar of `share` of its track, in the color of the run at a place."""
    if share is None:
        return ""
    width = 100 * min(1, max(0, share))
    return (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="8"/>'
        f'<rect class="{color_class(index)}" width="{width:.2f}" height="8"/></svg>'
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in equal steps, the ends outside of or at `low` and `high`."""
    if high <= low:
        half = abs(low) / 2 or 0.5
        low, high = low - half, low + half
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def label(tick: float, among: Sequence[float]) -> str:
    """A tick as text with as many decimals as all of them need; 20k for 20000."""
    step, most = among[1] - among[0], max(map(abs, among))
    if most >= 1e7 or step < 1e-4:
        return f"{tick:.3g}" if abs(tick) >= step / 2 else "0"
    unit, sign = (1000, "k") if most >= 10_000 else (1, "")
    texts = (f"{round(each / unit, 6):g}" for each in among)
    decimals = max(len(text.partition(".")[2]) for text in texts)
    text = f"{round(tick / unit, 6):.{decimals}f}"
    return text + sign if tick or not sign else "0"


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `MOST_POINTS` points, the lowest and the highest of each stretch."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretch = -(-len(points) * 2 // MOST_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        ends = {pick(part, key=lambda index: points[index][1]) for pick in (min, max)}
        kept += [points[index] for index in sorted(ends)]
    return [points[0], *kept, points[-1]]
