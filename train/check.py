"""Look at data: `python train/check.py --dataset folder --data-dir DIR --sheet sheet.png`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cac_fast.train import distributed
from cac_fast.train.errors import InputError
from cac_fast.train.options import Parser, add_data_options

if TYPE_CHECKING:
    from cac_fast.train.data.inventory import Inventory
    from cac_fast.train.data.layouts import Sample, SegmentationData

MOST_BROKEN = 20
"""Unusable files that are named one by one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is in the data; 0 if it can be trained on, 2 after one line if it cannot."""
    return distributed.run_command(lambda: _check(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train/check.py",
        description="Read all images and masks; print the pixels of each class and what looks "
        "wrong. Nothing is trained.",
    )
    add_data_options(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write what was found to this file too"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write images with their masks to this file"
    )
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    # Imported late, so that a mistyped option is answered at once.
    from PIL import Image

    from cac_fast.train.data.layouts import open_data
    from cac_fast.train.progress import warn

    if distributed.world_size() > 1:
        raise InputError("check is a single process: start it with python, not with torchrun")
    for name, path in (("--json", options.json), ("--sheet", options.sheet)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InputError(f"{name} {path}: give a file in a folder that exists")
    Image.init()
    form = None if options.sheet is None else Image.EXTENSION.get(options.sheet.suffix.lower())
    if options.sheet is not None and form not in Image.SAVE:
        raise InputError(f"--sheet {options.sheet}: end it with .png or .jpg")
    data = open_data(options.dataset, options.data_dir)
    inventory, broken = take_inventory(data)
    print(inventory.table())
    for message in inventory.warnings():
        warn(message)
    for message in broken[:MOST_BROKEN]:
        warn(f"cannot be used: {message}")
    if options.json is not None:
        content = json.dumps(inventory.as_json() | {"broken": broken}, indent=2)
        _write(options.json, lambda path: path.write_text(content + "\n", encoding="utf-8"))
    if options.sheet is not None:
        from cac_fast.train.contact_sheet import draw

        picture = draw(inventory)
        _write(options.sheet, picture.save)
        print(f"images with their masks: {options.sheet}")
    if (reason := inventory.refusal()) is not None:
        raise InputError(reason)
    if broken:
        raise InputError(f"{len(broken)} files cannot be used, the first one: {broken[0]}")


def take_inventory(data: SegmentationData) -> tuple[Inventory, list[str]]:
    """Read every image and mask; what they hold, and what is wrong with those that are broken."""
    from cac_fast.train.data.cache import PixelReader
    from cac_fast.train.data.inventory import Inventory, Part
    from cac_fast.train.data.layouts import SPLITS
    from cac_fast.train.data.loaders import look_at_samples
    from cac_fast.train.progress import show_progress

    reader, parts, broken, notes = PixelReader(data), [], [], []
    for split, name in zip(SPLITS, ("labeled", "validation", "test"), strict=True):
        samples = data.splits[split]
        masked = [sample for sample in samples if sample.mask is not None]
        progress = show_progress(f"checking {split}")
        found = list(look_at_samples(masked, reader, progress))
        broken += [str(item) for item in found if isinstance(item, InputError)]
        seen = [item for item in found if not isinstance(item, InputError)]
        wrong, said = _look_without_mask([one for one in samples if one.mask is None], split, data)
        broken, notes = broken + wrong, notes + said
        parts.append(Part(name, seen, len(seen) + len(samples) - len(masked)))
    return Inventory(replace(data, notes=(*data.notes, *notes)), parts), broken


def _look_without_mask(
    samples: list[Sample], split: str, data: SegmentationData
) -> tuple[list[str], list[str]]:
    """What is wrong with the broken images, and what to say about the others."""
    import numpy as np

    from cac_fast.train.data import forms
    from cac_fast.train.data.images import read_image
    from cac_fast.train.data.inventory import Part, Seen, file_warnings, is_dark
    from cac_fast.train.progress import show_progress

    nothing = np.zeros(256, np.int64)

    def look(sample: Sample) -> Seen | str:
        try:
            image = read_image(sample.image)
        except InputError as error:
            return str(error)
        stored_band = forms.header(sample.image).stored_band
        return Seen(sample.name, nothing, stored_band=stored_band, dark=is_dark(image))

    found, progress = [], show_progress(f"checking {split}, images without mask")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done, one in enumerate(pool.map(look, samples), start=1):
            found.append(one)
            progress(done, len(samples))
    seen = [one for one in found if isinstance(one, Seen)]
    name = "unlabeled" if split == "train" else f"unlabeled {split}"
    return [one for one in found if isinstance(one, str)], file_warnings(Part(name, seen), data)


def _write(path: Path, write) -> None:
    try:
        write(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
