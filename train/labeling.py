"""A trained network labels the unlabeled images of a run, once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cac_fast.train import checkpoint
from cac_fast.train.data.images import IGNORE, read_image
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.pseudo import with_masks, write_about, write_mask
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError, fitting, writing
from cac_fast.train.inference import Predictor, check_classes, load
from cac_fast.train.progress import show_progress, warn


def label_once(
    teacher: Path,
    folder: Path,
    unlabeled: Sequence[Sample],
    data: SegmentationData,
    world: World,
    confidence: float,
    *,
    anew: bool = False,
    bound: bool = False,
) -> None:
    """Write `folder`/NAME.png of whole images, and pseudo.json, which says who made them and how.

    What is there already stays if pseudo.json tells of the same teacher, else all is made again.
    All ranks call it together and share the images out. An image that cannot be read has no mask.

    Args:
        teacher: a run, whose last state labels (the best one was chosen by masks that a comparison
            must not use), or a checkpoint.
        confidence: a pixel whose class has less of it, as softmax gives it, is 255.
        anew: keep nothing.
        bound: a run began with these labels, which are to stay.

    Raises:
        InputError: the teacher cannot be read, knows other classes, or is not the one that a run
            began with; a file cannot be written.
    """
    file = teacher / "last.pt" if teacher.is_dir() else teacher

    def begin() -> list[Sample]:
        samples = with_masks(folder, unlabeled)
        about = {"teacher": str(teacher), "confidence": confidence, **_described(file)}
        check_classes(about["classes"], data.classes, file)
        known = _known(folder)
        same = not anew and all(known.get(key) == about[key] for key in ("sha256", "confidence"))
        if bound and not same:
            raise InputError(
                f"{folder} was not labeled by {file} as it is now: use another --output, or "
                "--restart to start over"
            )
        if not same:
            _start(folder, about, samples)
        return [sample for sample in samples if not os.path.isfile(sample.mask)]

    missing = world.on_main(begin)
    if not missing:
        return
    message = None
    try:
        _label(file, missing[world.rank :: world.size], data, world, confidence)
    except InputError as error:
        message = str(error)
    for text in world.all_gather_objects(message):
        if text is not None:
            raise InputError(text)


def _described(file: Path) -> dict[str, Any]:
    state = checkpoint.read(file)
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": sha256, "iteration": state["iteration"], "classes": list(state["classes"])}


def _known(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / "pseudo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _start(folder: Path, about: dict[str, Any], samples: list[Sample]) -> None:
    """Write pseudo.json into a folder without masks of these images."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pseudo.json").unlink(missing_ok=True)  # first: without it no mask is believed
        for sample in samples:
            sample.mask.unlink(missing_ok=True)
    write_about(folder, about)


def _label(
    file: Path,
    samples: Sequence[Sample],
    data: SegmentationData,
    world: World,
    confidence: float,
) -> None:
    predictor = load(file, world.device)
    show = show_progress("labeling by the teacher")
    searches, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        for done, sample in enumerate(samples, start=1):
            try:
                image = read_image(sample.image)
            except InputError as error:
                warn(f"skipped: {error}")
            else:
                size = f"{image.width} x {image.height}"
                with fitting(
                    f"image {sample.image} ({size}) does not fit in memory: leave it out of the "
                    "list, or use --device cpu"
                ):
                    ids = _ids(predictor, image, confidence)
                write_mask(sample.mask, ids, data.palette)
            if world.is_main:
                show(done, len(samples))
    finally:
        torch.backends.cudnn.benchmark = searches


def _ids(predictor: Predictor, image: Image.Image, confidence: float) -> np.ndarray:
    logits = predictor.logits(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    sure, ids = logits.softmax(0).max(0)
    return ids.to(torch.uint8).masked_fill(sure < confidence, IGNORE).cpu().numpy()
