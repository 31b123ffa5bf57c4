"""The batches of a run on its device, with the time spent waiting for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cac_fast.train.batch import Batch, Step
from cac_fast.train.config import Config
from cac_fast.train.data.augment import LabeledTransform, UnlabeledTransform
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.crops import CELL
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.loaders import batches, labeled_loader, unlabeled_loader
from cac_fast.train.data.photometric import apply_photometric
from cac_fast.train.data.pseudo import reader_of_ids
from cac_fast.train.data.views import PAIR, Views, crops_of
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError, RankInputError
from cac_fast.train.preprocessing import Preprocessing
from cac_fast.train.profiling import phase
from cac_fast.train.progress import show_progress


def fill_cache(
    config: Config,
    data: SegmentationData,
    labeled: list[Sample],
    unlabeled: list[Sample],
    pseudo: list[Sample] | None = None,
) -> None:
    """Bring `config.data.cache` up to date with what the streams will read, and nothing more.

    unlabeled: empty for a method that draws none. pseudo: as of `Stream`.

    Raises:
        InputError: the cache cannot be written.
    """
    images = labeled + unlabeled
    masks = images if _reads_truth(config, unlabeled, pseudo) else labeled
    reader = PixelReader(data, Path(config.data.cache))
    reader.fill(images, masks, show_progress)
    if pseudo is not None:
        reader_of_ids(reader).fill([], pseudo, show_progress)


class Stream:
    """Both streams of training images, from any iteration on.

    Args:
        labeled, unlabeled: the images of each stream.
        world: this rank draws its part of every global batch.
        views: of every unlabeled image.
        pseudo: the unlabeled images with their pseudo masks, where the run has any.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        data: SegmentationData,
        labeled: list[Sample],
        unlabeled: list[Sample],
        views: Views = PAIR,
        pseudo: list[Sample] | None = None,
    ) -> None:
        self.config, self.world, self.data = config, world, data
        self.labeled, self.unlabeled, self.views = labeled, unlabeled, views
        self.pseudo = pseudo
        self.skipped = 0
        self.recent: deque[tuple[int, list[str]]] = deque(maxlen=config.run.log_every)
        channels_last = config.model.channels_last and (
            world.device.type == "cuda" or _is_light(config)
        )
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean = self.std = torch.empty(0)
        self.prepare_for(Preprocessing())

    def prepare_for(self, expected: Preprocessing) -> None:
        """From now on make images as a network expects them.

        Raises:
            InputError: crops are of no size for it.
        """
        expected.check_crop(self.config.data.crop_size)
        self.mean, self.std = (
            torch.tensor([255 * x for x in values], device=self.world.device).view(1, 3, 1, 1)
            for values in (expected.mean, expected.std)
        )

    def steps(self, start: int, end: int, with_unlabeled: bool) -> Iterator[Step]:
        """The batches after `start` iterations, up to the one that makes them `end`.

        Raises:
            RankInputError: a labeled image, or ten unlabeled ones in a row, cannot be used.
        """
        labeled, unlabeled = batches(self._loader(start)), None
        if with_unlabeled:
            unlabeled = batches(self._loader(start, unlabeled=True))
        for iteration in range(start + 1, end + 1):
            before = time.perf_counter()
            try:
                with phase("data wait"):
                    first = next(labeled)
                    second = None if unlabeled is None else next(unlabeled)
            except InputError as error:
                raise RankInputError(str(error)) from error
            waited = time.perf_counter() - before
            names = first.pop("name")
            if second is not None:
                names += second.pop("name")
                self.skipped += int(second.pop("skipped").sum())
            self.recent.append((iteration, names))
            with phase("to device"):
                first = self.to_device(first)
                second = None if second is None else self.to_device(second)
            yield Step(first, second, waited)

    def names(self, iteration: int) -> list[str]:
        """The images of one of the last `log_every` iterations on this rank."""
        return [name for number, names in self.recent if number == iteration for name in names]

    def _loader(self, start: int, unlabeled: bool = False) -> DataLoader:
        data, loss = self.config.data, self.config.loss
        options = {
            "seed": self.config.run.seed,
            "batch_size": self.config.optim.batch_size,
            "rank": self.world.rank,
            "world_size": self.world.size,
            "start_iteration": start,
            "workers": data.workers,
            "pin_memory": self.world.device.type == "cuda",
            "cache": None if data.cache is None else Path(data.cache),
        }
        if unlabeled:
            transform = UnlabeledTransform(
                data.crop_size,
                data.unlabeled_scale,
                data.base_size,
                data.iou_range if loss.context else (1.0, 1.0),
                truth_cells=loss.false_negatives,
                views=self.views,
            )
            options["with_truth"] = _reads_truth(self.config, self.unlabeled, self.pseudo)
            options["pseudo"] = self.pseudo
            return unlabeled_loader(self.unlabeled, self.data, transform, **options)
        sizes = data.crop_size, data.labeled_scale, data.base_size
        transform = LabeledTransform(*sizes, data.jitter_labeled)
        return labeled_loader(self.labeled, self.data, transform, **options)

    def to_device(self, batch: Batch) -> Batch:
        """Move a batch; images travel as uint8, and change their colors on the device.

        A labeled batch has "image" then, float (B, 3, c, c) and normalized. An unlabeled one has
        "image_NAME" of every view, and of every crop v that they show "on_imagev", bool
        (B, c, c), which is False on the padding; all else keeps its name, such as "labelv".
        """
        device = self.world.device
        changes = {name: batch.pop(name) for name in tuple(batch) if name.startswith("changes")}
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        if "label" in moved:
            moved["image"] = self._normalized(moved["image"], changes.get("changes"))
            return moved
        pixels = {number: moved.pop(f"image{number}") for number in crops_of(self.views)}
        for name, view in self.views.items():
            change = changes.get(f"changes_{name}")
            moved[f"image_{name}"] = self._normalized(pixels[view.crop], change)
        for number in pixels:
            flip, valid = moved[f"flip{number}"], moved[f"valid{number}"]
            moved[f"on_image{number}"] = on_image(flip, valid, self.config.data.crop_size)
        return moved

    def _normalized(self, pixels: Tensor, changes: Tensor | None) -> Tensor:
        """Float images of uint8 (B, 3, c, c), after their changes of color."""
        images = pixels.to(torch.float32)
        if changes is not None:
            apply_photometric(images, changes)
        images.sub_(self.mean).div_(self.std)
        return images.contiguous(memory_format=self.memory_format)


def on_image(flip: Tensor, valid: Tensor, crop: int) -> Tensor:
    """Which pixels of crops lie in cells wholly on the image: bool (B, crop, crop).

    flip: (B,) bool. valid: (B, 2) int64, rows and columns of such cells before the flip.
    """
    places = torch.arange(crop, device=flip.device)
    rows, columns = (CELL * valid).unsqueeze(2).unbind(1)
    columns = torch.where(flip[:, None], crop - 1 - places, places) < columns
    return (places < rows).unsqueeze(2) & columns.unsqueeze(1)


def _reads_truth(config: Config, unlabeled: list[Sample], pseudo: list[Sample] | None) -> bool:
    """Whether the unlabeled images' own masks are read: they feed meters."""
    has_truth = any(sample.mask is not None for sample in unlabeled)
    return config.loss.false_negatives or (pseudo is not None and has_truth)


def _is_light(config: Config) -> bool:
    """Whether the network has no 3x3 convolutions but depthwise ones and the stem: the weight
    gradients of the others are slower in channels_last on CPUs, and depthwise ones are faster."""
    return config.model.network == "lraspp" and config.model.backbone.startswith("mobilenet")
