"""Data that are made up where only their size matters, as for the time of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cac_fast.train import config
from cac_fast.train.data.images import IGNORE, read_image
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.opening import open_lists
from cac_fast.train.data.pseudo import mask_path, write_mask
from cac_fast.train.errors import InputError
from cac_fast.train.methods import method_class
from cac_fast.train.pseudo_labels import SOURCES

MADE_UP = "made-up"
"""As `--pseudo-labels`: some that are made up."""
MOST_LABELED = 64
"""Images that get labels; the others count as unlabeled everywhere, which costs a step the same."""
_BLOCK = 32


def with_labels(words: list[str], folder: Path) -> list[str]:
    """Options of `train/main.py`, with labels made up in `folder` if they ask for MADE_UP ones, or
    their method needs some and they name none.

    Raises:
        InputError: as `config.parse`, or the data cannot be opened.
    """
    settings = config.parse(words)
    given = {getattr(settings.data, name) for name in SOURCES} - {None}
    if given != {MADE_UP} and (given or not method_class(settings).needs_labels):
        return words
    data, _, unlabeled = open_lists(settings)
    write_labels(folder, unlabeled, data)
    return [*words, "--pseudo-labels", str(folder)]


def write_labels(folder: Path, samples: Sequence[Sample], data: SegmentationData) -> None:
    """Write masks of random blocks of all classes and 255 for the first MOST_LABELED images."""
    rng = np.random.default_rng(0)
    for sample in samples[:MOST_LABELED]:
        with contextlib.suppress(InputError):  # of a file that the training names
            width, height = read_image(sample.image).size
            rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
            blocks = rng.integers(0, len(data.classes) + 1, (rows, columns), np.uint8)
            blocks[blocks == len(data.classes)] = IGNORE
            ids = blocks.repeat(_BLOCK, 0).repeat(_BLOCK, 1)[:height, :width]
            write_mask(mask_path(folder, sample.name), ids, data.palette)


def write_folder(folder: Path, classes: int, side: int, count: int) -> None:
    """The smallest data set that a trainer opens: `count` images of (side, side) with a mask, and
    as many without."""
    lines = [f"{i} class{i} {i} {i} {i}\n" for i in range(classes)]
    (folder / "classes.txt").write_text("".join(lines))
    # Two classes: of one alone there is nothing to learn, which the trainer refuses.
    mask = np.eye(side, dtype=np.uint8)
    for kind, picture, number in (
        ("images", np.repeat(mask[..., None], 3, axis=2), 2 * count),
        ("masks", mask, count),
    ):
        (folder / kind / "train").mkdir(parents=True)
        for index in range(number):
            Image.fromarray(picture).save(folder / kind / "train" / f"{index:02d}.png")
