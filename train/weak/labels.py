"""Which classes are in an image: from a file of labels, VOC's annotations, or the masks."""

from __future__ import annotations

import hashlib
import json
import shlex
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cac_fast.train.data import names
from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.lists import Finder
from cac_fast.train.data.threads import in_threads
from cac_fast.train.errors import InputError, did_you_mean

FROM_MASKS = "from-masks"
BACKGROUND_NAME = "background"

Labels = tuple[int, ...]
"""The ids of an image's classes, rising, without the background."""


@dataclass(frozen=True)
class ImageLabels:
    """The images that have labels, and their labels.

    found: one line on where they come from. from_masks: how many were read from masks.
    """

    samples: tuple[Sample, ...]
    labels: tuple[Labels, ...]
    found: str
    from_masks: int = 0

    def digest(self) -> str:
        """What tells these labels from others."""
        rows = [[sample.name, ids] for sample, ids in zip(self.samples, self.labels, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def background_of(data: SegmentationData) -> int | None:
    """The id of the class `background`, None in data that has none."""
    return data.classes.index(BACKGROUND_NAME) if BACKGROUND_NAME in data.classes else None


def foreground_of(data: SegmentationData) -> Labels:
    """The ids of all other classes."""
    return tuple(i for i, name in enumerate(data.classes) if name != BACKGROUND_NAME)


def find_labels(
    option: str | None, samples: Sequence[Sample], data: SegmentationData
) -> ImageLabels:
    """The labels of those of the images that have some.

    option: the label file, "from-masks", or None for VOC's annotations.

    Raises:
        InputError: there is nothing to read labels from, it cannot be used, or no image has a
            foreground class.
    """
    if option is None and data.dataset != "voc":
        raise InputError(
            f"--image-labels is needed for --dataset {data.dataset}: give a file with lines "
            f"`NAME class class ...`, or {FROM_MASKS} for the classes of the masks"
        )
    masks_read = 0
    if option is None:
        found, masks_read = _of_annotations(samples, data)
        said = f"the objects of {data.root / 'Annotations'}"
        if masks_read:
            said += f", of {masks_read} without a file there the classes of the MASKS"
    elif option == FROM_MASKS:
        found = _of_masks(samples, data)
        masks_read, said = len(found), "the classes of the MASKS (for experiments)"
    else:
        found, said = read_labels(Path(option), data), option
    used = [sample for sample in samples if sample.image in found]
    labels = tuple(found[sample.image] for sample in used)
    if not any(labels):
        raise InputError(
            f"image labels from {said}: there is no label at all for the {len(samples)} training "
            "images: name a class for some of them"
        )
    text = f"image labels: {said}; {len(used)} images, {len(samples) - len(used)} others have none"
    if (beside := len(found) - len(used)) > 0:
        text += f", {beside} labeled images are not of the training lists"
    return ImageLabels(tuple(used), labels, text, masks_read)


def read_labels(path: Path, data: SegmentationData) -> dict[Path, Labels]:
    """The labels of a file, by image: a line is NAME, then class names.

    A line with a tab is split at tabs, another one as a shell does it. NAME is what it is in lists
    of images.

    Raises:
        InputError: there is no such file, or a line names what is not there or an image again.
    """
    ids = {_normal(name): index for index, name in enumerate(data.classes)}
    background = background_of(data)
    finder, found, places = Finder(data), {}, {}
    for number, line in names.read_list(path):
        place = f"{path} line {number}"
        name, *classes = _words(line, place)
        image = finder.sample(name, place, needs_mask=False).image
        if image in found:
            raise InputError(
                f"{place}: the image {name} is in line {places[image]} already: join the two lines"
            )
        indices = {_known(text, ids, place) for text in classes}
        found[image], places[image] = tuple(sorted(indices - {background})), number
    return found


def _words(line: str, place: str) -> list[str]:
    if "\t" in line:
        return [word.strip() for word in line.split("\t") if word.strip()]
    try:
        return shlex.split(line)
    except ValueError as error:
        raise InputError(
            f"{place}: {line!r} cannot be split ({str(error).lower()}): put names with blanks in "
            "quotes, or use tabs between all names"
        ) from error


def _known(text: str, ids: dict[str, int], place: str | Path) -> int:
    name = _normal(text)
    if name not in ids:
        hint = did_you_mean(name, ids) or f" (the classes are {names.some(ids, 30)})"
        raise InputError(f"{place}: unknown class {text!r}{hint}")
    return ids[name]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _of_masks(samples: Iterable[Sample], data: SegmentationData) -> dict[Path, Labels]:
    ignored = {IGNORE, background_of(data)}
    with_mask = [sample for sample in samples if sample.mask is not None]

    def read(sample: Sample) -> Labels:
        ids = np.unique(data.read_mask(sample.mask)).tolist()
        return tuple(i for i in ids if i not in ignored)

    found = in_threads(read, with_mask)
    return {sample.image: labels for sample, labels in zip(with_mask, found, strict=True)}


def classes_in_masks(samples: Iterable[Sample], data: SegmentationData) -> list[Labels]:
    """The labels of images that all have a mask, by their masks."""
    return list(_of_masks(samples, data).values())


def _of_annotations(
    samples: Sequence[Sample], data: SegmentationData
) -> tuple[dict[Path, Labels], int]:
    """The objects of Annotations/NAME.xml, or the mask's classes; how many masks were read."""
    ids, background = {name: i for i, name in enumerate(data.classes)}, background_of(data)
    paths = {sample: data.root / "Annotations" / f"{sample.image.stem}.xml" for sample in samples}
    there = {sample: path for sample, path in paths.items() if path.is_file()}

    def read(path: Path) -> Labels:
        try:
            objects = ElementTree.parse(path).findall("object/name")
        except (OSError, ElementTree.ParseError) as error:
            raise InputError(
                f"annotation {path} cannot be read ({error}): replace or remove the file"
            ) from error
        indices = {_known((item.text or "").strip(), ids, path) for item in objects}
        return tuple(sorted(indices - {background}))

    labels = in_threads(read, list(there.values()))
    found = {sample.image: each for sample, each in zip(there, labels, strict=True)}
    masked = _of_masks([sample for sample in samples if sample not in there], data)
    return masked | found, len(masked)
