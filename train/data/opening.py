"""What a training opens and looks at before its first step."""

from __future__ import annotations

from pathlib import Path

from cac_fast.train.config import Config
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.inventory import Inventory, Part
from cac_fast.train.data.layouts import Sample, SegmentationData, open_data
from cac_fast.train.data.loaders import check_samples
from cac_fast.train.data.splits import select
from cac_fast.train.errors import InputError
from cac_fast.train.progress import show_progress


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
