"""Write the toy city to disk once, in the Cityscapes layout."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cac_fast.train.data.layouts import SPLITS, Sample
from cac_fast.train.data.splits import write_lists
from cac_fast.train.data.toycity.scene import BEFORE, Scene, draw_scene
from cac_fast.train.errors import InputError

VERSION = 2
"""To be raised with every change of a pixel, a name or a list: older folders are then refused."""
STAMP = "toycity-version.txt"
LABELED, UNLABELED, VAL, TEST = 16, 200, 60, 60
SEED = 2021


class Plan(NamedTuple):
    """One scene to be written: its split, its number in the split and whether it misleads.

    Those that mislead were taken in daylight, the others in varied light.
    """

    split: str
    number: int
    misleading: bool

    @property
    def image(self) -> str:
        return f"leftImg8bit/{self.split}/toycity/toycity_{self.number:06d}_leftImg8bit.png"

    @property
    def mask(self) -> str:
        return f"gtFine/{self.split}/toycity/toycity_{self.number:06d}_gtFine_labelTrainIds.png"

    @property
    def street(self) -> str:
        """What the row consists of: each kind is as frequent in every split and list."""
        return tuple(BEFORE)[self.number % len(BEFORE)]

    def draw(self) -> Scene:
        split = SPLITS.index(self.split)
        rng, light = np.random.default_rng([SEED, split, self.number]), not self.misleading
        return draw_scene(rng, self.street, misleading=self.misleading, varied_light=light)


def plan() -> Iterator[Plan]:
    """All scenes; of the train split, the labeled ones come first and alone mislead."""
    for split, count in (("train", LABELED + UNLABELED), ("val", VAL), ("test", TEST)):
        for number in range(count):
            yield Plan(split, number, misleading=split == "train" and number < LABELED)


def ensure(root: Path) -> None:
    """Write the toy city into the folder `root` unless it is there already.

    Besides the images and masks of train, val and test there are `lists/labeled.txt` and
    `lists/unlabeled.txt`, `image mask` a line. The unlabeled scenes have masks too, for measuring
    only. A folder is complete as soon as it exists, also where several processes write it at once.

    Raises:
        InputError: `root` holds something else or another version, or cannot be written.
    """
    if _is_complete(root):
        return
    draft = root.parent / f".{root.name}-{uuid.uuid4().hex}"
    try:
        _write(draft)
        os.replace(draft, root)
    except OSError as error:
        # Another process may have been first; its folder is the same to the byte.
        if not _is_complete(root):
            raise InputError(
                f"The toy city cannot be written to {root} ({error.strerror}): "
                "give --data-dir a folder that can."
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_complete(root: Path) -> bool:
    stamp = root / STAMP
    if stamp.is_file():
        found = stamp.read_text(encoding="utf-8").strip()
        if found != str(VERSION):
            raise InputError(
                f"{root} holds version {found} of the toy city, but this program draws "
                f"version {VERSION}: delete that folder or give another --data-dir."
            )
        return True
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise InputError(
            f"{root} is there but holds no toy city ({STAMP} is missing): "
            "give --data-dir a new folder to write it to."
        )
    return False


def _write(root: Path) -> None:
    lists: dict[bool, list[Sample]] = {True: [], False: []}
    for scene in plan():
        image, label = scene.draw()
        for path, pixels in ((root / scene.image, image), (root / scene.mask, label)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, compress_level=1)
        if scene.split == "train":
            sample = Sample(scene.image, root / scene.image, root / scene.mask)
            lists[scene.misleading].append(sample)
    write_lists(root / "lists", lists[True], lists[False], root)
    (root / STAMP).write_text(f"{VERSION}\n", encoding="utf-8")
