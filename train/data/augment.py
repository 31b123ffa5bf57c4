"""From an image of any size to crops: resize, crop, flip, padding, and photometric changes drawn.

Only the part of the image under the crops is read and resized, which gives the same pixels as
resizing all of it. Both crops of a pair are cut from one resized region, so shared locations hold
equal pixels. The photometric changes come later, to whole batches (`photometric`).

Images of batches are (B, 3, c, c) with the channels last in memory, as Pillow has them: the loader
need not reorder pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cac_fast.train.data.crops import CELL, draw_box, draw_pair, draw_size, whole_cells
from cac_fast.train.data.images import IGNORE, IMAGENET_MEAN
from cac_fast.train.data.photometric import draw_jitter, draw_photometric, set_place
from cac_fast.train.errors import InputError

Pixels = Image.Image | np.ndarray
"""An RGB image, or uint8 (H, W, 3); a mask, or uint8 (H, W). Arrays may be memory-mapped."""

PADDING_COLOR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)


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

    def __init__(
        self,
        crop: int,
        scale: tuple[float, float] = (0.5, 2.0),
        base_size: int | None = None,
        jitter: bool = False,
    ) -> None:
        self.crop, self.scale, self.base_size = check_crop(crop), scale, base_size
        self.jitter = jitter

    def __call__(
        self, image: Pixels, mask: np.ndarray, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """A crop and its labels.

        Returns, with c the crop's side: "image" uint8 (3, c, c), "label" uint8 (c, c) and, with
        jitter, "changes" float32 (13,) for `photometric.apply_photometric`.
        """
        size = image_size(image)
        height, width = draw_size(*size, self.scale, rng, self.base_size)
        top, left = draw_box(height, width, self.crop, rng)
        flip = bool(rng.random() < 0.5)
        box = (top, left, min(top + self.crop, height), min(left + self.crop, width))
        part = resize_part(image, (height, width), box, Image.Resampling.BILINEAR)
        labels = resize_part(mask, (height, width), box, Image.Resampling.NEAREST)
        item = {
            "image": _image_tensor(part, self.crop, flip),
            "label": torch.from_numpy(_flip_and_pad(labels, self.crop, flip, IGNORE)),
        }
        if self.jitter:
            item["changes"] = _placed(draw_jitter(rng), part, self.crop, flip)
        return item


class UnlabeledTransform:
    """One random resize and two overlapping crops of it, each with its own flip and colors.

    Args:
        crop, scale, base_size: as `LabeledTransform`.
        iou_range: closed range of the boxes' intersection over union.
        photometric: False leaves the colors as they are.

    Raises:
        InputError: `crop` is not a multiple of 8.
    """

    def __init__(
        self,
        crop: int,
        scale: tuple[float, float] = (0.8, 2.0),
        base_size: int | None = None,
        iou_range: tuple[float, float] = (0.1, 1.0),
        photometric: bool = True,
    ) -> None:
        self.crop, self.scale, self.base_size = check_crop(crop), scale, base_size
        self.iou_range, self.photometric = iou_range, photometric

    def __call__(
        self, image: Pixels, mask: np.ndarray | None, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Two crops of an RGB image and where they are.

        Returns, with c the crop's side and v = 1, 2 the view: "imagev" uint8 (3, c, c); "offset"
        int64 (2,), view 2's box minus view 1's in cells (down, right); "flipv" bool (); "validv"
        int64 (2,), rows and columns of cells on the image, before the flip; with photometric
        changes, "changesv" float32 (13,) for `photometric.apply_photometric`; and, with a mask
        uint8 (H, W), "truthv" uint8 (c/8, c/8), the id at the center of each cell, flipped as its
        image is, 255 where unknown.
        """
        crop = self.crop
        height, width = draw_size(*image_size(image), self.scale, rng, self.base_size)
        pair = draw_pair(height, width, crop, self.iou_range, rng)
        boxes = ((pair.top1, pair.left1, pair.flip1), (pair.top2, pair.left2, pair.flip2))
        top0, left0 = min(pair.top1, pair.top2), min(pair.left1, pair.left2)
        bottom = min(max(pair.top1, pair.top2) + crop, height)
        right = min(max(pair.left1, pair.left2) + crop, width)
        region = (top0, left0, bottom, right)
        part = resize_part(image, (height, width), region, Image.Resampling.BILINEAR)
        if mask is not None:
            labels = np.asarray(
                resize_part(mask, (height, width), region, Image.Resampling.NEAREST)
            )
        item = {
            "offset": torch.tensor(
                [(pair.top2 - pair.top1) // CELL, (pair.left2 - pair.left1) // CELL]
            )
        }
        for view, (top, left, flip) in enumerate(boxes, start=1):
            y, x = top - top0, left - left0
            cut = part.crop((x, y, min(x + crop, part.width), min(y + crop, part.height)))
            if self.photometric:
                item[f"changes{view}"] = _placed(draw_photometric(rng), cut, crop, flip)
            item[f"image{view}"] = _image_tensor(cut, crop, flip)
            item[f"flip{view}"] = torch.tensor(flip)
            item[f"valid{view}"] = torch.tensor(whole_cells(top, left, height, width, crop))
            if mask is not None:
                # Sampled before the flip: both views must take the same pixel of a shared cell.
                half = CELL // 2
                centers = labels[y + half : y + crop : CELL, x + half : x + crop : CELL]
                item[f"truth{view}"] = torch.from_numpy(
                    _flip_and_pad(Image.fromarray(centers), crop // CELL, flip, IGNORE)
                )
        return item


def check_crop(crop: int) -> int:
    """`crop` itself; InputError if it is not a positive multiple of 8."""
    if crop < CELL or crop % CELL:
        low = max(crop // CELL, 1) * CELL
        raise InputError(
            f"the crop size {crop} is not a multiple of {CELL}: use {low} or {low + CELL}"
        )
    return crop


def image_size(image: Pixels) -> tuple[int, int]:
    """Height and width."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def resize_part(
    image: Pixels,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """The part `box` (top, left, bottom, right) of `image` resized to `size` (height, width).

    By Pillow, since a box in fractions of a source pixel is what the other libraries' resize lacks.
    Of an array only the rows and columns that count are read.
    """
    bounds, source = [], []
    spans = zip(image_size(image), size, zip(box[:2], box[2:], strict=True), strict=True)
    for old, new, (first, last) in spans:
        ratio = old / new
        begin, end = first * ratio, min(last * ratio, old)
        reach = math.ceil(max(ratio, 1)) + 1  # of the bilinear filter, to either side
        low, high = max(int(begin) - reach, 0), min(int(end) + 1 + reach, old)
        bounds.append((low, high))
        source.append((begin - low, end - low))
    (top, bottom), (left, right) = bounds
    if isinstance(image, np.ndarray):
        part = Image.fromarray(image[top:bottom, left:right])
    else:
        part = image.crop((left, top, right, bottom))
    (y0, y1), (x0, x1) = source
    new_size = (box[3] - box[1], box[2] - box[0])
    return part.resize(new_size, resample, box=(x0, y0, x1, y1))


def _placed(changes: np.ndarray, part: Image.Image, crop: int, flip: bool) -> Tensor:
    left = crop - part.width if flip else 0
    set_place(changes, part.height, left, left + part.width)
    return torch.from_numpy(changes)


def _image_tensor(part: Image.Image, crop: int, flip: bool) -> Tensor:
    return torch.from_numpy(_flip_and_pad(part, crop, flip, PADDING_COLOR)).permute(2, 0, 1)


def _flip_and_pad(
    part: Image.Image, side: int, flip: bool, fill: int | tuple[int, ...]
) -> np.ndarray:
    """`part`, flipped left to right if asked for, in a `side` x `side` array of `fill`.

    Padding is at the bottom, and at the right before the flip.
    """
    if flip:  # by Pillow, which is faster than NumPy at pixels in reverse
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.array(part)
    if part.size == (side, side):
        return pixels
    padded = np.empty((side, side, *pixels.shape[2:]), np.uint8)
    padded[:] = fill
    left = side - part.width if flip else 0
    padded[: part.height, left : left + part.width] = pixels
    return padded
