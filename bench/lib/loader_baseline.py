"""The paper's authors' way of making crops: decode, resize all of it, cut, jitter, to floats.

Written from the description of their method. Sizes, boxes and flips are drawn as the trainer draws
them, so that the crops can be compared. Colors: the order and ranges of theirs, drawn by
torchvision; the blur is Pillow's own, the cheapest at hand.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import functional

from cac_fast.train.data.augment import PADDING_COLOR
from cac_fast.train.data.crops import draw_box, draw_pair, draw_size
from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.layouts import Sample
from cac_fast.train.data.loaders import LABELED, UNLABELED, item_index, position_rng
from cac_fast.train.preprocessing import IMAGENET_MEAN, IMAGENET_STD

LABELED_SCALE, UNLABELED_SCALE, IOU_RANGE = (0.5, 2.0), (0.8, 2.0), (0.1, 1.0)
JITTER = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
GRAY = transforms.RandomGrayscale(0.2)
BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


@dataclass(frozen=True)
class LabeledCrops(Dataset):
    """Items "image", float (3, c, c), and "label", int64 (c, c); jitter as for Cityscapes."""

    samples: tuple[Sample, ...]
    crop: int
    base_size: int
    jitter: bool

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = position_rng(0, LABELED, position)
        sample = self.samples[item_index(0, LABELED, position, len(self.samples))]
        image, mask = decode(sample.image), Image.open(sample.mask)
        size = draw_size(image.height, image.width, LABELED_SCALE, rng, self.base_size)
        box = draw_box(*size, self.crop, rng)
        flip = rng.random() < 0.5
        image = cut(resize(image, size, BILINEAR), box, self.crop, flip, PADDING_COLOR)
        mask = cut(resize(mask, size, NEAREST), box, self.crop, flip, IGNORE)
        if self.jitter:
            image = JITTER(image)
        label = torch.from_numpy(np.array(mask, dtype=np.int64))
        return {"image": to_tensor(image), "label": label}


@dataclass(frozen=True)
class UnlabeledCrops(Dataset):
    """Two crops of one resized image, "image1" and "image2" float (3, c, c)."""

    samples: tuple[Sample, ...]
    crop: int
    base_size: int
    photometric: bool

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = position_rng(0, UNLABELED, position)
        sample = self.samples[item_index(0, UNLABELED, position, len(self.samples))]
        image = decode(sample.image)
        size = draw_size(image.height, image.width, UNLABELED_SCALE, rng, self.base_size)
        pair = draw_pair(*size, self.crop, IOU_RANGE, rng)
        image = resize(image, size, BILINEAR)
        boxes = ((pair.top1, pair.left1, pair.flip1), (pair.top2, pair.left2, pair.flip2))
        item = {}
        for view, (top, left, flip) in enumerate(boxes, start=1):
            crop = cut(image, (top, left), self.crop, flip, PADDING_COLOR)
            if self.photometric:
                crop = change_colors(crop)
            item[f"image{view}"] = to_tensor(crop)
        return item


def decode(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return image.resize(size[::-1], resample)


def cut(
    image: Image.Image, box: tuple[int, int], crop: int, flip: bool, fill: int | tuple[int, ...]
) -> Image.Image:
    """A crop of an image that is padded at the bottom and right where it is too small."""
    if image.height < crop or image.width < crop:
        padding = [0, 0, max(crop - image.width, 0), max(crop - image.height, 0)]
        image = functional.pad(image, padding, fill=fill)
    part = image.crop((box[1], box[0], box[1] + crop, box[0] + crop))
    return functional.hflip(part) if flip else part


def change_colors(image: Image.Image) -> Image.Image:
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    if random.random() < 0.8:
        image = JITTER(image)
    return GRAY(image)


def to_tensor(image: Image.Image) -> Tensor:
    return functional.normalize(functional.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)
