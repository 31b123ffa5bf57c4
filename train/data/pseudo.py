"""Pseudo labels: masks in a folder, which a run takes for the truth of its unlabeled images."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.forms import header
from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.layouts import Sample
from cac_fast.train.data.names import some
from cac_fast.train.data.threads import in_threads
from cac_fast.train.errors import InputError, writing
from cac_fast.train.progress import Progress

IGNORED_COLOR = (255, 255, 255)
"""Of 255 in a mask's palette."""


@dataclass(frozen=True)
class PseudoLabels:
    """What is known of the unlabeled images' masks.

    samples: the unlabeled images in their order, each with its pseudo mask or None. digest: what
    tells these labels from others. found: one line of what there is.
    """

    samples: list[Sample]
    digest: str
    found: str


def mask_path(folder: Path, name: str) -> Path:
    """Where the pseudo mask of an image of this name lies in a folder.

    Raises:
        InputError: the name leads out of the folder.
    """
    if ".." in Path(name).parts:
        raise InputError(
            f"the image {name} lies outside the data folder, and its pseudo mask would "
            f"lie outside {folder}: give its path in the list without .."
        )
    return folder / f"{name.lstrip('/')}.png"


def with_masks(folder: Path, samples: Sequence[Sample]) -> list[Sample]:
    """The images, each with its mask below `folder`, which need not exist.

    Raises:
        InputError: a name leads out of the folder, or two images would share a mask.
    """
    found = [replace(sample, mask=mask_path(folder, sample.name)) for sample in samples]
    images: dict[Path, Path] = {}
    for sample in found:
        if (other := images.setdefault(sample.mask, sample.image)) != sample.image:
            raise InputError(
                f"{other} and {sample.image} would share the pseudo mask {sample.mask}: rename one "
                "of them"
            )
    return found


def write_mask(
    path: Path,
    ids: np.ndarray,
    palette: Sequence[Sequence[int]],
    texts: PngImagePlugin.PngInfo | None = None,
) -> None:
    """Write class ids (H, W) uint8 as a palette PNG, by renaming a finished file.

    palette: colors of the classes. texts: for the file to hold besides.

    Raises:
        InputError: it cannot be written.
    """
    indexed = Image.fromarray(ids)
    # All 256 colors: Pillow would store 255 in as few bits as a shorter palette needs.
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)], colors[IGNORE] = palette, IGNORED_COLOR
    indexed.putpalette(colors.tobytes())
    draft = path.with_suffix(".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        indexed.save(draft, "PNG", pnginfo=texts)
        draft.replace(path)


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write `folder`/pseudo.json, which says who made masks and how, by renaming a finished file.

    Raises:
        InputError: it cannot be written.
    """
    with writing(folder):
        draft = folder / "pseudo.part"
        text = json.dumps(about, indent=2) + "\n"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / "pseudo.json")


def reader_of_ids(reader: PixelReader) -> PixelReader:
    """The same reader for masks that hold the ids of the classes, whatever the data's own hold."""
    return replace(reader, data=replace(reader.data, label_map=None))


def read_pseudo_labels(
    folder: Path, unlabeled: Sequence[Sample], reader: PixelReader, progress: Progress | None = None
) -> PseudoLabels:
    """The pseudo masks of a folder, each read and compared with its image's size.

    folder: holds NAME.png of class ids for unlabeled images by the name NAME, 255 where no label
        is known; an image without one has none anywhere.
    reader: reads the data's own masks.

    Raises:
        InputError: there is no folder, no such file in it, or one that cannot be used.
    """
    if not folder.is_dir():
        raise InputError(f"the folder of pseudo labels {folder} does not exist: correct its path")
    named = with_masks(folder, unlabeled)
    samples = [one if os.path.isfile(one.mask) else replace(one, mask=None) for one in named]
    chosen = [sample for sample in samples if sample.mask is not None]
    if not chosen:
        looked_for = some(str(sample.mask) for sample in named)
        raise InputError(
            f"{folder} holds no pseudo mask of the {len(named)} unlabeled images ({looked_for} "
            "were looked for): give the folder of NAME.png"
        )
    looked = list(in_threads(partial(_look, reader=reader_of_ids(reader)), chosen, progress))
    problems = [str(one) for one in looked if isinstance(one, InputError)]
    if problems:
        more = f" (and {len(problems) - 1} more such files)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    digest = hashlib.sha256()
    for sample, (checksum, _) in zip(chosen, looked, strict=True):
        digest.update(f"{sample.name}\n{checksum}\n".encode(errors="surrogateescape"))
    share = np.mean([labeled for _, labeled in looked])
    found = (
        f"pseudo labels of {folder}: {len(chosen)} of {len(samples)} unlabeled images, "
        f"{share:.1%} of their pixels"
    )
    return PseudoLabels(samples, digest.hexdigest(), found)


def _look(sample: Sample, reader: PixelReader) -> tuple[int, float] | InputError:
    """A checksum of a mask and the share of pixels that it labels, or what is wrong with it."""
    try:
        ids = reader.mask(sample.mask)
    except InputError as error:
        return error
    if not header_has_size(sample.image, ids.shape):
        try:
            image = reader.image(sample.image)
        except InputError:  # told when its turn comes
            image = ids
        try:
            reader.mask_of(sample, image)
        except InputError as error:
            return error
    return zlib.crc32(np.ascontiguousarray(ids), ids.shape[1]), float(np.mean(ids != IGNORE))


def header_has_size(path: Path, size: tuple[int, int]) -> bool:
    """Whether an image's header alone tells that it is (height, width)."""
    try:
        with Image.open(path) as image:
            return (image.height, image.width) == size and header(path).orientation < 5
    except Exception:  # whoever reads its pixels says what is wrong
        return False
