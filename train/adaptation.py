"""Batch-norm statistics taken anew from images without masks (AdaBN: Li et al. 2016, 1603.04779).

In training the statistics follow the crops that the network learns from. Where these are of one
light and the images to predict of another, its features are shifted and scaled against what its
weights expect. No weight changes here.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cac_fast.train.config import Config
from cac_fast.train.data.augment import UnlabeledTransform
from cac_fast.train.data.images import read_image
from cac_fast.train.errors import InputError
from cac_fast.train.inference import Predictor
from cac_fast.train.progress import Progress, warn

CROPS, BATCH = 512, 8
"""Of 128 crops the mIoU depends on which are drawn, by 0.7 points (CamVid, crops of 128 x 128), of
512 by half as much."""


def with_statistics_of(predictor: Predictor, crops: Iterable[Tensor]) -> Predictor:
    """A copy whose batch-norm statistics are the means of those of `crops`, in eval mode.

    Args:
        predictor: any network; batch norm that `crops` do not reach keeps its statistics.
        crops: batches (B, 3, c, c) uint8, RGB, on any device.

    Raises:
        InputError: the network has no batch-norm statistics.
    """
    changed = copy.deepcopy(predictor).eval()
    parts = changed.network.modules()
    layers = [part for part in parts if isinstance(part, _BatchNorm) and part.track_running_stats]
    before = [copy.deepcopy(layer.state_dict()) for layer in layers]
    momenta = [layer.momentum for layer in layers]
    # Not PyTorch's update_bn: it puts all of the network into training, dropout included, and
    # leaves batch norm that it does not reach without statistics.
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches
        layer.train()
    with torch.no_grad():
        for batch in crops if layers else ():
            changed.network((batch.to(changed.mean) / 255 - changed.mean) / changed.std)
    reached = [int(layer.num_batches_tracked) > 0 for layer in layers]
    if not any(reached):
        raise InputError(
            "the network has no batch norm, so it holds no statistics to take anew: use it as it is"
        )
    for layer, state, momentum, is_new in zip(layers, before, momenta, reached, strict=True):
        layer.momentum = momentum
        if not is_new:
            layer.load_state_dict(state)
    return changed.eval()


def cut(
    images: Iterable[Image.Image], transform: UnlabeledTransform, rng: np.random.Generator
) -> Iterator[Tensor]:
    """Batches (8, 3, c, c) uint8 of a crop of each image; the last one may be smaller."""
    crops = []
    for image in images:
        crops.append(transform(image, None, rng)["image1"])
        if len(crops) == BATCH:
            yield torch.stack(crops)
            crops = []
    if crops:
        yield torch.stack(crops)


def unlabeled_crops(
    config: Config, paths: Sequence[Path], progress: Progress | None = None
) -> Iterator[Tensor]:
    """Crops of images drawn from `paths`, as the trainer cuts them but without photometric changes.

    Yields 64 batches (8, 3, c, c) uint8: a crop of each of 512 images, or of fewer images several.
    The same `paths` in any order give the same crops. An image that cannot be read is left out,
    with a warning.

    Args:
        config: says how large the crops are, and how much the images are resized before.
        progress: called with the numbers of crops that are read and that are wanted.

    Raises:
        InputError: no image can be read.
    """
    transform = UnlabeledTransform(
        config.data.crop_size, config.data.unlabeled_scale, config.data.base_size, photometric=False
    )
    rng = np.random.default_rng(0)
    paths = sorted(paths)
    order = [paths[index] for index in rng.permutation(len(paths))]
    return cut(_in_turn(order, progress), transform, rng)


def _in_turn(order: Sequence[Path], progress: Progress | None) -> Iterator[Image.Image]:
    """As many images as crops are wanted, round and round."""
    left = deque(order)
    for done in range(1, CROPS + 1):
        image = None
        while image is None:
            if not left:
                raise InputError(f"none of the {len(order)} images can be read: give others")
            path = left.popleft()
            try:
                image = read_image(path)
            except InputError as error:
                warn(f"skipped: {error}")
                continue
            left.append(path)
        yield image
        if progress is not None:
            progress(done, CROPS)
