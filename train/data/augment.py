"""From an image of any size to crops: resize, crop, flip, padding, and photometric changes drawn.

Only the part of the image under the crops is read and resized, which gives the pixels of resizing
all of it. Both crops of a pair are cut from one resized region, so shared locations hold equal
pixels. The photometric changes come later, to whole batches (`photometric`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cac_fast.train.data.crops import CELL, draw_box, draw_pair, draw_size, whole_cells
from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.photometric import draw_jitter, set_place
from cac_fast.train.data.views import COLORS, PAIR, Views, crops_of, draw_boxes
from cac_fast.train.errors import check_crop
from cac_fast.train.preprocessing import IMAGENET_MEAN

Pixels = Image.Image | np.ndarray
"""An RGB image, or uint8 (H, W, 3); a mask, or uint8 (H, W). Arrays may be memory-mapped."""

PADDING_COLOR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)

SHIFTS_PER_PIXEL = 512
"""PyTorch resizes a part as if it began up to 1/512 of a source pixel beside where it does: at most
half a level of 255, where black meets white."""
WORTHWHILE_EXCESS = 2.5
"""So many times the wanted places PyTorch may resize: as many times as it is faster than Pillow."""


@dataclass(frozen=True)
class LabeledTransform:
    """Random resize, crop and flip of an image and its mask.

    Args:
        crop: side of the crop in pixels, a multiple of 8.
        scale: range of the resize ratio, or of the long side in units of `base_size`.
        base_size: None for the paper's ratio, a number of pixels for the authors' long side.
        jitter: also change every crop's colors (the authors do for Cityscapes).

    Raises:
        InputError: `crop` is not a multiple of 8.
    """

    crop: int
    scale: tuple[float, float] = (0.5, 2.0)
    base_size: int | None = None
    jitter: bool = False

    def __post_init__(self) -> None:
        check_crop(self.crop, CELL)

    def __call__(
        self, image: Pixels, mask: np.ndarray, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """A crop and its labels.

        Returns, with c the crop's side: "image" uint8 (3, c, c); "label" uint8 (c, c); "flip" and
        "valid" as `UnlabeledTransform`; and, with jitter, "changes" float32 (13,) for
        `photometric.apply_photometric`.
        """
        size = image_size(image)
        height, width = draw_size(*size, self.scale, rng, self.base_size)
        top, left = draw_box(height, width, self.crop, rng)
        flip = bool(rng.random() < 0.5)
        box = (top, left, min(top + self.crop, height), min(left + self.crop, width))
        part = resize_part(image, (height, width), box)
        labels = resize_labels(mask, (height, width), box)
        item = {
            "image": _flip_and_pad(part, self.crop, flip, PADDING_COLOR),
            "label": _flip_and_pad(labels, self.crop, flip, IGNORE),
            "flip": torch.tensor(flip),
            "valid": torch.tensor(whole_cells(top, left, height, width, self.crop)),
        }
        if self.jitter:
            item["changes"] = _placed(draw_jitter(rng), part, self.crop, flip)
        return item


@dataclass(frozen=True)
class UnlabeledTransform:
    """One random resize, and the views of two overlapping crops of it, each with its own flip.

    Args:
        crop, scale, base_size: as `LabeledTransform`.
        iou_range: closed range of the boxes' intersection over union.
        photometric: False leaves the colors of all views as they are.
        truth_cells: give the true ids of cells, where a mask is given.
        views: both crops are drawn whatever they are, those that no view shows are not cut.

    Raises:
        InputError: `crop` is not a multiple of 8.
    """

    crop: int
    scale: tuple[float, float] = (0.8, 2.0)
    base_size: int | None = None
    iou_range: tuple[float, float] = (0.1, 1.0)
    photometric: bool = True
    truth_cells: bool = True
    views: Views = field(default_factory=lambda: PAIR)

    def __post_init__(self) -> None:
        check_crop(self.crop, CELL)

    def __call__(
        self,
        image: Pixels,
        mask: np.ndarray | None,
        rng: np.random.Generator,
        pseudo: np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        """The crops of an RGB image, where they are, and what their views do to them.

        Returns, with c the crop's side and v = 1, 2 each crop that a view shows: "imagev" uint8
        (3, c, c); "flipv" bool (); "validv" int64 (2,), rows and columns of cells on the image,
        before the flip; with a mask uint8 (H, W), "truthv" uint8 (c/8, c/8), the id at the center
        of each cell, flipped as its image is, 255 where unknown; with a pseudo mask uint8 (H, W),
        "labelv" uint8 (c, c), its part under the crop, flipped and 255 on padding; with both masks
        "rightv" int64 (2,), the pixels that these label alike and those that both label; if there
        are both crops, "offset" int64 (2,), crop 2's box minus crop 1's in cells (down, right). For
        each view that has them: "changes_NAME" float32 (13,) for `photometric.apply_photometric`,
        and "boxes_NAME" int16 (n, 4) of `views.draw_boxes`.
        """
        crop = self.crop
        height, width = draw_size(*image_size(image), self.scale, rng, self.base_size)
        pair = draw_pair(height, width, crop, self.iou_range, rng)
        both = {1: (pair.top1, pair.left1, pair.flip1), 2: (pair.top2, pair.left2, pair.flip2)}
        crops = {number: both[number] for number in crops_of(self.views)}
        tops, lefts, _ = zip(*crops.values(), strict=True)
        top0, left0 = min(tops), min(lefts)
        region = (top0, left0, min(max(tops) + crop, height), min(max(lefts) + crop, width))
        part = resize_part(image, (height, width), region)
        if mask is not None:
            labels = resize_labels(mask, (height, width), region)
        if pseudo is not None:
            told = resize_labels(pseudo, (height, width), region)
        item, cuts = {}, {}
        if len(crops) == 2:
            down, right = pair.top2 - pair.top1, pair.left2 - pair.left1
            item["offset"] = torch.tensor([down // CELL, right // CELL])
        for number, (top, left, flip) in crops.items():
            y, x = top - top0, left - left0
            cuts[number] = part[:, y : y + crop, x : x + crop]
            item[f"image{number}"] = _flip_and_pad(cuts[number], crop, flip, PADDING_COLOR)
            item[f"flip{number}"] = torch.tensor(flip)
            item[f"valid{number}"] = torch.tensor(whole_cells(top, left, height, width, crop))
            if pseudo is not None:
                part_told = told[y : y + crop, x : x + crop]
                item[f"label{number}"] = _flip_and_pad(part_told, crop, flip, IGNORE)
                if mask is not None:
                    truth = labels[y : y + crop, x : x + crop]
                    item[f"right{number}"] = _agreement(part_told, truth)
            if mask is not None and self.truth_cells:
                # Sampled before the flip: both views must take the same pixel of a shared cell.
                half = CELL // 2
                centers = labels[y + half : y + crop : CELL, x + half : x + crop : CELL]
                item[f"truth{number}"] = _flip_and_pad(centers, crop // CELL, flip, IGNORE)
        for name, view in self.views.items():
            if self.photometric and view.color is not None:
                changes, (_, _, flip) = COLORS[view.color](rng), crops[view.crop]
                item[f"changes_{name}"] = _placed(changes, cuts[view.crop], crop, flip)
            if view.boxes:
                item[f"boxes_{name}"] = torch.from_numpy(draw_boxes(crop, view.boxes, rng))
        return item


def _agreement(told: Tensor, truth: Tensor) -> Tensor:
    both = (told != IGNORE) & (truth != IGNORE)
    return torch.stack(((both & (told == truth)).sum(), both.sum()))


def image_size(image: Pixels) -> tuple[int, int]:
    """Height and width."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def resize_part(image: Pixels, size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """The part `box` (top, left, bottom, right) of `image` resized to `size` (height, width).

    Returns uint8 (3, h, w). By PyTorch, whose resize with antialiasing takes a third of Pillow's
    time for the same values, but cannot begin within a source pixel, as a box does: it begins at
    rows and columns before the box that nearly begin a pixel. Where these are too far away Pillow
    resizes, which takes fractions. Of an array only what counts is read.
    """
    sizes = zip(image_size(image), size, zip(box[:2], box[2:], strict=True), strict=True)
    y, x = (_source(old, new, first, last) for old, new, (first, last) in sizes)
    height, width = box[2] - box[0], box[3] - box[1]
    if y.places * x.places > WORTHWHILE_EXCESS * height * width:
        return _resize_within(image, size, box)
    planes = _pixels(image, y.low, x.low, y.high, x.high)
    # Behind `interpolate(antialias=True)`, which does not take both a size and a scale.
    resize = torch.ops.aten._upsample_bilinear2d_aa
    resized = resize(planes.unsqueeze(0), [y.places, x.places], False, y.scale, x.scale)
    return resized[0, :, y.skip : y.skip + height, x.skip : x.skip + width]


def _resize_within(image: Pixels, size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """`resize_part` by Pillow, whose box may begin anywhere in a source pixel."""
    bounds, source = [], []
    for old, new, first, last in zip(image_size(image), size, box[:2], box[2:], strict=True):
        ratio = old / new
        begin, end = first * ratio, min(last * ratio, old)
        reach = math.ceil(max(ratio, 1)) + 1  # of the bilinear filter, to either side
        low, high = max(int(begin) - reach, 0), min(int(end) + 1 + reach, old)
        bounds.append((low, high))
        source.append((begin - low, end - low))
    (top, bottom), (left, right) = bounds
    (y0, y1), (x0, x1) = source
    part = Image.fromarray(_pixels(image, top, left, bottom, right).permute(1, 2, 0).numpy())
    new_size = box[3] - box[1], box[2] - box[0]
    resized = part.resize(new_size, Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _pixels(image: Pixels, top: int, left: int, bottom: int, right: int) -> Tensor:
    """A copy of a part, uint8 (3, h, w)."""
    if isinstance(image, np.ndarray):
        part = image[top:bottom, left:right]
    else:
        part = image.crop((left, top, right, bottom))
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)


def resize_labels(
    mask: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]
) -> Tensor:
    """The part `box` (top, left, bottom, right) of a mask resized to `size` (height, width).

    Returns uint8 (h, w): of each place the id of the pixel under its center.
    """
    rows, columns = (
        (2 * np.arange(first, last) + 1) * old // (2 * new)
        for old, new, first, last in zip(mask.shape, size, box[:2], box[2:], strict=True)
    )
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return torch.from_numpy(part.take(columns - columns[0], 1).take(rows - rows[0], 0))


class _Source(NamedTuple):
    """Pixels [low, high) of one axis, resized by `scale` to `places`, the first `skip` unwanted."""

    low: int
    high: int
    scale: float
    places: int
    skip: int


def _source(old: int, new: int, first: int, last: int) -> _Source:
    """What to resize for the places [first, last) of an axis of `old` pixels made `new`."""
    ratio = old / new
    reach = max(ratio, 1)  # of the filter, in source pixels to either side
    # Where the pixels begin, but for the image's own edge, the filter lacks some.
    latest = max(first - math.ceil(reach / ratio), 0)
    starts = np.arange(latest, -1, -1)
    lows = (2 * starts * old + new) // (2 * new)  # the border of a pixel next to where a start is
    shift = np.abs(starts * old - lows * new)  # of a source pixel, in parts of 1 / new
    # To PyTorch as many places as pixels mean no resize at all: it must not come to that.
    good = (SHIFTS_PER_PIXEL * shift <= new) & ((old - lows != new - starts) | (old == new))
    chosen = np.argmax(good)  # 0, the last one, always is
    start, low = int(starts[chosen]), int(lows[chosen])
    high, places = min(math.ceil(last * ratio + reach) + 1, old), last - start
    if high - low == places and old != new:
        high, places = (high + 1, places) if high < old else (high, places + 1)
    return _Source(low, high, new / old, places, first - start)


def _placed(changes: np.ndarray, part: Tensor, crop: int, flip: bool) -> Tensor:
    height, width = part.shape[-2:]
    left = crop - width if flip else 0
    set_place(changes, height, left, left + width)
    return torch.from_numpy(changes)


def _flip_and_pad(part: Tensor, side: int, flip: bool, fill: int | tuple[int, ...]) -> Tensor:
    """`part` (..., h, w), flipped left to right if asked for, in (..., side, side) of `fill`.

    Padding is at the bottom, and at the right before the flip.
    """
    if flip:
        part = part.flip(-1)
    height, width = part.shape[-2:]
    if height == width == side:
        return part
    padded = part.new_tensor(fill)[..., None, None].repeat(*[1] * (part.ndim - 2), side, side)
    left = side - width if flip else 0
    padded[..., :height, left : left + width] = part
    return padded
