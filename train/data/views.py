"""Which views of an unlabeled image a method wants: crops, colors, rectangles to mix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from cac_fast.train.data.photometric import draw_photometric


class View(NamedTuple):
    """One view, made on the device; the pixels of a crop travel there once for all its views.

    crop: 1 or 2, which of the image's two overlapping crops.
    color: None leaves the colors as they are; else a name in `COLORS`.
    boxes: rectangles drawn with the view, for mixing it with another image (CutMix): 0, 1 or 3.
    """

    crop: int = 1
    color: str | None = None
    boxes: int = 0


Views = Mapping[str, View]
"""By name. The order is that of the draws: a method keeps it."""

PAIR: Views = {"1": View(1, "cac"), "2": View(2, "cac")}
"""Both crops, each with its own colors (paper, Sec. 4.1)."""

COLORS = {"cac": draw_photometric, "strong": partial(draw_photometric, contrast=0.5, hue=0.25)}
"""What draws the changes of a view's colors: CAC's, and those of weak-to-strong methods, which
change brightness, contrast and saturation within 0.5 and the hue within 0.25."""


def crops_of(views: Views) -> list[int]:
    """The crops that some view shows, in order."""
    return sorted({view.crop for view in views.values()})


def draw_boxes(crop: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rectangles in a crop: int16 (count, 4) of top, left, bottom, right in pixels, the ends open.

    One (UniMatch's): with p 0.5 empty, else of 2 to 40 % of the crop's area with sides in a
    proportion of 0.3 to 1 / 0.3. Several (CPS's, where each inverts what it covers): with
    a in [0.25, 0.5] and u in [0, 1], a**u of the height by a**(1 - u) of the width, both times
    1 / sqrt(count).
    """
    draw = _draw_one if count == 1 else partial(_draw_of_several, count)
    return np.array([draw(crop, rng) for _ in range(count)], np.int16)


def _draw_one(crop: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    if rng.random() >= 0.5:
        return 0, 0, 0, 0
    area = rng.uniform(0.02, 0.4) * crop * crop
    while True:
        proportion = rng.uniform(0.3, 1 / 0.3)
        height, width = int(math.sqrt(area * proportion)), int(math.sqrt(area / proportion))
        top, left = (int(place) for place in rng.integers(crop, size=2))
        if top + height <= crop and left + width <= crop:
            return top, left, top + height, left + width


def _draw_of_several(count: int, crop: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    area, share = rng.uniform(0.25, 0.5), rng.random()
    side = crop / math.sqrt(count)
    height, width = round(side * area**share), round(side * area ** (1 - share))
    top = int(rng.integers(crop - height, endpoint=True))
    left = int(rng.integers(crop - width, endpoint=True))
    return top, left, top + height, left + width
