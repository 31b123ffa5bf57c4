"""Parts of the report: which images are shown, and the charts."""

from __future__ import annotations

import numpy as np
import pytest
from reported import read

from cac_fast.train.reporting import charts
from cac_fast.train.reporting.scoring import choose


@pytest.mark.parametrize("images", range(1, 16))
@pytest.mark.parametrize("count", [1, 4])
def test_no_image_is_chosen_twice(images: int, count: int):
    scores = [None, *np.random.default_rng(images).permutation(images).tolist()]
    chosen = choose(scores, count)
    values = {kind: [scores[index] for index in indices] for kind, indices in chosen.items()}
    every = [value for kind in values.values() for value in kind]
    assert every == sorted(set(every))
    expected = min(count, max(1, images // 3))
    assert len(values["worst"]) == expected and values["worst"][0] == 0
    if images > 2:
        assert [len(kind) for kind in values.values()] == [expected] * 3
        assert values["best"][-1] == images - 1
        around = sum(values["median"]) / expected
        assert abs(around - (images - 1) / 2) <= 0.5


def test_points_of_a_curve_are_where_their_numbers_are():
    series = [charts.Series(0, "run", [(0, 0.0), (50, 1.0), (100, 0.25)])]
    svg = read(charts.line_chart("score", series, marks=True))
    points = [
        tuple(map(float, pair.split(",")))
        for pair in svg.one("polyline").attributes["points"].split()
    ]
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    assert points == [
        (left, bottom),
        ((left + right) / 2, top),
        (right, pytest.approx(bottom - 0.25 * (bottom - top), abs=0.06)),
    ]
    assert [one.text for one in svg.all("title")][1] == "run, iteration 50: 1"
    assert [one.text for one in svg.all("text", class_="y")] == [
        "0.00",
        "0.25",
        "0.50",
        "0.75",
        "1.00",
    ]


def test_long_curves_keep_their_extremes():
    rng = np.random.default_rng(0)
    points = [(index, float(value)) for index, value in enumerate(rng.normal(size=10_007))]
    kept = charts.thinned(points)
    assert len(kept) <= charts.MOST_POINTS + 4 and kept == sorted(kept)
    assert {
        points[0],
        points[-1],
        min(points, key=lambda p: p[1]),
        max(points, key=lambda p: p[1]),
    } <= set(kept)


@pytest.mark.parametrize(
    "low, high", [(0, 0), (5, 5), (-3, 7), (0.312, 0.313), (0, 40_000), (1e-9, 2e-9)]
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float):
    ticks = charts.ticks(low, high, 4)
    assert ticks[0] <= low + 1e-15 and ticks[-1] >= high - 1e-15 and 2 <= len(ticks) <= 7
    labels = [charts.label(tick, ticks) for tick in ticks]
    assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 8
