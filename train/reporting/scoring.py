"""What a run's network does on val: confusion matrix, images by score, pictures of a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from cac_fast.train import checkpoint
from cac_fast.train.data.images import read_image
from cac_fast.train.data.layouts import Sample, SegmentationData, open_data
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError, fitting
from cac_fast.train.evaluation import ConfusionMatrix, evaluate
from cac_fast.train.inference import Predictor, check_classes, load
from cac_fast.train.progress import show_progress
from cac_fast.train.registry import LAYOUTS
from cac_fast.train.reporting.gather import Run, Scored

LONG_SIDE = 480
"""Of a picture, in pixels."""
WORKERS = 2

KINDS = "worst", "median", "best"


class View(NamedTuple):
    """What one network sees in an image: class ids and confidence (max softmax), in gray."""

    run: Run
    score: float
    prediction: Image.Image
    confidence: Image.Image


@dataclass
class Shown:
    """An image of a report, at most `LONG_SIDE` long. kind: one of `KINDS`."""

    kind: str
    name: str
    image: Image.Image
    truth: Image.Image
    views: list[View] = field(default_factory=list)


def score_runs(runs: Sequence[Run], data_dir: Path | None, world: World) -> None:
    """Set `classes` and `scored` of each run, or name the gap.

    data_dir: where the data of all runs lies; None: where each run found it.
    """
    for run in runs:
        try:
            _score(run, data_dir, world)
        except InputError as error:
            run.gaps.append(f"Confusion matrix and pictures are missing: {error}.")
        classes = run.classes or tuple(f"class {index}" for index in range(len(run.iou)))
        if run.iou and len(run.iou) != len(classes):
            run.gaps.append(
                f"metrics.jsonl scores {len(run.iou)} classes, the network has {len(classes)}."
            )
            run.val = [line | {"iou": None} for line in run.val]
        run.classes = classes


def _score(run: Run, data_dir: Path | None, world: World) -> None:
    path = checkpoint.find(run.path)
    predictor = load(path, world.device)
    run.classes = predictor.classes
    data = _open_data(run, data_dir)
    check_classes(predictor.classes, data.classes, path)
    samples, classes = data.splits["val"], len(data.classes)
    total = ConfusionMatrix(classes, "cpu")
    scores, ious = [], []

    def take(_: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> None:
        one = ConfusionMatrix(classes, "cpu")
        one.update(torch.from_numpy(truth), torch.from_numpy(prediction))
        total.counts += one.counts
        iou = one.iou_of_true
        score = iou.nanmean().item()
        scores.append(None if score != score else score)
        ious.append([None if value != value else value for value in iou.tolist()])

    show = show_progress(f"images of {run.name}")
    result = evaluate(
        predictor.network,
        samples,
        data,
        world,
        workers=WORKERS,
        progress=show,
        on_prediction=take,
    )
    run.scored = Scored(predictor, data, path.name, result["miou"], total.counts, scores, ious)


def _open_data(run: Run, data_dir: Path | None) -> SegmentationData:
    dataset, found = run.settings.get("dataset"), run.settings.get("data_dir")
    if not isinstance(dataset, str):
        raise InputError("config.json does not say which data the run used")
    LAYOUTS.check_own(dataset)
    if data_dir is None and isinstance(found, str):
        data_dir = Path(found)
    return open_data(dataset, data_dir)


def choose(scores: Sequence[float | None], count: int) -> dict[str, list[int]]:
    """Indices of the images to show, by kind, each worst first: at most `count` of a kind.

    Of fewer than 3 * `count` images each kind gets a third, so that none is shown twice.
    """
    order = [index for index, score in enumerate(scores) if score is not None]
    order.sort(key=lambda index: scores[index])
    count = min(count, max(1, len(order) // 3))
    worst, rest = order[:count], order[count:]
    middle, best = rest[: len(rest) - count], rest[max(0, len(rest) - count) :]
    start = max(0, (len(middle) - count) // 2)
    return dict(zip(KINDS, (worst, middle[start : start + count], best), strict=True))


def share_images(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs that were scored, those with the same images and classes together."""
    found: dict[object, list[Run]] = {}
    for run in runs:
        if run.scored is not None:
            found.setdefault((run.classes, run.scored.samples), []).append(run)
    return list(found.values())


def draw(runs: Sequence[Run], count: int) -> list[Shown]:
    """Pictures of runs that share their images, chosen by the scores of the first.

    count: how many of each of `KINDS`.

    Raises:
        InputError: an image does not fit in memory or cannot be read.
    """
    first = runs[0].scored
    shown = []
    for kind, indices in choose(first.scores, count).items() if count else ():
        for index in indices:
            sample = first.samples[index]
            picture = read_image(sample.image)
            size = _fitted(picture.size)
            ids = Image.fromarray(first.data.read_mask(sample.mask))
            truth = ids.resize(size, Image.Resampling.NEAREST)
            one = Shown(kind, sample.name, picture.resize(size, reducing_gap=None), truth)
            for run in runs:
                maps = _look(run.scored.predictor, picture, sample)
                views = (
                    part.resize(size, how)
                    for part, how in zip(
                        maps, (Image.Resampling.NEAREST, Image.Resampling.BILINEAR), strict=True
                    )
                )
                one.views.append(View(run, run.scored.scores[index], *views))
            shown.append(one)
    return shown


@torch.no_grad()
def _look(predictor: Predictor, picture: Image.Image, sample: Sample) -> list[Image.Image]:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    with fitting(f"image {sample.image} does not fit in memory: use --device cpu"):
        confidence, ids = predictor.logits(pixels).softmax(0).max(0)
    maps = ids, confidence * 255 + 0.5
    return [Image.fromarray(one.to(torch.uint8).cpu().numpy()) for one in maps]


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1, LONG_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
