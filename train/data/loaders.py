"""Batches as a function of (seed, position in the global stream) alone.

A stream is an endless sequence of items; step t of a global batch size B takes positions t*B to
(t+1)*B - 1 and each rank a part of them. Which image a position holds and how it is augmented
depends on nothing else, so neither ranks nor workers nor a resume change what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from cac_fast.train.data.augment import LabeledTransform, Pixels, UnlabeledTransform, image_size
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.inventory import Seen, look
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.pseudo import reader_of_ids
from cac_fast.train.data.threads import in_threads
from cac_fast.train.data.workers import leave_signals_to_trainer, share, start
from cac_fast.train.errors import InputError
from cac_fast.train.progress import Progress, warn

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
        for step in count(self.start_iteration):
            yield [step * self.batch_size + slot for slot in self.slots]


def labeled_loader(
    samples: Sequence[Sample], data: SegmentationData, transform: LabeledTransform, **options: Any
) -> DataLoader:
    """Endless batches of `LabeledTransform`'s items, and "name", a list of str.

    `options` are those of `make_loader`. Iterate with `batches`.
    """
    return make_loader(_LabeledItems, samples, data, transform, **options)


def unlabeled_loader(
    samples: Sequence[Sample],
    data: SegmentationData,
    transform: UnlabeledTransform,
    *,
    with_truth: bool = False,
    pseudo: Sequence[Sample] | None = None,
    **options: Any,
) -> DataLoader:
    """Endless batches of `UnlabeledTransform`'s items, "name" and "skipped" int64 (B,).

    An image that cannot be read is replaced by another one, chosen by the position, and counted
    in "skipped". `with_truth` lets the transform have the masks, 255 where an image has no usable
    one. `pseudo` are the same images with their pseudo masks, which label the crops. Otherwise as
    `labeled_loader`.
    """
    masks = None if pseudo is None else tuple(pseudo)
    items = partial(_UnlabeledItems, with_truth=with_truth, pseudo=masks)
    return make_loader(items, samples, data, transform, **options)


def make_loader(
    make_items: Callable[..., Dataset],
    samples: Sequence[Sample],
    data: SegmentationData,
    transform: LabeledTransform | UnlabeledTransform,
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
    """A rank's batches from a step on.

    `batch_size` is that of all ranks together. `cache` is the folder of a `PixelReader`.

    Raises:
        InputError: there is no image, or fewer images in a batch than ranks.
    """
    sampler = PositionSampler(start_iteration, batch_size, rank, world_size)
    if not samples:
        raise InputError("there is no image to train on: the list of images is empty")
    return DataLoader(
        make_items(tuple(samples), PixelReader(data, cache), transform, seed),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_trainer,
        # Its own generator: starting workers would else advance the global one, and a run that
        # was resumed would differ from one that was not.
        generator=torch.Generator(),
    )


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
    progress: Progress | None = None,
) -> Iterator[Seen | InputError]:
    """Read every image and mask completely: what each sample holds, or what is wrong with it.

    Those that the reader has in its cache were read when they were written there. `progress`, if
    given, is called with the number of samples read and of all.
    """

    def seen(sample: Sample) -> Seen | InputError:
        if sample.mask is None:
            return InputError(f"image {sample.image} has no mask: add it or leave the image out")
        try:
            return look(sample, *reader.both(sample), reader.data)
        except InputError as error:
            return error

    return in_threads(seen, samples, progress)


def check_samples(
    samples: Sequence[Sample],
    reader: PixelReader,
    progress: Progress | None = None,
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
class _Items(Dataset):
    samples: tuple[Sample, ...]
    reader: PixelReader
    transform: LabeledTransform | UnlabeledTransform
    seed: int


class _LabeledItems(_Items):
    def __getitem__(self, position: int) -> dict[str, Any] | _Failure:
        sample = self.samples[item_index(self.seed, LABELED, position, len(self.samples))]
        try:
            pixels = self.reader.both(sample)
        except InputError as error:
            return _Failure(str(error))
        item = self.transform(*pixels, position_rng(self.seed, LABELED, position))
        return {**item, "name": sample.name}


@dataclass(frozen=True)
class _UnlabeledItems(_Items):
    with_truth: bool
    pseudo: tuple[Sample, ...] | None

    def __getitem__(self, position: int) -> dict[str, Any] | _Failure:
        messages: list[str] = []
        for index in self._candidates(position):
            sample = self.samples[index]
            try:
                image = self.reader.image(sample.image)
            except InputError as error:
                messages.append(str(error))
                continue
            mask = self._truth(sample, image) if self.with_truth else None
            try:
                told = None if self.pseudo is None else self._told(self.pseudo[index], image)
            except InputError as error:
                return _Failure(str(error))
            item = self.transform(image, mask, position_rng(self.seed, UNLABELED, position), told)
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

    def _told(self, sample: Sample, image: Pixels) -> np.ndarray:
        if sample.mask is None:
            return np.full(image_size(image), IGNORE, np.uint8)
        return reader_of_ids(self.reader).mask_of(sample, image)

    def _truth(self, sample: Sample, image: Pixels) -> np.ndarray:
        """The mask; unknown everywhere if there is none that fits: it only feeds a meter."""
        if sample.mask is not None:
            with suppress(InputError):
                return self.reader.mask_of(sample, image)
        return np.full(image_size(image), IGNORE, np.uint8)


def _collate(items: list[dict[str, Any] | _Failure]) -> dict[str, Any] | _Failure:
    for item in items:
        if isinstance(item, _Failure):
            return item
    files = [message for item in items for message in item.pop("skipped_files", ())]
    return share({**default_collate(items), "skipped_files": files})


def _rng(*keys: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(keys)))


@lru_cache(maxsize=8)
def _order(seed: int, stream: int, epoch: int, n: int) -> np.ndarray:
    return _rng(seed, stream, _ORDER, epoch).permutation(n)
