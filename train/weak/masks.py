"""Pseudo masks as files, and what can be said of them."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.images import IGNORE, read_image
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.pseudo import header_has_size, with_masks, write_mask
from cac_fast.train.errors import InputError, fitting, writing
from cac_fast.train.evaluation import ConfusionMatrix
from cac_fast.train.pictures import SampleSheet, colorize
from cac_fast.train.progress import show_progress, warn
from cac_fast.train.weak import cam
from cac_fast.train.weak.classifier import Classifier, image_tensor
from cac_fast.train.weak.labels import ImageLabels, Labels, background_of, foreground_of

IRN_THRESHOLD = 0.15
"""Of the figure that irn prints of its maps: argmax of the classes and one plane of this value."""

SHEET_ROWS = 8


@dataclass(frozen=True)
class CamSettings:
    """See `cam.pseudo_mask` and `cam.activation_sum`."""

    foreground: float = cam.FOREGROUND
    background: float = cam.BACKGROUND
    scales: tuple[float, ...] = cam.SCALES


class MaskWriter:
    """Makes the pseudo masks of images in `folder`/masks, and `folder`/sheet.png.

    Args:
        network: in eval mode.
        checkpoint: hash of its weights. A mask that holds it, with the same settings and labels, is
            kept.
        labels: the images and their classes.
    """

    def __init__(
        self,
        network: Classifier,
        checkpoint: str,
        labels: ImageLabels,
        data: SegmentationData,
        settings: CamSettings,
        folder: Path,
    ) -> None:
        self.network, self.checkpoint, self.settings = network, checkpoint, settings
        self.labels, self.data, self.folder = labels, data, folder
        self.background, self.foreground = background_of(data), foreground_of(data)
        self.device = next(network.parameters()).device
        self.paths = [sample.mask for sample in with_masks(folder / "masks", labels.samples)]

    def write(self) -> int:
        """Write what is missing or outdated; return how many images cannot be read.

        Masks that it once wrote of other images are deleted: main.py would learn from them.

        Raises:
            InputError: a file cannot be written, no image can be read, or one is too large for the
                memory.
        """
        todo = list(zip(self.labels.samples, self.labels.labels, self.paths, strict=True))
        outdated = [not self._is_kept(*each) for each in todo]
        sheet, others = self.folder / "sheet.png", self._of_other_images()
        if not any(outdated) and not others and sheet.is_file():
            return 0
        with writing(self.folder):
            for path in (sheet, self.folder / "pseudo.json", *others):  # they are of other masks
                path.unlink(missing_ok=True)
        rows = SampleSheet(self.data.palette)
        shown = set(np.linspace(0, len(todo) - 1, min(SHEET_ROWS, len(todo))).round().astype(int))
        show, unreadable = show_progress("pseudo masks"), 0
        for done, (sample, ids, path) in enumerate(todo):
            if outdated[done] or done in shown:
                try:
                    image = read_image(sample.image)
                except InputError as error:
                    unreadable += 1
                    warn(f"skipped: {error}")
                    if outdated[done]:
                        with writing(path):
                            path.unlink(missing_ok=True)
                    continue
                with fitting(
                    f"the maps of {sample.image} ({image.width} x {image.height}) do not fit in "
                    "memory: give smaller --cam-scales, or leave it out of the labels"
                ):
                    made = self._make(sample, image, ids)
                if outdated[done]:
                    self._save(path, ids, made)
                if done in shown:
                    self._add_row(rows, image, made)
            show(done + 1, len(todo))
        if unreadable == len(todo):
            raise InputError(f"none of the {unreadable} images can be read: no mask was written")
        rows.write(sheet)
        return unreadable

    def maps(self, image: Image.Image, ids: Labels) -> Tensor:
        """M, (C, H, W), of an image with the classes `ids`."""
        if not ids:
            return torch.zeros(0, image.height, image.width, device=self.device)
        rows = [self.foreground.index(index) for index in ids]
        with torch.no_grad():
            pixels, weight = image_tensor(image, self.device), self.network.weight[rows]
            return cam.normalized(
                cam.activation_sum(self.network.features, weight, pixels, self.settings.scales)
            )

    def _key(self, ids: Labels) -> str:
        text = json.dumps([self.checkpoint, asdict(self.settings), self.data.classes, ids])
        return hashlib.sha256(text.encode()).hexdigest()

    def _of_other_images(self) -> list[Path]:
        """Masks below the folder that a writer made, but not of these images."""
        known, found = set(self.paths), []
        for path in sorted((self.folder / "masks").rglob("*.png")):
            with suppress(OSError, SyntaxError, ValueError), Image.open(path) as mask:
                if path not in known and "key" in mask.info:
                    found.append(path)
        return found

    def _is_kept(self, sample: Sample, ids: Labels, path: Path) -> bool:
        try:
            with Image.open(path) as mask:
                mask.load()
        except (OSError, SyntaxError, ValueError):  # not there, no PNG, or a part of one
            return False
        if mask.info.get("key") != self._key(ids):
            return False
        if header_has_size(sample.image, (mask.height, mask.width)):
            return True
        with suppress(InputError):
            return read_image(sample.image).size == mask.size
        return False

    def _make(self, sample: Sample, image: Image.Image, ids: Labels) -> _Made:
        maps = self.maps(image, ids)
        limits = (
            (self.settings.foreground, self.settings.background),
            (IRN_THRESHOLD, IRN_THRESHOLD),
        )
        masks = (cam.pseudo_mask(maps, ids, self.background, *pair) for pair in limits)
        return _Made(maps, *(mask.cpu().numpy() for mask in masks), truth_of(sample, self.data))

    def _save(self, path: Path, ids: Labels, made: _Made) -> None:
        texts = PngImagePlugin.PngInfo()
        texts.add_text("key", self._key(ids))
        if made.truth is not None:  # the file's pixels cannot tell this later
            counts = confusion(made.truth, made.irn, self.data.num_classes)
            places = np.argwhere(counts).tolist()
            rows = [[*place, int(counts[tuple(place)])] for place in places]
            texts.add_text("irn", json.dumps(rows))
        write_mask(path, made.mask, self.data.palette, texts)

    def _add_row(self, rows: SampleSheet, image: Image.Image, made: _Made) -> None:
        """The image, the largest M as heat, the mask and the truth, ignored pixels white."""
        strength = np.zeros(made.mask.shape, np.float32)
        if len(made.maps):
            strength = made.maps.amax(0).cpu().numpy()
        # From black over red and yellow to white.
        heat = (255 * (3 * strength[..., None] - np.arange(3)).clip(0, 1)).astype(np.uint8)
        pixels = np.array(image)
        masks = [made.mask, np.full_like(made.mask, IGNORE) if made.truth is None else made.truth]
        pictures = [colorize(mask, self.data.palette) for mask in masks]
        for mask, picture in zip(masks, pictures, strict=True):
            picture[mask == IGNORE] = 255
        rows.add_row(pixels, heat // 2 + pixels // 2, *pictures)


class _Made(NamedTuple):
    """M (C, H, W) of an image, its pseudo mask and that of irn's figure, and its true mask if there
    is a usable one."""

    maps: Tensor
    mask: np.ndarray
    irn: np.ndarray
    truth: np.ndarray | None


def truth_of(sample: Sample, data: SegmentationData) -> np.ndarray | None:
    """The true mask (H, W) of an image, None without a usable one: it only feeds a figure."""
    if sample.mask is None:
        return None
    with suppress(InputError):
        return PixelReader(data).both(sample)[1]
    return None


def confusion(truth: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels by true and pseudo label, (K, K); those that either of them ignores are left out."""
    matrix = ConfusionMatrix(num_classes, "cpu")
    covered = np.where(mask == IGNORE, IGNORE, truth)
    matrix.update(torch.from_numpy(covered), torch.from_numpy(mask))
    return matrix.counts.numpy()
