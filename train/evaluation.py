"""mIoU of a network over a set of images in their original size (paper, Sec. 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cac_fast.train.data.images import IGNORE, check_size, read_image
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.workers import leave_signals_to_trainer, lost_workers, share, start
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError, fitting
from cac_fast.train.inference import Predictor
from cac_fast.train.networks import Segmenter
from cac_fast.train.progress import Progress

_TOO_LARGE = (
    "does not fit in memory: images are scored whole, make those of this split and their masks "
    "smaller or use --device cpu"
)


class ConfusionMatrix:
    """Pixels by true and predicted class.

    `counts` is (K, K) int64 on `device`; its rows are the true classes.
    """

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, truth: Tensor, prediction: Tensor) -> None:
        """Count the pixels of one image.

        Args:
            truth: (H, W) class ids, any integer type; pixels of 255 are not counted.
            prediction: (H, W) class ids, any integer type.

        Raises:
            ValueError: the shapes differ, or an id is not below the number of classes.
        """
        if truth.shape != prediction.shape:
            raise ValueError(
                f"truth is {tuple(truth.shape)} but prediction is {tuple(prediction.shape)}"
            )
        classes = len(self.counts)
        truth, prediction = truth.to(self.counts), prediction.to(self.counts)
        known = truth != IGNORE
        truth, prediction = truth[known], prediction[known]
        if truth.numel() and max(truth.max(), prediction.max()) >= classes:
            raise ValueError(f"a class id is not below {classes}, the number of classes")
        self.counts += torch.bincount(truth * classes + prediction, minlength=classes**2).view(
            classes, classes
        )

    def reduce(self, world: World) -> None:
        """Sum the counts of all ranks, on each of them, in one all-reduce."""
        world.all_reduce(self.counts)

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, (K,) float64 on the CPU.

        NaN where a class is neither true nor predicted anywhere.
        """
        counts = self.counts.cpu().double()
        intersection = counts.diagonal()
        return intersection / (counts.sum(0) + counts.sum(1) - intersection)

    @property
    def iou_of_true(self) -> Tensor:
        """`iou`, NaN for every class that is true nowhere: what to score a single image by."""
        there = (self.counts.sum(1) > 0).cpu()
        return torch.where(there, self.iou, torch.nan)

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that have one; NaN if nothing was counted."""
        return self.iou.nanmean().item()

    @property
    def pixel_accuracy(self) -> float:
        """Share of counted pixels whose class is right; NaN if nothing was counted."""
        return (self.counts.diagonal().sum().double() / self.counts.sum()).item()


def evaluate(
    network: Segmenter,
    samples: Sequence[Sample],
    data: SegmentationData,
    world: World,
    *,
    workers: int,
    autocast_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    progress: Progress | None = None,
    on_prediction: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """Evaluate `network` on `samples`, each in its original size at a single scale.

    Every rank must call it. A rank takes every `world.size`-th sample, so each is counted once;
    a rank may have none. Modules are in eval mode meanwhile and each gets its own mode back; the
    global random state is left alone.

    Args:
        network: on `world.device`.
        samples: images that all have masks.
        data: where the samples come from; it reads their masks.
        workers: processes a rank that read ahead; 0 reads in this one.
        autocast_dtype: None for fp32.
        channels_last: feed the network in that memory format.
        progress: called with the numbers of this rank's images that are done and that it has.
        on_prediction: called with image (H, W, 3), truth (H, W) and prediction (H, W), all uint8,
            for each of this rank's images.

    Returns:
        `miou` (mean over the classes present), `pixel_accuracy` and `iou` (a list with None
        for absent classes), all in [0, 1] and the same on every rank.

    Raises:
        InputError: on every rank: there are no samples, an image has no mask, a file cannot be
            read, a mask does not fit its image, an image does not fit in memory, or no pixel has a
            known class.
    """
    if not samples:
        raise InputError("there is no image to evaluate on: the split is empty")
    for sample in samples:
        if sample.mask is None:
            raise InputError(
                f"image {sample.image} has no mask, but evaluation needs one: "
                "add it or remove the image"
            )
    stripe = samples[world.rank :: world.size]
    confusion = ConfusionMatrix(len(data.classes), world.device)
    predictor = Predictor(network, data.classes, data.palette, channels_last=channels_last).to(
        world.device
    )
    error = None
    # Around all images, so that the weights are cast once.
    with (
        _eval_mode(network),
        torch.autocast(world.device.type, autocast_dtype, enabled=autocast_dtype is not None),
    ):
        try:
            items = _read_ahead(stripe, data, workers, world.device)
            with lost_workers():
                for done, (image, truth) in enumerate(items, start=1):
                    size = f"{image.shape[2]} x {image.shape[1]}"
                    with fitting(f"image {stripe[done - 1].image} ({size}) {_TOO_LARGE}"):
                        prediction = predictor.logits(image).argmax(0)
                        confusion.update(truth.to(world.device, non_blocking=True), prediction)
                        if on_prediction is not None:
                            labels = prediction.to(torch.uint8).cpu().numpy()
                            on_prediction(image.permute(1, 2, 0).numpy(), truth.numpy(), labels)
                    if progress is not None:
                        progress(done, len(stripe))
        except InputError as caught:
            error = str(caught)
    # A rank that stopped alone would leave the others waiting in the reduction.
    for message in world.all_gather_objects(error):
        if message is not None:
            raise InputError(message)
    confusion.reduce(world)
    if not confusion.counts.any():
        raise InputError(
            f"every pixel of all {len(samples)} masks is {IGNORE} (ignored): "
            "evaluate on images with labels"
        )
    return {
        "miou": confusion.miou,
        "pixel_accuracy": confusion.pixel_accuracy,
        "iou": [None if value != value else value for value in confusion.iou.tolist()],
    }


def _read(data: SegmentationData, sample: Sample) -> tuple[Tensor, Tensor] | InputError:
    """Image (3, H, W) and truth (H, W), uint8, or the `InputError` that reading them raised.

    Raised in a worker it would reach the main process with the worker's traceback in its message.
    """
    try:
        image = np.array(read_image(sample.image))
        truth = data.read_mask(sample.mask)
        check_size(sample.mask, truth.shape, sample.image, image.shape[:2])
    except InputError as error:
        return error
    return share((torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(truth)))


def _read_ahead(
    samples: Sequence[Sample], data: SegmentationData, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        samples,
        batch_size=None,
        num_workers=min(workers, len(samples)),
        collate_fn=partial(_read, data),
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_trainer,
        # Its own, or each evaluation would draw a seed for the workers from the global one.
        generator=torch.Generator(),
    )
    for item in start(loader):
        if isinstance(item, InputError):
            raise item
        yield item


@contextmanager
def _eval_mode(network: nn.Module) -> Iterator[None]:
    # Module by module: a network in training may hold frozen parts.
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
