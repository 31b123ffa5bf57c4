"""The integer geometry of crops (paper, Sec. 4.1): IoU range, alignment, flips.

Everything is in pixels unless a name says cells; a cell is `CELL` x `CELL` pixels, one location of
the feature map the loss is taken on. Boxes are squares of side `crop`, given by top and left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CELL = 8
"""Pixels a side of one feature location: the second crop is offset by multiples of it."""


class CropPair(NamedTuple):
    """Two boxes of one image and whether each crop is flipped left to right after cropping."""

    top1: int
    left1: int
    top2: int
    left2: int
    flip1: bool
    flip2: bool


def draw_size(
    height: int,
    width: int,
    scale: tuple[float, float],
    rng: np.random.Generator,
    base_size: int | None = None,
) -> tuple[int, int]:
    """The (height, width) to resize to, at least 1 x 1, with the proportions kept.

    Without `base_size` (the paper) the ratio is uniform in `scale`. With it (the authors' code)
    the long side is a uniform whole number in `scale` times `base_size`.
    """
    if base_size is None:
        ratio = rng.uniform(*scale)
    else:
        low, high = (int(bound * base_size) for bound in scale)
        ratio = int(rng.integers(low, high, endpoint=True)) / max(height, width)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def draw_box(height: int, width: int, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """(top, left) of a box uniform in an image that is padded at the bottom and right to `crop`."""
    top = rng.integers(max(height, crop) - crop, endpoint=True)
    left = rng.integers(max(width, crop) - crop, endpoint=True)
    return int(top), int(left)


def draw_pair(
    height: int,
    width: int,
    crop: int,
    iou_range: tuple[float, float],
    rng: np.random.Generator,
) -> CropPair:
    """Two boxes of one image, padded at the bottom and right to at least `crop` a side.

    The first is uniform. The second is uniform among the boxes that are whole cells away, share
    pixels with the first and have an IoU within the closed `iou_range`; where there is none, the
    boxes are identical. Each flip has probability 0.5.
    """
    top, left = draw_box(height, width, crop, rng)
    down = _steps(top, max(height, crop) - crop, crop)
    right = _steps(left, max(width, crop) - crop, crop)
    shared = np.outer(crop - np.abs(down), crop - np.abs(right))
    iou = shared / (2 * crop * crop - shared)
    choices = np.flatnonzero((iou >= iou_range[0]) & (iou <= iou_range[1]))
    top2, left2 = top, left
    if choices.size:
        row, column = divmod(int(choices[rng.integers(choices.size)]), right.size)
        top2, left2 = top + int(down[row]), left + int(right[column])
    flip1, flip2 = (bool(flip) for flip in rng.random(2) < 0.5)
    return CropPair(top, left, top2, left2, flip1, flip2)


def whole_cells(top: int, left: int, height: int, width: int, crop: int) -> tuple[int, int]:
    """Rows and columns of a crop's cells that lie wholly on the image of `height` x `width`.

    Counted from the crop's top left before any flip: padding is at the bottom and right.
    """
    rows = min(max(height - top, 0), crop) // CELL
    columns = min(max(width - left, 0), crop) // CELL
    return rows, columns


def _steps(start: int, last: int, crop: int) -> np.ndarray:
    """Multiples of CELL that keep a box of this start within [0, last] and in touch with it."""
    most = crop // CELL - 1
    back = min(start // CELL, most)
    ahead = min((last - start) // CELL, most)
    return np.arange(-back, ahead + 1) * CELL
