"""Look at data: `python train/check.py --dataset folder --data-dir DIR --sheet sheet.png`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from cac_fast.train import distributed
from cac_fast.train.data import forms
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.images import read_image
from cac_fast.train.data.inventory import Inventory, Part, Seen, file_warnings, is_dark
from cac_fast.train.data.layouts import SPLITS, Sample, SegmentationData, open_data
from cac_fast.train.data.loaders import look_at_samples
from cac_fast.train.data.threads import in_threads
from cac_fast.train.errors import InputError, writing
from cac_fast.train.options import Parser, add_data_options, write_json
from cac_fast.train.pictures import draw_contact_sheet
from cac_fast.train.progress import Progress, show_progress, warn

MAX_SHOWN_BROKEN = 20
"""Unusable files that are named one by one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is in the data; 0 if it can be trained on, 2 after one line if it cannot."""
    parser = Parser(
        prog="train/check.py",
        description="Read all images and masks; print the pixels of each class and what looks "
        "wrong. Nothing is trained.",
    )
    add_data_options(parser)
    parser.add_path("--json", "FILE", "write what was found to this file too", writable=True)
    text = "write images with their masks to this file"
    parser.add_path("--sheet", "FILE.png", text, writable=True)
    return distributed.run_command(lambda: _check(parser.parse_args(arguments)))


def _check(options: argparse.Namespace) -> None:
    if distributed.world_size() > 1:
        raise InputError("check is a single process: start it with python, not with torchrun")
    if options.sheet is not None:
        form = Image.registered_extensions().get(options.sheet.suffix.lower())
        if form not in Image.SAVE:
            raise InputError(f"--sheet {options.sheet}: end it with .png or .jpg")
    data = open_data(options.dataset, options.data_dir)
    inventory, broken = take_inventory(data)
    print(inventory.table())
    for message in inventory.warnings():
        warn(message)
    for message in broken[:MAX_SHOWN_BROKEN]:
        warn(f"cannot be used: {message}")
    write_json(options.json, inventory.as_json() | {"broken": broken})
    if options.sheet is not None:
        picture = draw_contact_sheet(inventory)
        with writing(options.sheet):
            picture.save(options.sheet)
        print(f"images with their masks: {options.sheet}")
    if (reason := inventory.refusal()) is not None:
        raise InputError(reason)
    if broken:
        raise InputError(f"{len(broken)} files cannot be used, the first one: {broken[0]}")


def take_inventory(data: SegmentationData) -> tuple[Inventory, list[str]]:
    """Read every image and mask; what they hold, and what is wrong with those that are broken."""
    reader, parts, broken, notes = PixelReader(data), [], [], []
    for split, name in zip(SPLITS, ("labeled", "validation", "test"), strict=True):
        masked = [sample for sample in data.splits[split] if sample.mask is not None]
        others = [sample for sample in data.splits[split] if sample.mask is None]
        show = show_progress(f"checking {split}")
        looked = list(look_at_samples(masked, reader, show))
        show = show_progress(f"checking {split}, images without mask")
        alone = list(_look_without_mask(others, show))
        broken += [str(one) for one in looked + alone if isinstance(one, InputError)]
        seen, bare = ([one for one in each if isinstance(one, Seen)] for each in (looked, alone))
        rest = Part("unlabeled" if split == "train" else f"unlabeled {split}", bare)
        notes += file_warnings(rest, data)
        parts.append(Part(name, seen, len(seen) + len(others)))
    return Inventory(replace(data, notes=(*data.notes, *notes)), parts), broken


def _look_without_mask(samples: list[Sample], progress: Progress) -> Iterator[Seen | InputError]:
    nothing = np.zeros(256, np.int64)

    def look(sample: Sample) -> Seen | InputError:
        try:
            image = read_image(sample.image)
        except InputError as error:
            return error
        stored_band = forms.header(sample.image).stored_band
        return Seen(sample.name, nothing, stored_band=stored_band, dark=is_dark(image))

    return in_threads(look, samples, progress)


if __name__ == "__main__":
    sys.exit(main())
