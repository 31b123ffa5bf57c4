"""The crop geometry in integers: boxes, offsets, bounds and whole cells."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import numpy as np
import pytest
from data_folders import CROPS, SEEDS
from hypothesis import given
from hypothesis import strategies as st

from cac_fast.train.data.crops import draw_box, draw_pair, draw_size, whole_cells

SIZES = st.integers(1, 300)
RANGES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(tuple)


def iou(box1, box2, crop):
    """Intersection over union by counting pixels."""
    inside = [
        {(y, x) for y in range(top, top + crop) for x in range(left, left + crop)}
        for top, left in (box1, box2)
    ]
    return len(inside[0] & inside[1]) / len(inside[0] | inside[1])


def allowed(first, height, width, crop, iou_range):
    """All second boxes for a first one, found one by one."""
    found = set()
    for top in range(first[0] % 8, max(height, crop) - crop + 1, 8):
        for left in range(first[1] % 8, max(width, crop) - crop + 1, 8):
            shared = max(0, crop - abs(top - first[0])) * max(0, crop - abs(left - first[1]))
            value = shared / (2 * crop * crop - shared)
            if shared and iou_range[0] <= value <= iou_range[1]:
                found.add((top, left))
    return found


@given(SIZES, SIZES, CROPS, RANGES, SEEDS)
def test_pair(height, width, crop, iou_range, seed):
    pair = draw_pair(height, width, crop, iou_range, np.random.default_rng(seed))
    first, second = (pair.top1, pair.left1), (pair.top2, pair.left2)
    for top, left in (first, second):
        assert 0 <= top <= max(height, crop) - crop
        assert 0 <= left <= max(width, crop) - crop
    assert (pair.top2 - pair.top1) % 8 == (pair.left2 - pair.left1) % 8 == 0
    choices = allowed(first, height, width, crop, iou_range)
    assert second in choices if choices else second == first


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([8, 16, 24]), SEEDS)
def test_iou_within_bounds_by_counting_pixels(height, width, crop, seed):
    pair = draw_pair(height, width, crop, (0.1, 1.0), np.random.default_rng(seed))
    assert 0.1 <= iou((pair.top1, pair.left1), (pair.top2, pair.left2), crop) <= 1


@given(SIZES, SIZES, CROPS, SEEDS)
def test_iou_of_one_gives_identical_boxes(height, width, crop, seed):
    pair = draw_pair(height, width, crop, (1.0, 1.0), np.random.default_rng(seed))
    assert (pair.top1, pair.left1) == (pair.top2, pair.left2)


def test_second_box_is_uniform_over_what_is_allowed():
    """Five sigma each, 4,000 draws with the first box held at the only position there is."""
    rng = np.random.default_rng(0)
    firsts = Counter()
    seconds = {}
    for _ in range(4000):
        pair = draw_pair(25, 33, 24, (0.1, 0.9), rng)
        firsts[pair.top1, pair.left1] += 1
        seconds.setdefault((pair.top1, pair.left1), Counter())[pair.top2, pair.left2] += 1
    assert len(firsts) == 2 * 10
    for first, counter in seconds.items():
        choices = allowed(first, 25, 33, 24, (0.1, 0.9)) or {first}
        assert set(counter) == choices
        share, total = 1 / len(choices), firsts[first]
        for count in counter.values():
            assert abs(count - total * share) <= 5 * sqrt(total * share * (1 - share)) + 1e-9
        assert abs(total - 200) <= 5 * sqrt(200)


def test_flips_are_independent_and_even():
    rng = np.random.default_rng(1)
    flips = Counter(draw_pair(64, 64, 32, (0.1, 1.0), rng)[4:] for _ in range(2000))
    assert len(flips) == 4
    assert all(abs(count - 500) < 5 * sqrt(500 * 0.75) for count in flips.values())


@given(SIZES, SIZES, CROPS, SEEDS)
def test_box_lies_in_the_padded_image(height, width, crop, seed):
    top, left = draw_box(height, width, crop, np.random.default_rng(seed))
    assert 0 <= top <= max(height, crop) - crop
    assert 0 <= left <= max(width, crop) - crop


def test_box_reaches_every_position():
    rng = np.random.default_rng(0)
    boxes = {draw_box(10, 11, 8, rng) for _ in range(300)}
    assert boxes == {(top, left) for top in range(3) for left in range(4)}


@given(SIZES, SIZES, SEEDS)
def test_size_by_ratio(height, width, seed):
    new = draw_size(height, width, (0.5, 2.0), np.random.default_rng(seed))
    for old, side in zip((height, width), new, strict=True):
        assert max(1, 0.5 * old - 0.5) <= side <= 2 * old + 0.5
    assert abs(new[0] * width - new[1] * height) <= 0.5 * (width + height) + max(width, height)


@given(SIZES, SIZES, SEEDS)
def test_size_by_long_side(height, width, seed):
    """The authors' way: the long side is drawn, whatever the image's own is."""
    new = draw_size(height, width, (0.5, 2.0), np.random.default_rng(seed), base_size=400)
    assert 200 <= max(new) <= 800
    assert new.index(max(new)) == (height, width).index(max(height, width))


def test_long_side_takes_both_ends():
    rng = np.random.default_rng(0)
    sides = {max(draw_size(3, 5, (0.5, 2.0), rng, base_size=4)) for _ in range(200)}
    assert sides == set(range(2, 9))


def test_fixed_ratio_keeps_the_size():
    assert draw_size(37, 91, (1.0, 1.0), np.random.default_rng(0)) == (37, 91)


@given(SIZES, SIZES, CROPS, st.data())
def test_whole_cells_by_looking_at_each(height, width, crop, data):
    top = data.draw(st.integers(0, max(height, crop) - crop))
    left = data.draw(st.integers(0, max(width, crop) - crop))
    rows, columns = whole_cells(top, left, height, width, crop)
    assert rows == sum(top + 8 * row + 8 <= height for row in range(crop // 8))
    assert columns == sum(left + 8 * column + 8 <= width for column in range(crop // 8))


@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.8, 2.0)])
def test_ratio_fills_its_range(scale):
    rng = np.random.default_rng(0)
    heights = [draw_size(1000, 10, scale, rng)[0] / 1000 for _ in range(500)]
    assert scale[0] <= min(heights) < scale[0] + 0.02
    assert scale[1] - 0.02 < max(heights) <= scale[1]
    assert abs(np.mean(heights) - sum(scale) / 2) < 0.1
