"""Data folders as people have them, each listed as (image, mask or None) by split.

Everything behind this file works on `SegmentationData` and knows no layout.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cac_fast.train.data import names
from cac_fast.train.data.images import IGNORE, read_mask
from cac_fast.train.data.listing import (
    by_name,
    files,
    is_image,
    kinds,
    masks_by_name,
    pair,
    passed_over,
)
from cac_fast.train.errors import InputError

SPLITS = ("train", "val", "test")

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

VOC_BORDER_COLOR = (224, 224, 192)

# Names under which 255 is listed by those who know that it is ignored.
_IGNORED_NAMES = re.compile(
    r"ignore|void|un-?\s?label|unknown|undefined|unclassified|none|null|border|edge|bound|don'?t|"
    r"outside|invalid|no.?label|no.?data|mask",
    re.IGNORECASE,
)

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
    ignore_color: tuple[int, int, int] | None = None
    """The color of 255 in masks that hold colors."""
    notes: tuple[str, ...] = ()
    """What a user should know of the listing: masks of no image, files passed over."""

    @property
    def num_classes(self) -> int:
        """How many classes there are, 255 (ignore) not being one."""
        return len(self.classes)

    def read_mask(self, path: Path) -> np.ndarray:
        """The mask as class ids, uint8 (H, W), 255 = ignore; raises as `images.read_mask`."""
        if self.label_map is not None and path.name.endswith(_LABEL_IDS_END):
            return read_mask(path, self.num_classes, self.label_map)
        return read_mask(path, self.num_classes, None, self.palette, self.ignore_color)

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
    splits, notes = _cityscapes_splits(root)
    return SegmentationData(
        "toycity", root, tuple(toycity.CLASSES), tuple(toycity.PALETTE), splits, notes=notes
    )


def _open_cityscapes(root: Path) -> SegmentationData:
    tables = (CITYSCAPES_CLASSES, CITYSCAPES_PALETTE)
    splits, notes = _cityscapes_splits(root)
    return SegmentationData("cityscapes", root, *tables, splits, CITYSCAPES_LABEL_MAP, notes=notes)


def _cityscapes_splits(root: Path) -> tuple[dict[str, tuple[Sample, ...]], tuple[str, ...]]:
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
        splits[split] = _samples(images, matched)
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


def _open_voc(root: Path) -> SegmentationData:
    places = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    home = next((place for place in places if (place / "JPEGImages").is_dir()), None)
    if home is None:
        raise InputError(
            f"no JPEGImages folder was found in {root}, {root}/VOC2012 or "
            f"{root}/VOCdevkit/VOC2012: give the folder that holds JPEGImages"
        )
    folders = [
        home / kind
        for kind in ("SegmentationClassAug", "SegmentationClass")
        if (home / kind).is_dir()
    ]
    if not folders:
        raise InputError(
            f"{home} holds neither SegmentationClassAug nor SegmentationClass: "
            "unpack the masks beside JPEGImages"
        )
    found = list(files(home / "JPEGImages"))
    notes = _passed_over(home / "JPEGImages", found)
    images = by_name(found, lambda path: path.stem)
    # Some copies of SegmentationClassAug lack the masks of val.
    labels: dict[str, Path] = {}
    for folder in reversed(folders):
        masks = masks_by_name(files(folder), lambda path: path.stem)
        matched, said = pair(images, masks, f"the masks in {folder}")
        labels |= matched
        notes += said
    lists = home / "ImageSets" / "Segmentation"
    val = _voc_names(lists / "val.txt", images)
    train_list = lists / "trainaug.txt"
    if not train_list.is_file() and folders[0].name != "SegmentationClassAug":
        train_list = lists / "train.txt"
    if not train_list.is_file():
        # The augmented set is all that has a mask and is not of val.
        train = sorted(labels.keys() - set(val))
    else:
        train = _voc_names(train_list, images)
    splits = {
        split: _samples({name: images[name] for name in chosen}, labels)
        for split, chosen in zip(SPLITS, (train, val, ()), strict=True)
    }
    if not splits["train"]:
        raise InputError(
            f"no training image was found in {home} (ImageSets/Segmentation/trainaug.txt, "
            f"train.txt, or masks in {folders[0].name}): add a list or masks"
        )
    tables = (VOC_CLASSES, VOC_PALETTE)
    ignored = {"ignore_color": VOC_BORDER_COLOR, "notes": tuple(notes)}
    return SegmentationData("voc", home, *tables, splits, **ignored)


def _voc_names(path: Path, images: dict[str, Path]) -> list[str]:
    """Names in a VOC list; some copies hold `/JPEGImages/NAME.jpg ...` lines instead."""
    if not path.is_file():
        return []
    loose = {names.folded(name): name for name in images}

    def find(text: str) -> str | None:
        for form in names.spellings(text):
            last = form.rpartition("/")[2]
            for name in (form, last, names.without_suffix(last)):
                if name in images:
                    return name
            if (name := loose.get(names.folded(last))) is not None:
                return name
        return None

    found = []
    for number, line in names.read_list(path):
        texts = (line, *(image for image, _ in names.columns(line)))
        name = next((name for text in texts if (name := find(text)) is not None), None)
        if name is None:
            wanted = names.without_suffix(Path(line.split()[0]).name)
            near = names.nearest(wanted, images)
            raise InputError(
                f"{path} line {number}: there is no image {wanted} in {path.parents[2]}/JPEGImages"
                f"{f' (the nearest name is {near})' if near else ''}: "
                "add the image or remove the line"
            )
        found.append(name)
    return list(dict.fromkeys(found))


def _open_folder(root: Path) -> SegmentationData:
    classes, palette, ignored = _read_classes(root / "classes.txt")
    splits, notes = {}, []
    if ignored is not None and not _IGNORED_NAMES.search(ignored[0]):
        notes.append(
            f"{root / 'classes.txt'} gives the id {IGNORE} to '{ignored[0]}', but {IGNORE} is "
            "always ignored: it is no class, give it another id if it should be learned"
        )

    def below(folder: Path) -> Callable[[Path], str]:
        return lambda path: path.relative_to(folder).with_suffix("").as_posix()

    for split in SPLITS:
        places = root / "images" / split, root / "masks" / split
        found = [list(files(place)) for place in places]
        images = by_name(found[0], below(places[0]))
        masks = masks_by_name(found[1], below(places[1]))
        matched, said = pair(images, masks, f"the masks in {places[1]}")
        splits[split] = _samples(images, matched)
        notes += said
        for place, paths in zip(places, found, strict=True):
            notes += _passed_over(place, paths)
    if not splits["train"]:
        suffixes = ", ".join(suffix[1:] for suffix in names.IMAGE_SUFFIXES)
        raise InputError(
            f"no image was found in {root / 'images' / 'train'} ({suffixes}): put the training "
            "images there"
        )
    color = None if ignored is None else ignored[1]
    return SegmentationData(
        "folder", root, classes, palette, splits, ignore_color=color, notes=tuple(notes)
    )


def _passed_over(folder: Path, paths: list[Path]) -> list[str]:
    counts = passed_over(paths)
    if not counts:
        return []
    return [f"{counts.total()} files in {folder} are of other kinds and not read: {kinds(counts)}"]


def _samples(images: dict[str, Path], masks: dict[str, Path]) -> tuple[Sample, ...]:
    """The images sorted by name, with the masks that they have."""
    return tuple(Sample(name, images[name], masks.get(name)) for name in sorted(images))


def _read_classes(
    path: Path,
) -> tuple[
    tuple[str, ...], tuple[tuple[int, int, int], ...], tuple[str, tuple[int, int, int]] | None
]:
    """Names and colors of the classes, and of 255 if it has a line."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: write one line `id name R G B` for each class")
    rows: dict[int, tuple[str, tuple[int, int, int]]] = {}
    for number, line in names.read_list(path):
        # Class names are printed: bytes that are no text would stop a run at its end.
        words = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").split()
        try:
            index, *color = (int(word) for word in (words[0], *words[-3:]))
        except ValueError:
            index, color = -1, []
        if len(words) < 5 or not 0 <= index <= 255 or not all(0 <= c <= 255 for c in color):
            raise InputError(
                f"{path} line {number}: {line!r} is not `id name R G B` with numbers from 0 to 255"
            )
        if index in rows:
            raise InputError(f"{path} line {number}: the id {index} is there twice: renumber it")
        rows[index] = (" ".join(words[1:-3]), (color[0], color[1], color[2]))
    ignored = rows.pop(IGNORE, None)
    if sorted(rows) != list(range(len(rows))) or not rows:
        raise InputError(
            f"{path}: the ids must be 0, 1, 2, ... without gaps ({IGNORE} is ignored), but are "
            f"{', '.join(map(str, sorted(rows))) or 'none'}: renumber them, in the masks too"
        )
    ordered = [rows[index] for index in range(len(rows))]
    return tuple(name for name, _ in ordered), tuple(color for _, color in ordered), ignored
