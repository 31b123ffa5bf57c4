"""What a training opens and looks at before its first step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cac_fast.train.config import Config
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.inventory import Inventory, Part
from cac_fast.train.data.layouts import Sample, SegmentationData, open_data
from cac_fast.train.data.loaders import check_samples
from cac_fast.train.data.splits import select
from cac_fast.train.errors import InputError
from cac_fast.train.progress import show_progress


@dataclass(frozen=True)
class Inputs:
    """The images of a run, and what was found in them.

    found: a table of what is in the masks. warnings: what looks wrong with them.
    """

    data: SegmentationData
    labeled: list[Sample]
    unlabeled: list[Sample]
    found: str
    warnings: list[str]

    def digests(self) -> dict[str, str]:
        """By name what tells each list of images from another."""
        return {"labeled": _digest(self.labeled), "unlabeled": _digest(self.unlabeled)}


def open_inputs(config: Config) -> Inputs:
    """Open the data and look at all that training reads of them.

    Raises:
        InputError: something in them cannot be used.
    """
    data, labeled, unlabeled = open_lists(config)
    return Inputs(data, labeled, unlabeled, *look_at(config, data, labeled))


def open_lists(config: Config) -> tuple[SegmentationData, list[Sample], list[Sample]]:
    """The data, its labeled and its unlabeled images."""
    data = open_data(config.data.dataset, _path(config.data.data_dir))
    lists = _path(config.data.labeled), _path(config.data.unlabeled)
    return data, *select(data, *lists, config.data.labeled_share, config.data.data_list)


def look_at(config: Config, data: SegmentationData, labeled: list[Sample]) -> tuple[str, list[str]]:
    """Check every image and mask now, so that no run dies of one in the night.

    Returns a table of what is in the masks, and what looks wrong with them.
    """
    reader = PixelReader(data, _path(config.data.cache))
    samples = [*labeled, *data.splits["val"]]
    seen = check_samples(samples, reader, show_progress("checking images"))
    parts = [Part("labeled", seen[: len(labeled)]), Part("validation", seen[len(labeled) :])]
    inventory = Inventory(data, parts)
    if (reason := inventory.refusal()) is not None:
        raise InputError(f"{reason} (python train/check.py shows all masks)")
    return inventory.table(), inventory.warnings()


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _digest(samples: list[Sample]) -> str:
    names = "\n".join(sample.name for sample in samples)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
