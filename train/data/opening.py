"""What a training opens and looks at before its first step."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cac_fast.train.config import Config
from cac_fast.train.data import forms
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.images import read_image
from cac_fast.train.data.inventory import Inventory, Part, Seen, file_warnings, is_dark
from cac_fast.train.data.layouts import Sample, SegmentationData, open_data
from cac_fast.train.data.loaders import check_samples
from cac_fast.train.data.names import some
from cac_fast.train.data.splits import select
from cac_fast.train.data.threads import in_threads
from cac_fast.train.errors import InputError
from cac_fast.train.progress import show_progress

MAX_DECODED = 64
"""Unlabeled images of 16 bits that are read whole before the first step."""


@dataclass(frozen=True)
class Inputs:
    """The images of a run, and what was found in them.

    found: a table of what is in the masks. warnings: what looks wrong with images and masks.
    """

    data: SegmentationData
    labeled: list[Sample]
    unlabeled: list[Sample]
    found: str
    warnings: list[str]

    def digests(self) -> dict[str, str]:
        """By name what tells each list of images from another."""
        return {"labeled": _digest(self.labeled), "unlabeled": _digest(self.unlabeled)}


def open_inputs(config: Config, with_unlabeled: bool) -> Inputs:
    """Open the data and check every image with its mask, so that no run dies of one in the night.

    with_unlabeled: the unlabeled images too, as far as their headers and a few of those of 16 bits
        tell.

    Raises:
        InputError: something in them cannot be used.
    """
    data, labeled, unlabeled = open_lists(config)
    samples = [*labeled, *data.splits["val"]]
    reader = PixelReader(data, _path(config.data.cache))
    seen = check_samples(samples, reader, show_progress("checking images"))
    parts = [Part("labeled", seen[: len(labeled)]), Part("validation", seen[len(labeled) :])]
    inventory = Inventory(data, parts)
    if (reason := inventory.refusal()) is not None:
        raise InputError(f"{reason} (python train/check.py shows all masks)")
    others = unlabeled if with_unlabeled and unlabeled != labeled else []
    warnings = _shared_warnings(labeled, data) + inventory.warnings()
    warnings += _unlabeled_warnings(others, data)
    return Inputs(data, labeled, unlabeled, inventory.table(), warnings)


def open_lists(config: Config) -> tuple[SegmentationData, list[Sample], list[Sample]]:
    """The data, its labeled and its unlabeled images."""
    data = open_data(config.data.dataset, _path(config.data.data_dir))
    lists = _path(config.data.labeled), _path(config.data.unlabeled)
    return data, *select(data, *lists, config.data.labeled_share, config.data.data_list)


def _shared_warnings(labeled: list[Sample], data: SegmentationData) -> list[str]:
    """Says which images are learned and scored, under whatever link."""
    scored = {os.path.realpath(sample.image) for sample in data.splits["val"]}
    both = [sample.name for sample in labeled if os.path.realpath(sample.image) in scored]
    if not both:
        return []
    return [
        f"{len(both)} labeled images are validation images too, so that the score says nothing of "
        f"new images: take them out of one of the lists ({some(both)})"
    ]


def _unlabeled_warnings(samples: list[Sample], data: SegmentationData) -> list[str]:
    """What looks wrong with images that are read for the first time when their turn comes."""
    paths, progress = [one.image for one in samples], show_progress("looking at unlabeled images")
    headers = list(in_threads(forms.header, paths, progress))
    wide = [sample for sample, one in zip(samples, headers, strict=True) if one.wide]
    read = wide[:: -(-len(wide) // MAX_DECODED) or 1]
    dark = {sample for sample, one in zip(read, in_threads(_is_dark, read), strict=True) if one}
    seen = [
        Seen(sample.name, np.zeros(256, np.int64), None, one.stored_band, sample in dark)
        for sample, one in zip(samples, headers, strict=True)
        if one.stored_band or sample in dark
    ]
    found = file_warnings(Part("unlabeled", seen), data)
    if dark and len(read) < len(wide):
        found[-1] += f" ({len(read)} of the {len(wide)} images of 16 bits were looked at)"
    return found


def _is_dark(sample: Sample) -> bool:
    try:
        return is_dark(read_image(sample.image))
    except InputError:  # told when its turn comes
        return False


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _digest(samples: list[Sample]) -> str:
    names = "\n".join(sample.name for sample in samples)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
