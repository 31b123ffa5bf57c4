"""A smaller copy of a `folder` data set, for comparisons that would take days at full size."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from PIL import Image

from cac_fast.train.data.images import read_image
from cac_fast.train.data.layouts import Sample, SegmentationData, open_data
from cac_fast.train.errors import InputError
from lib.measure import ROOT


def shrunken(source: Path, factor: int, parent: Path = ROOT / "data") -> Path:
    """The folder below `parent` that holds `source` at 1/`factor` of its size, brought up to
    date: images by area, masks by nearest, both as PNG, so that nothing is lost but the size.

    Files whose source has changed are made again, those whose source is gone are removed.

    Raises:
        InputError: `source` is no `folder` data set, a file of it cannot be read or has a mask
            of another size, or the copy cannot be written.
    """
    source = source.resolve()
    data = open_data("folder", source)
    # By its whole path, as many data sets lie in a folder called "data".
    mark = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    target = parent / f"{source.name}-shrunk{factor}-{mark}"
    try:
        kept = set()
        for split, samples in data.splits.items():
            for sample in samples:
                kept |= _shrink_sample(data, sample, target, split, factor)
        for folder in ("images", "masks"):
            for path in (target / folder).rglob("*"):
                # Hidden files are no images, but may be another process's drafts.
                if path.is_file() and path not in kept and not path.name.startswith("."):
                    path.unlink()
        draft = _draft(target / "classes.txt")
        draft.write_bytes((source / "classes.txt").read_bytes())
        os.replace(draft, target / "classes.txt")
    except OSError as error:
        raise InputError(
            f"the smaller copy {target} cannot be written ({error.strerror or error}): make room "
            "and try again, what is written is kept"
        ) from error
    return target


def _shrink_sample(
    data: SegmentationData, sample: Sample, target: Path, split: str, factor: int
) -> set[Path]:
    """Copy an image and its mask where they are not up to date; the paths of the copies."""
    sources = {"images": sample.image}
    if sample.mask is not None:
        sources["masks"] = sample.mask
    copies = {kind: target / kind / split / f"{sample.name}.png" for kind in sources}
    if all(_is_current(copies[kind], path) for kind, path in sources.items()):
        return set(copies.values())
    # Taken before reading: a source that changes meanwhile is copied again the next time.
    times = {kind: path.stat().st_mtime_ns for kind, path in sources.items()}
    pictures = {"images": read_image(sample.image)}
    width, height = pictures["images"].size
    if sample.mask is not None:
        mask = pictures["masks"] = Image.fromarray(data.read_mask(sample.mask))
        if mask.size != (width, height):
            # Rounded down, the copies could be of one size.
            raise InputError(
                f"mask {sample.mask} is {mask.width} x {mask.height} but image {sample.image} is "
                f"{width} x {height}: make them the same size"
            )
    size = (max(1, width // factor), max(1, height // factor))
    for kind, picture in pictures.items():
        method = Image.Resampling.BOX if kind == "images" else Image.Resampling.NEAREST
        draft = _draft(copies[kind])
        picture.resize(size, method).save(draft, format="PNG")
        os.utime(draft, ns=(times[kind], times[kind]))
        os.replace(draft, copies[kind])
    return set(copies.values())


def _is_current(copy: Path, source: Path) -> bool:
    # A copy has its source's time: one that an older file replaced is seen as well.
    return copy.is_file() and copy.stat().st_mtime_ns == source.stat().st_mtime_ns


def _draft(path: Path) -> Path:
    """Where a file is written before it takes its place; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}")
