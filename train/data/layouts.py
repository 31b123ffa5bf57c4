"""Data folders as people have them, each listed as (image, mask or None) by split.

Everything behind this file works on `SegmentationData` and knows no layout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cac_fast.train.data.images import IGNORE, read_mask
from cac_fast.train.errors import InputError

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

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

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
VOC_PALETTE = (
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
    (128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128),
    (192, 0, 128), (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0),
    (128, 192, 0), (0, 64, 128),
)  # fmt: skip

_IMAGE_END = "_leftImg8bit.png"
_TRAIN_IDS_END = "_gtFine_labelTrainIds.png"
_LABEL_IDS_END = "_gtFine_labelIds.png"


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
    """The class of each id in Cityscapes' labelIds files; other masks hold classes already."""

    @property
    def num_classes(self) -> int:
        """How many classes there are, 255 (ignore) not being one."""
        return len(self.classes)

    def read_mask(self, path: Path) -> np.ndarray:
        """The mask as class ids, uint8 (H, W), 255 = ignore; raises as `images.read_mask`."""
        by_ids = path.name.endswith(_LABEL_IDS_END)
        return read_mask(path, self.num_classes, self.label_map if by_ids else None)

    def find_mask(self, path: Path) -> Path | None:
        """`path`, or the labelIds file in place of a labelTrainIds one; None if neither exists."""
        if os.path.isfile(path):  # Path's would raise for a name too long for a file
            return path
        if self.label_map is not None and path.name.endswith(_TRAIN_IDS_END):
            other = path.with_name(path.name.removesuffix(_TRAIN_IDS_END) + _LABEL_IDS_END)
            return other if os.path.isfile(other) else None
        return None


def open_data(dataset: str, data_dir: Path | None) -> SegmentationData:
    """List a data folder. `dataset` is cityscapes, voc, folder or toycity (written if missing).

    Raises:
        InputError: the folder or a part of it is missing, its classes.txt or a list in it is
            malformed, or it holds no training image.
    """
    if dataset == "toycity":
        return _open_toycity(Path("data/toycity") if data_dir is None else Path(data_dir))
    readers = {"cityscapes": _open_cityscapes, "voc": _open_voc, "folder": _open_folder}
    if dataset not in readers:
        raise InputError(
            f"there is no dataset called {dataset}: choose cityscapes, voc, folder or toycity"
        )
    if data_dir is None:
        raise InputError(f"the dataset {dataset} needs its folder: give --data-dir")
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"the data folder {root} does not exist: correct --data-dir")
    return readers[dataset](root)


def _open_toycity(root: Path) -> SegmentationData:
    from cac_fast.train.data import toycity

    toycity.ensure(root)
    return SegmentationData(
        "toycity", root, tuple(toycity.CLASSES), tuple(toycity.PALETTE), _cityscapes_splits(root)
    )


def _open_cityscapes(root: Path) -> SegmentationData:
    tables = (CITYSCAPES_CLASSES, CITYSCAPES_PALETTE)
    splits = _cityscapes_splits(root)
    return SegmentationData("cityscapes", root, *tables, splits, CITYSCAPES_LABEL_MAP)


def _cityscapes_splits(root: Path) -> dict[str, tuple[Sample, ...]]:
    images = root / "leftImg8bit"
    if not images.is_dir():
        raise InputError(
            f"{root} is not in the Cityscapes layout (leftImg8bit/SPLIT/CITY/*{_IMAGE_END} was "
            "looked for): give the folder that holds leftImg8bit and gtFine"
        )
    splits = {}
    for split in SPLITS:
        masks = set(_files(root / "gtFine" / split))
        samples = []
        for path in _files(images / split):
            if not path.name.endswith(_IMAGE_END):
                continue
            name = f"{path.parent.name}/{path.name.removesuffix(_IMAGE_END)}"
            stem = root / "gtFine" / split / name
            ends = (_TRAIN_IDS_END, _LABEL_IDS_END)
            found = (stem.with_name(stem.name + end) for end in ends)
            mask = next((path for path in found if path in masks), None)
            samples.append(Sample(name, path, mask))
        splits[split] = _sorted(samples)
    if not any(splits.values()):
        raise InputError(
            f"no image was found in {root} (leftImg8bit/SPLIT/CITY/*{_IMAGE_END} with SPLIT "
            "train, val or test): unpack leftImg8bit_trainvaltest.zip there"
        )
    return splits


def _open_voc(root: Path) -> SegmentationData:
    places = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    home = next((place for place in places if (place / "JPEGImages").is_dir()), None)
    if home is None:
        raise InputError(
            f"no JPEGImages folder was found in {root}, {root}/VOC2012 or "
            f"{root}/VOCdevkit/VOC2012: give the folder that holds JPEGImages"
        )
    kinds = ("SegmentationClassAug", "SegmentationClass")
    masks = [home / kind for kind in kinds if (home / kind).is_dir()]
    if not masks:
        raise InputError(
            f"{home} holds neither SegmentationClassAug nor SegmentationClass: "
            "unpack the masks beside JPEGImages"
        )
    images = {path.stem: path for path in _files(home / "JPEGImages") if _is_image(path)}
    # Some copies of SegmentationClassAug lack the masks of val.
    labels = {
        path.stem: path
        for folder in reversed(masks)
        for path in _files(folder)
        if path.suffix.lower() == ".png"
    }
    lists = home / "ImageSets" / "Segmentation"
    val = _voc_names(lists / "val.txt", images)
    train_list = lists / "trainaug.txt"
    if not train_list.is_file() and masks[0].name != "SegmentationClassAug":
        train_list = lists / "train.txt"
    if not train_list.is_file():
        # The augmented set is all that has a mask and is not of val.
        train = sorted(labels.keys() & images.keys() - set(val))
    else:
        train = _voc_names(train_list, images)
    splits = {
        split: _sorted([Sample(name, images[name], labels.get(name)) for name in names])
        for split, names in zip(SPLITS, (train, val, ()), strict=True)
    }
    if not splits["train"]:
        raise InputError(
            f"no training image was found in {home} (ImageSets/Segmentation/trainaug.txt, "
            f"train.txt, or masks in {masks[0].name}): add a list or masks"
        )
    return SegmentationData("voc", home, VOC_CLASSES, VOC_PALETTE, splits)


def _voc_names(path: Path, images: dict[str, Path]) -> list[str]:
    """Names in a VOC list; some copies hold `/JPEGImages/NAME.jpg ...` lines instead."""
    if not path.is_file():
        return []
    names = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        name = Path(line.split()[0]).stem
        if name not in images:
            raise InputError(
                f"{path} line {number}: there is no image {name} in {path.parents[2]}/JPEGImages: "
                "add the image or remove the line"
            )
        names.append(name)
    return list(dict.fromkeys(names))


def _open_folder(root: Path) -> SegmentationData:
    classes, palette = _read_classes(root / "classes.txt")
    splits = {}
    for split in SPLITS:
        images = root / "images" / split
        masks = root / "masks" / split
        labels = {
            path.relative_to(masks).with_suffix("").as_posix(): path
            for path in _files(masks)
            if path.suffix.lower() == ".png"
        }
        samples: dict[str, Sample] = {}
        for path in _files(images):
            if not _is_image(path):
                continue
            name = path.relative_to(images).with_suffix("").as_posix()
            if name in samples:
                raise InputError(
                    f"{samples[name].image} and {path} have the same name: rename one of them"
                )
            samples[name] = Sample(name, path, labels.get(name))
        splits[split] = _sorted(list(samples.values()))
    if not splits["train"]:
        raise InputError(
            f"no image was found in {root / 'images' / 'train'} "
            f"({', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}): put the training images there"
        )
    return SegmentationData("folder", root, classes, palette, splits)


def _read_classes(path: Path) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: write one line `id name R G B` for each class")
    rows: dict[int, tuple[str, tuple[int, int, int]]] = {}
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            index, *color = (int(word) for word in (words[0], *words[-3:]))
        except ValueError:
            index, color = -1, []
        if len(words) < 5 or not 0 <= index <= 255 or not all(0 <= c <= 255 for c in color):
            raise InputError(
                f"{path} line {number}: {line.strip()!r} is not `id name R G B` with numbers from "
                "0 to 255"
            )
        if index in rows:
            raise InputError(f"{path} line {number}: the id {index} is there twice: renumber it")
        rows[index] = (" ".join(words[1:-3]), (color[0], color[1], color[2]))
    rows.pop(IGNORE, None)
    if sorted(rows) != list(range(len(rows))) or not rows:
        raise InputError(
            f"{path}: the ids must be 0, 1, 2, ... without gaps ({IGNORE} is ignored), but are "
            f"{', '.join(map(str, sorted(rows))) or 'none'}: renumber them, in the masks too"
        )
    ordered = [rows[index] for index in range(len(rows))]
    return tuple(name for name, _ in ordered), tuple(color for _, color in ordered)


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, links to folders included, hidden ones left out; none without it."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield Path(place, name)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _sorted(samples: list[Sample]) -> tuple[Sample, ...]:
    return tuple(sorted(samples, key=lambda sample: sample.name))
