"""Data folders as people have them, each listed as (image, mask or None) by split.

A layout is a function of a folder, one file each here; the registry names them. Everything behind
this file works on `SegmentationData` and knows no layout.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cac_fast.train.data.images import read_mask
from cac_fast.train.errors import InputError
from cac_fast.train.registry import LAYOUTS

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """One image, by a name that is unique in its split, and its mask if there is one."""

    name: str
    image: Path
    mask: Path | None


@dataclass(frozen=True)
class SegmentationData:
    """A data folder: what its classes are and which images each split holds, sorted by name."""

    dataset: str
    root: Path
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    splits: dict[str, tuple[Sample, ...]]
    label_map: tuple[int, ...] | None = None
    """The class of each id in a mask, where masks hold other ids than those of the classes."""
    ignore_color: tuple[int, int, int] | None = None
    """The color of 255 in masks that hold colors."""
    notes: tuple[str, ...] = ()
    """What a user should know of the listing: masks of no image, files passed over."""
    lists: tuple[Path, Path] | None = None
    """The data's own lists of labeled and unlabeled images, where users give none and no share."""

    @property
    def num_classes(self) -> int:
        """How many classes there are, 255 (ignore) not being one."""
        return len(self.classes)

    def read_mask(self, path: Path) -> np.ndarray:
        """The mask as class ids, uint8 (H, W), 255 = ignore; raises as `images.read_mask`."""
        return read_mask(path, self.num_classes, self.label_map, self.palette, self.ignore_color)

    def find_mask(self, path: Path) -> Path | None:
        """`path`, or the file that this layout has in its place; None if neither exists."""
        return path if os.path.isfile(path) else None  # Path's raises for a name that is too long


def open_data(dataset: str, data_dir: Path | None) -> SegmentationData:
    """List a data folder, or make the data if `dataset` is one that the program makes itself.

    dataset: a name of the registry, or code of your own as `module:name`.

    Raises:
        InputError: the folder or a part of it is missing, its classes.txt or a list in it is
            malformed, or it holds no training image; there is no such layout, or code outside the
            project returns something else.
    """
    open_layout, made_in = LAYOUTS.load(dataset), LAYOUTS.entry(dataset).made_in
    if made_in is None and data_dir is None:
        raise InputError(f"the dataset {dataset} needs its folder: give --data-dir")
    root = Path(made_in if data_dir is None else data_dir)
    if made_in is None and not root.is_dir():
        raise InputError(f"the data folder {root} does not exist: correct --data-dir")
    data = open_layout(root)
    if not isinstance(data, SegmentationData):
        raise InputError(
            f"--dataset {dataset}: it returns a {type(data).__name__}, not a SegmentationData"
        )
    return data


def paired_samples(images: dict[str, Path], masks: dict[str, Path]) -> tuple[Sample, ...]:
    """The images sorted by name, with the masks that they have."""
    return tuple(Sample(name, images[name], masks.get(name)) for name in sorted(images))
