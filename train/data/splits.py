"""Which training images are labeled: lists as users hold them, or seeded shares."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from pathlib import Path

from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.lists import read_samples
from cac_fast.train.errors import InputError


def select(
    data: SegmentationData,
    labeled: Path | None,
    unlabeled: Path | None,
    share: str | None,
    data_list: int = 0,
) -> tuple[list[Sample], list[Sample]]:
    """The labeled and the unlabeled training images.

    Either lists are given, or a `share` ("full", or a fraction such as "1/8") of the training
    images that have masks; with neither the data's own lists are taken, or "full" without these.
    Without an `unlabeled` list, what is not labeled is unlabeled. Where nothing is left, the
    unlabeled images are the labeled ones (the paper's full setting).

    Lists are read by `lists.read_samples`.

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
    if share is None and labeled is None and unlabeled is None and data.lists is not None:
        labeled, unlabeled = data.lists
    if labeled is not None:
        chosen = read_samples(Path(labeled), data, needs_mask=True)
        taken = {sample.image for sample in chosen}
        rest = [sample for sample in train if sample.image not in taken]
    else:
        chosen, rest = _select_share(data, "full" if share is None else share, data_list)
    if unlabeled is not None:
        rest = read_samples(Path(unlabeled), data, needs_mask=False)
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
        path = output / f"{name}.txt"
        path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


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
