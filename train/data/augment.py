"""From an image of any size to crops: resize, crop, photometric changes, padding, flip.

Only the part of the image under the crops is resized, which gives the same pixels as resizing all
of it. Both crops of a pair are cut from one resized region, so shared locations hold equal pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from cac_fast.train.data.crops import CELL, draw_box, draw_pair, draw_size, whole_cells
from cac_fast.train.data.images import IGNORE, IMAGENET_MEAN
from cac_fast.train.errors import InputError

PADDING_COLOR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)


class LabeledTransform:
    """Random resize, crop and flip of an image and its mask.

    Args:
        crop: side of the crop in pixels, a multiple of 8.
        scale: range of the resize ratio, or of the long side in units of `base_size`.
        base_size: None for the paper's ratio, a number of pixels for the authors' long side.
        jitter: also change every crop's colours (the authors do for Cityscapes).

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
        self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """image RGB (H, W), mask uint8 (H, W) -> "image" uint8 (3, c, c), "label" uint8 (c, c)."""
        height, width = draw_size(image.height, image.width, self.scale, rng, self.base_size)
        top, left = draw_box(height, width, self.crop, rng)
        flip = bool(rng.random() < 0.5)
        box = (top, left, min(top + self.crop, height), min(left + self.crop, width))
        part = resize_part(image, (height, width), box, Image.Resampling.BILINEAR)
        if self.jitter:
            part = color_jitter(part, rng)
        labels = resize_part(Image.fromarray(mask), (height, width), box, Image.Resampling.NEAREST)
        return {
            "image": _image_tensor(part, self.crop, flip),
            "label": torch.from_numpy(_pad_and_flip(np.asarray(labels), self.crop, flip, IGNORE)),
        }


class UnlabeledTransform:
    """One random resize and two overlapping crops of it, each with its own flip and colours.

    Args:
        crop, scale, base_size: as `LabeledTransform`.
        iou_range: closed range of the boxes' intersection over union.
        photometric: False leaves the pixels as they are.

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
        self, image: Image.Image, mask: np.ndarray | None, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Two crops and where they are.

        Returns, with c the crop's side and v = 1, 2 the view: "imagev" uint8 (3, c, c); "offset"
        int64 (2,), view 2's box minus view 1's in cells (down, right); "flipv" bool (); "validv"
        int64 (2,), rows and columns of cells on the image, before the flip; and, with a mask
        uint8 (H, W), "truthv" uint8 (c/8, c/8), the id at the centre of each cell, flipped as its
        image is, 255 where unknown.
        """
        crop = self.crop
        height, width = draw_size(image.height, image.width, self.scale, rng, self.base_size)
        pair = draw_pair(height, width, crop, self.iou_range, rng)
        boxes = ((pair.top1, pair.left1, pair.flip1), (pair.top2, pair.left2, pair.flip2))
        top0, left0 = min(pair.top1, pair.top2), min(pair.left1, pair.left2)
        bottom = min(max(pair.top1, pair.top2) + crop, height)
        right = min(max(pair.left1, pair.left2) + crop, width)
        region = (top0, left0, bottom, right)
        part = resize_part(image, (height, width), region, Image.Resampling.BILINEAR)
        if mask is not None:
            labels = np.asarray(
                resize_part(
                    Image.fromarray(mask), (height, width), region, Image.Resampling.NEAREST
                )
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
                cut = photometric(cut, rng)
            item[f"image{view}"] = _image_tensor(cut, crop, flip)
            item[f"flip{view}"] = torch.tensor(flip)
            item[f"valid{view}"] = torch.tensor(whole_cells(top, left, height, width, crop))
            if mask is not None:
                # Sampled before the flip: both views must take the same pixel of a shared cell.
                half = CELL // 2
                centers = labels[y + half : y + crop : CELL, x + half : x + crop : CELL]
                item[f"truth{view}"] = torch.from_numpy(
                    _pad_and_flip(centers, crop // CELL, flip, IGNORE)
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


def resize_part(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """The part `box` (top, left, bottom, right) of `image` resized to `size` (height, width)."""
    down, across = image.height / size[0], image.width / size[1]
    top, left, bottom, right = box
    source = (
        left * across,
        top * down,
        min(right * across, image.width),
        min(bottom * down, image.height),
    )
    return image.resize((right - left, bottom - top), resample, box=source)


def photometric(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur (5 x 5, p 0.5), colour jitter (p 0.8) and grey (p 0.2)."""
    blur, jitter, grey = rng.random(3) < (0.5, 0.8, 0.2)
    sigma = rng.uniform(0.1, 2.0)
    if blur and min(image.size) > 2:  # the border is reflected, which takes 3 pixels
        image = functional.gaussian_blur(image, [5, 5], [sigma, sigma])
    if jitter:
        image = color_jitter(image, rng)
    return functional.rgb_to_grayscale(image, num_output_channels=3) if grey else image


def color_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation (each within 0.4) and hue (0.1) in random order."""
    changes = (
        (functional.adjust_brightness, rng.uniform(0.6, 1.4)),
        (functional.adjust_contrast, rng.uniform(0.6, 1.4)),
        (functional.adjust_saturation, rng.uniform(0.6, 1.4)),
        (functional.adjust_hue, rng.uniform(-0.1, 0.1)),
    )
    for index in rng.permutation(len(changes)):
        change, amount = changes[index]
        image = change(image, amount)
    return image


def _image_tensor(part: Image.Image, crop: int, flip: bool) -> Tensor:
    padded = _pad_and_flip(np.asarray(part), crop, flip, PADDING_COLOR)
    return torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1)))


def _pad_and_flip(
    part: np.ndarray, side: int, flip: bool, fill: int | tuple[int, ...]
) -> np.ndarray:
    """`part` at the top left of a `side` x `side` array of `fill`, then flipped left to right."""
    if part.shape[:2] != (side, side):
        padded = np.empty((side, side, *part.shape[2:]), np.uint8)
        padded[:] = fill
        padded[: part.shape[0], : part.shape[1]] = part
        part = padded
    # A copy either way: torch wants memory that is writable and without negative strides.
    return np.array(part[:, ::-1] if flip else part)
