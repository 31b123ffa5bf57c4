"""Batches as a function of (seed, position in the global stream) alone.

A stream is an endless sequence of items; step t of a global batch size B takes positions t*B to
(t+1)*B - 1 and each rank a part of them. Which image a position holds and how it is augmented
depends on nothing else, so neither ranks nor workers nor a resume change what is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from cac_fast.train.data.augment import LabeledTransform, UnlabeledTransform, image_size
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.images import IGNORE, check_size
from cac_fast.train.data.inventory import Seen, look
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.workers import leave_signals_to_trainer, share, start
from cac_fast.train.errors import InputError
from cac_fast.train.progress import warn

LABELED, UNLABELED = 0, 1
"""The two streams."""

_AUGMENT, _ORDER, _REPLACE = 0, 1, 2
_ATTEMPTS = 10


def position_rng(seed: int, stream: int, position: int) -> np.random.Generator:
    """The generator that augments the item at a position of a stream."""
    return _rng(seed, stream, _AUGMENT, position)


def item_index(seed: int, stream: int, position: int, n: int) -> int:
    """Which of n items a position holds: each pass over the n is a permutation of its own."""
    epoch, offset = divmod(position, n)
    return int(_order(seed, stream, epoch, n)[offset])


class PositionSampler(Sampler[list[int]]):
    """The positions of one rank, a list a step, without end.

    Rank r of R takes slots floor(r*B/R) to floor((r+1)*B/R) - 1 of every global batch of B.

    Raises:
        InputError: fewer items in a batch than ranks.
    """

    def __init__(self, start_iteration: int, batch_size: int, rank: int, world_size: int) -> None:
        if batch_size < world_size:
            raise InputError(
                f"a batch of {batch_size} cannot be split over {world_size} processes: give "
                f"--batch-size {world_size} or more"
            )
        self.start_iteration, self.batch_size = start_iteration, batch_size
        self.slots = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_iteration
        while True:
            yield [step * self.batch_size + slot for slot in self.slots]
            step += 1


def labeled_loader(
    samples: Sequence[Sample],
    data: SegmentationData,
    transform: LabeledTransform,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_iteration: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    cache: Path | None = None,
) -> DataLoader:
    """Endless batches of `LabeledTransform`'s items, and "name", a list of str.

    `batch_size` is that of all ranks together. `cache` is the folder of a `PixelReader`. Iterate
    with `batches`.
    """
    dataset = _LabeledItems(tuple(samples), PixelReader(data, cache), transform, seed)
    sampler = PositionSampler(start_iteration, batch_size, rank, world_size)
    return _loader(dataset, sampler, workers, pin_memory)


def unlabeled_loader(
    samples: Sequence[Sample],
    data: SegmentationData,
    transform: UnlabeledTransform,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_iteration: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    cache: Path | None = None,
    with_truth: bool = False,
) -> DataLoader:
    """Endless batches of `UnlabeledTransform`'s items, "name" and "skipped" int64 (B,).

    An image that cannot be read is replaced by another one, chosen by the position, and counted
    in "skipped". `with_truth` adds the masks' cells, 255 where an image has no usable mask.
    Otherwise as `labeled_loader`.
    """
    reader = PixelReader(data, cache)
    dataset = _UnlabeledItems(tuple(samples), reader, transform, seed, with_truth)
    sampler = PositionSampler(start_iteration, batch_size, rank, world_size)
    return _loader(dataset, sampler, workers, pin_memory)


def batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The loader's batches, with a warning for each unreadable file when it is first met.

    Raises:
        InputError: an item could not be made, in this process or in a worker.
    """
    warned: set[str] = set()
    # The loop holds the only reference to the loader's iterator: left to the garbage collector
    # instead, as with persistent workers, each worker would take 5 seconds to stop.
    for batch in start(loader):
        if isinstance(batch, _Failure):
            raise InputError(batch.message)
        for message in batch.pop("skipped_files", ()):
            if message not in warned:
                warned.add(message)
                warn(f"skipped: {message}")
        yield batch


def look_at_samples(
    samples: Sequence[Sample],
    reader: PixelReader,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Seen | InputError]:
    """Read every image and mask completely: what each sample holds, or what is wrong with it.

    Those that the reader has in its cache were read when they were written there. `progress`, if
    given, is called with the number of samples read and of all.
    """

    def seen(sample: Sample) -> Seen | InputError:
        if sample.mask is None:
            return InputError(f"image {sample.image} has no mask: add it or leave the image out")
        try:
            image, mask = reader.image(sample.image), reader.mask(sample.mask)
            check_size(sample.mask, mask.shape, sample.image, image_size(image))
            return look(sample, image, mask, reader.data)
        except InputError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for count, item in enumerate(pool.map(seen, samples), start=1):
            if progress is not None:
                progress(count, len(samples))
            yield item


def check_samples(
    samples: Sequence[Sample],
    reader: PixelReader,
    progress: Callable[[int, int], None] | None = None,
) -> list[Seen]:
    """What is in every image and mask, in order; see `look_at_samples`.

    Raises:
        InputError: what is wrong with the first bad sample (a missing mask, too), and how many
            more are bad.
    """
    found = list(look_at_samples(samples, reader, progress))
    problems = [str(item) for item in found if isinstance(item, InputError)]
    if problems:
        more = f" (and {len(problems) - 1} more such files)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    return found


@dataclass(frozen=True)
class _Failure:
    """An InputError on its way out of a worker: raised there, it would come with a traceback."""

    message: str


@dataclass(frozen=True)
class _LabeledItems(Dataset):
    samples: tuple[Sample, ...]
    reader: PixelReader
    transform: LabeledTransform
    seed: int

    def __getitem__(self, position: int) -> dict[str, Any] | _Failure:
        sample = self.samples[item_index(self.seed, LABELED, position, len(self.samples))]
        try:
            image, mask = self.reader.image(sample.image), self.reader.mask(sample.mask)
            check_size(sample.mask, mask.shape, sample.image, image_size(image))
        except InputError as error:
            return _Failure(str(error))
        item = self.transform(image, mask, position_rng(self.seed, LABELED, position))
        return {**item, "name": sample.name}


@dataclass(frozen=True)
class _UnlabeledItems(Dataset):
    samples: tuple[Sample, ...]
    reader: PixelReader
    transform: UnlabeledTransform
    seed: int
    with_truth: bool

    def __getitem__(self, position: int) -> dict[str, Any] | _Failure:
        messages: list[str] = []
        for index in self._candidates(position):
            sample = self.samples[index]
            try:
                image = self.reader.image(sample.image)
            except InputError as error:
                messages.append(str(error))
                continue
            mask = self._truth(sample, image_size(image)) if self.with_truth else None
            item = self.transform(image, mask, position_rng(self.seed, UNLABELED, position))
            skipped = torch.tensor(len(messages))
            return {**item, "name": sample.name, "skipped": skipped, "skipped_files": messages}
        return _Failure(
            f"{len(messages)} unlabeled images in a row cannot be read, the last one being "
            f"{messages[-1].removeprefix('image ')}"
        )

    def _candidates(self, position: int) -> Iterator[int]:
        """The item of a position, then those that stand in for it: all different."""
        n = len(self.samples)
        first = item_index(self.seed, UNLABELED, position, n)
        yield first
        rng = _rng(self.seed, UNLABELED, _REPLACE, position)
        for step in rng.choice(n - 1, min(n, _ATTEMPTS) - 1, replace=False):
            yield (first + 1 + int(step)) % n

    def _truth(self, sample: Sample, size: tuple[int, int]) -> np.ndarray:
        """The mask; unknown everywhere if there is none of this size: it only feeds a meter."""
        if sample.mask is not None:
            try:
                mask = self.reader.mask(sample.mask)
                check_size(sample.mask, mask.shape, sample.image, size)
                return mask
            except InputError:
                pass
        return np.full(size, IGNORE, np.uint8)


def _collate(items: list[dict[str, Any] | _Failure]) -> dict[str, Any] | _Failure:
    for item in items:
        if isinstance(item, _Failure):
            return item
    files = [message for item in items for message in item.pop("skipped_files", ())]
    return share({**default_collate(items), "skipped_files": files})


def _loader(
    dataset: Dataset, sampler: PositionSampler, workers: int, pin_memory: bool
) -> DataLoader:
    if not dataset.samples:
        raise InputError("there is no image to train on: the list of images is empty")
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_trainer,
        # Its own generator: starting workers would else advance the global one, and a run that
        # was resumed would differ from one that was not.
        generator=torch.Generator(),
    )


def _rng(*keys: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(keys)))


@lru_cache(maxsize=8)
def _order(seed: int, stream: int, epoch: int, n: int) -> np.ndarray:
    return _rng(seed, stream, _ORDER, epoch).permutation(n)
