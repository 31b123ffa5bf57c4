"""The batches of a run on its device, with the time spent waiting for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cac_fast.train.config import Config
from cac_fast.train.data import loaders
from cac_fast.train.data.augment import LabeledTransform, UnlabeledTransform
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.photometric import apply_photometric
from cac_fast.train.data.preprocessing import Preprocessing
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError, RankInputError
from cac_fast.train.profiling import phase
from cac_fast.train.progress import show_progress

Batch = dict[str, torch.Tensor]


class Step(NamedTuple):
    """What one iteration gets: batches on the device and the seconds it waited for them."""

    labeled: Batch
    unlabeled: Batch | None
    waited: float


def fill_cache(
    config: Config, data: SegmentationData, labeled: list[Sample], unlabeled: list[Sample]
) -> None:
    """Bring ``config.cache`` up to date with what the streams will read, and nothing more.

    Raises:
        InputError: the cache cannot be written.
    """
    images, masks = labeled, labeled
    if config.method != "supervised":
        images = labeled + unlabeled
        masks = images if config.false_negatives else labeled
    reader = PixelReader(data, Path(config.cache))
    reader.fill(images, masks, show_progress)


class Stream:
    """Both streams of training images, from any iteration on.

    Args:
        labeled, unlabeled: the images of each stream.
        world: this rank draws its part of every global batch.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        data: SegmentationData,
        labeled: list[Sample],
        unlabeled: list[Sample],
    ) -> None:
        self.config, self.world, self.data = config, world, data
        self.labeled, self.unlabeled = labeled, unlabeled
        self.skipped = 0
        self.recent: deque[tuple[int, list[str]]] = deque(maxlen=config.log_every)
        channels_last = config.channels_last and (world.device.type == "cuda" or _is_light(config))
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.prepare_for(Preprocessing())

    def prepare_for(self, expected: Preprocessing) -> None:
        """From now on make images as a network expects them.

        Raises InputError if crops are of no size for it.
        """
        expected.check_crop(self.config.crop_size)
        self.mean, self.std = (
            torch.tensor([255 * x for x in values], device=self.world.device).view(1, 3, 1, 1)
            for values in (expected.mean, expected.std)
        )

    def steps(self, start: int, end: int, with_unlabeled: bool) -> Iterator[Step]:
        """The batches after ``start`` iterations, up to the one that makes them ``end``.

        Raises:
            RankInputError: a labeled image, or ten unlabeled ones in a row, cannot be used.
        """
        labeled = loaders.batches(self._labeled_loader(start))
        unlabeled = loaders.batches(self._unlabeled_loader(start)) if with_unlabeled else None
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
        """The images of one of the last ``log_every`` iterations on this rank."""
        return [name for number, names in self.recent if number == iteration for name in names]

    def _common(self, start: int) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "rank": self.world.rank,
            "world_size": self.world.size,
            "start_iteration": start,
            "workers": self.config.workers,
            "pin_memory": self.world.device.type == "cuda",
            "cache": None if self.config.cache is None else Path(self.config.cache),
        }

    def _labeled_loader(self, start: int) -> torch.utils.data.DataLoader:
        config = self.config
        transform = LabeledTransform(
            config.crop_size, config.labeled_scale, config.base_size, config.jitter_labeled
        )
        return loaders.labeled_loader(self.labeled, self.data, transform, **self._common(start))

    def _unlabeled_loader(self, start: int) -> torch.utils.data.DataLoader:
        config = self.config
        iou_range = config.iou_range if config.context else (1.0, 1.0)
        transform = UnlabeledTransform(
            config.crop_size, config.unlabeled_scale, config.base_size, iou_range
        )
        return loaders.unlabeled_loader(
            self.unlabeled,
            self.data,
            transform,
            with_truth=config.false_negatives,
            **self._common(start),
        )

    def to_device(self, batch: Batch) -> Batch:
        """Move a batch; images travel as uint8, and change their colors on the device."""
        device = self.world.device
        changes = {name: batch.pop(name) for name in tuple(batch) if name.startswith("changes")}
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        for name, value in moved.items():
            if name.startswith("image"):
                change = changes.get(name.replace("image", "changes"))
                value = value.to(torch.float32)
                if change is not None:
                    apply_photometric(value, change)
                value.sub_(self.mean).div_(self.std)
                moved[name] = value.contiguous(memory_format=self.memory_format)
        return moved


def _is_light(config: Config) -> bool:
    """Whether the network has no 3x3 convolutions but depthwise ones and the stem: the weight
    gradients of the others are slower in channels_last on CPUs, and depthwise ones are faster."""
    return config.network == "lraspp" and config.backbone.startswith("mobilenet")
