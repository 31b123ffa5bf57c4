"""The embedded city, which is written in the layout of Cityscapes."""

from __future__ import annotations

from pathlib import Path

from cac_fast.train.data import toycity
from cac_fast.train.data.layouts import SegmentationData
from cac_fast.train.data.layouts.cityscapes import cityscapes_splits


def open_toycity(root: Path) -> SegmentationData:
    """List the folder; write the city to it first if it is not there."""
    toycity.ensure(root)
    splits, notes = cityscapes_splits(root)
    lists = root / "lists/labeled.txt", root / "lists/unlabeled.txt"
    tables = tuple(toycity.CLASSES), tuple(toycity.PALETTE)
    return SegmentationData("toycity", root, *tables, splits, notes=notes, lists=lists)
