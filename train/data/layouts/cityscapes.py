"""Cityscapes as it is published: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cac_fast.train.data.images import IGNORE, read_mask
from cac_fast.train.data.layouts import SPLITS, Sample, SegmentationData, paired_samples
from cac_fast.train.data.listing import files, is_image, pair
from cac_fast.train.errors import InputError

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle",
)  # fmt: skip
CITYSCAPES_PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
# Cityscapes' label ids of the 19 classes, in order; ids 0 to 33 that are not here are ignored.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_UNKNOWN_ID = 254
CITYSCAPES_LABEL_MAP = tuple(
    _CITYSCAPES_IDS.index(i) if i in _CITYSCAPES_IDS else IGNORE if i < 34 or i == 255
    else _UNKNOWN_ID
    for i in range(256)
)  # fmt: skip

_IMAGE_END = "_leftImg8bit.png"
_TRAIN_IDS_END = "_gtFine_labelTrainIds.png"
_LABEL_IDS_END = "_gtFine_labelIds.png"


class CityscapesData(SegmentationData):
    """Masks are labelTrainIds files, which hold classes, or labelIds files, which are mapped."""

    def read_mask(self, path: Path) -> np.ndarray:
        if path.name.endswith(_LABEL_IDS_END):
            return read_mask(path, self.num_classes, self.label_map)
        return read_mask(path, self.num_classes, None, self.palette)

    def find_mask(self, path: Path) -> Path | None:
        if not os.path.isfile(path) and path.name.endswith(_TRAIN_IDS_END):
            path = path.with_name(path.name.removesuffix(_TRAIN_IDS_END) + _LABEL_IDS_END)
        return super().find_mask(path)


def open_cityscapes(root: Path) -> SegmentationData:
    """List the folder that holds leftImg8bit and gtFine."""
    tables = (CITYSCAPES_CLASSES, CITYSCAPES_PALETTE)
    splits, notes = cityscapes_splits(root)
    return CityscapesData("cityscapes", root, *tables, splits, CITYSCAPES_LABEL_MAP, notes=notes)


def cityscapes_splits(root: Path) -> tuple[dict[str, tuple[Sample, ...]], tuple[str, ...]]:
    """The images of every split with their masks, and what there is to say about them."""
    if not (root / "leftImg8bit").is_dir():
        raise InputError(
            f"{root} is not in the Cityscapes layout (leftImg8bit/SPLIT/CITY/*{_IMAGE_END} was "
            "looked for): give the folder that holds leftImg8bit and gtFine"
        )

    def named(paths: Iterable[Path], end: str) -> dict[str, Path]:
        return {
            f"{path.parent.name}/{path.name.removesuffix(end)}": path
            for path in paths
            if path.name.endswith(end)
        }

    splits, notes = {}, []
    for split in SPLITS:
        folder = root / "gtFine" / split
        found = list(files(folder))
        masks = named(found, _LABEL_IDS_END) | named(found, _TRAIN_IDS_END)
        found = list(files(root / "leftImg8bit" / split))
        images = named(found, _IMAGE_END)
        matched, said = pair(images, masks, f"the masks in {folder}")
        splits[split] = paired_samples(images, matched)
        notes += said
        others = sum(is_image(path) for path in found) - len(images)
        if others:
            notes.append(
                f"{others} images in {root / 'leftImg8bit' / split} were passed over: their names "
                f"do not end with {_IMAGE_END}"
            )
    if not any(splits.values()):
        raise InputError(
            f"no image was found in {root} (leftImg8bit/SPLIT/CITY/*{_IMAGE_END} with SPLIT "
            "train, val or test): unpack leftImg8bit_trainvaltest.zip there"
        )
    return splits, tuple(notes)
