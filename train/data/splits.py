"""Which training images are labeled: lists as users hold them, or seeded shares."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.errors import InputError

_MOST_SHOWN = 200
"""Characters of a line that a message repeats: the list may be any file."""


def select(
    data: SegmentationData,
    labeled: Path | None,
    unlabeled: Path | None,
    share: str | None,
    data_list: int = 0,
) -> tuple[list[Sample], list[Sample]]:
    """The labeled and the unlabeled training images.

    Either lists are given, or a `share` ("full", or a fraction such as "1/8") of the training
    images that have masks; with neither it is "full", but for toycity the lists written with it.
    Without an `unlabeled` list, what is not labeled is unlabeled. Where nothing is left, the
    unlabeled images are the labeled ones (the paper's full setting).

    A list line is a NAME of the train split, or `image mask`, or `image`, as paths from the data
    folder; a leading slash is dropped, so that the authors' lists are read as they are.

    Raises:
        InputError: a list is missing, empty, or names what is not there (with its line); a
            labeled line has no mask; a share is no fraction or leaves no labeled image; both
            lists and a share are given.
    """
    train = data.splits["train"]
    if share is not None and labeled is not None:
        raise InputError(
            f"both --labeled {labeled} and --labeled-share {share} are given: give one of them"
        )
    if share is None and labeled is None and unlabeled is None and data.dataset == "toycity":
        labeled, unlabeled = (data.root / "lists" / f"{n}.txt" for n in ("labeled", "unlabeled"))
    if labeled is not None:
        chosen = _read_list(Path(labeled), data, needs_mask=True)
        taken = {sample.image for sample in chosen}
        rest = [sample for sample in train if sample.image not in taken]
    else:
        chosen, rest = _select_share(data, "full" if share is None else share, data_list)
    if unlabeled is not None:
        rest = _read_list(Path(unlabeled), data, needs_mask=False)
    return chosen, rest or chosen


def write_lists(output: Path, labeled: list[Sample], unlabeled: list[Sample], root: Path) -> None:
    """Write labeled.txt and unlabeled.txt into `output`, as `image mask` paths from `root`.

    The paths are separated by a tab instead of a space where one of them holds a space.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name, samples in (("labeled", labeled), ("unlabeled", unlabeled)):
        lines = []
        for sample in samples:
            paths = [path for path in (sample.image, sample.mask) if path is not None]
            words = [path.relative_to(root).as_posix() for path in paths]
            lines.append(("\t" if any(" " in word for word in words) else " ").join(words) + "\n")
        (output / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def named(samples: Sequence[Sample], path: Path) -> list[Sample]:
    """Those of the samples whose NAME, one a line, the list `path` holds; in the samples' order.

    Raises:
        InputError: the list is missing or empty, or names what is not among the samples.
    """
    wanted = dict(_lines(path))
    names = {sample.name for sample in samples}
    for name, place in wanted.items():
        if name not in names:
            raise InputError(
                f"{place}: {_shortened(name)} is no image of this split: correct the line or "
                "choose another split"
            )
    return [sample for sample in samples if sample.name in wanted]


def _select_share(
    data: SegmentationData, share: str, data_list: int
) -> tuple[list[Sample], list[Sample]]:
    train = data.splits["train"]
    with_mask = [sample for sample in train if sample.mask is not None]
    if not with_mask:
        raise InputError(
            f"no training image in {data.root} has a mask: add masks under the images' names"
        )
    if share == "full":
        return with_mask, [sample for sample in train if sample.mask is None]
    count = labeled_count(len(with_mask), share)
    if count == 0:
        raise InputError(
            f"the share {share} of {len(with_mask)} training images with masks leaves no labeled "
            "image: give a larger one"
        )
    # One order for all shares of a data list, so that 1/16 lies within 1/8. Python's generator
    # and not numpy's: its streams are the same in every version.
    order = list(with_mask)
    random.Random(data_list).shuffle(order)
    taken = {sample.name for sample in order[:count]}
    chosen = [sample for sample in with_mask if sample.name in taken]
    return chosen, [sample for sample in train if sample.name not in taken]


def labeled_count(total: int, share: str) -> int:
    """How many of `total` images a share such as "1/8" is: to the nearest, halves downwards.

    Raises:
        InputError: `share` is not a fraction above 0 and at most 1.
    """
    try:
        fraction = Fraction(share)
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if not 0 < fraction <= 1:
        raise InputError(f"the share {share!r} is neither full nor a fraction such as 1/8")
    return math.ceil(total * fraction - Fraction(1, 2))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a list that are no blanks or comments, each with its place for messages."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"the list {path} does not exist: correct its path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list {path} cannot be read ({error}): give a text file") from error
    empty = True
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            empty = False
            yield line, f"{path} line {number}"
    if empty:
        raise InputError(f"the list {path} is empty: give at least one image a line")


def _read_list(path: Path, data: SegmentationData, needs_mask: bool) -> list[Sample]:
    by_name = {sample.name: sample for sample in data.splits["train"]}
    by_image = {sample.image: sample for sample in data.splits["train"]}
    samples = []
    for line, place in _lines(path):
        sample = by_name.get(line) or _read_paths(line, place, data, by_image, needs_mask)
        if needs_mask and sample.mask is None:
            raise InputError(
                f"{place}: {line} has no mask, but labeled images need one: name it in the second "
                "column, or move the line to the unlabeled list"
            )
        samples.append(sample)
    return samples


def _read_paths(
    line: str,
    place: str,
    data: SegmentationData,
    by_image: dict[Path, Sample],
    needs_mask: bool,
) -> Sample:
    # os.path.isfile and not Path's: of a line that is no file name it says no, and raises nothing.
    if "\t" in line:
        words = [word.strip() for word in line.split("\t")]
    elif os.path.isfile(data.root / line.lstrip("/")):  # one path, which may hold spaces
        words = [line]
    else:
        words = line.split()
    if len(words) > 2:
        raise InputError(
            f"{place}: {_shortened(line)!r} has more than two columns: separate image and mask "
            "by a tab if their paths hold spaces"
        )
    image = data.root / words[0].lstrip("/")
    if not os.path.isfile(image):
        raise InputError(
            f"{place}: {_shortened(words[0])} is neither an image below {data.root} nor a name "
            "of its train split: correct the line or add the image"
        )
    mask = None
    if len(words) == 2:
        named = data.root / words[1].lstrip("/")
        mask = data.find_mask(named)
        # An unlabeled image's mask is looked at for one diagnostic only, so it may be absent.
        if mask is None and needs_mask:
            raise InputError(
                f"{place}: the mask {_shortened(str(named))} does not exist: correct the line"
            )
    known = by_image.get(image)
    name = known.name if known else Path(words[0].lstrip("/")).with_suffix("").as_posix()
    return Sample(name, image, mask)


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."
