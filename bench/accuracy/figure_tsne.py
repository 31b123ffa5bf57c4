"""Figure 3: t-SNE of one place's features in two contexts, and in other colors.

I and II are overlapping crops of an image, III is I in strong colors. The points are the cells of
the overlap, the same ones in all three, embedded together.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from accuracy.figure_runs import (
    Drawn,
    Run,
    data_of_run,
    drawn_by_seed,
    open_runs,
    picture_of,
    with_masks,
)
from cac_fast.train import checkpoint
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.crops import CELL, CropPair, draw_pair
from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.photometric import apply_photometric, no_change, set_place
from cac_fast.train.data.views import COLORS
from cac_fast.train.errors import InputError
from cac_fast.train.methods.contrastive import PROJECTOR_CHANNELS
from cac_fast.train.options import Parser, at_least

MOST_CELLS = 400
LEAST_CELLS = 4
SMALLEST_SPREAD = 1e-6
"""Of unit vectors in float32: what is below is rounding."""


def add_options(parser: Parser) -> None:
    """Add the options of this figure alone."""
    parser.add_argument(
        "--features",
        choices=("encoder", "projected"),
        default="encoder",
        help="as the classifier or, in runs of cac, as the loss sees them (%(default)s)",
    )
    text = "images drawn by seed whose overlaps are shown (%(default)s)"
    parser.add_argument("--rows", type=at_least(1), default=4, help=text)


def perplexity(points: int) -> float:
    """30, or as much as so few points allow."""
    return min(30.0, (points - 1) / 3)


def checked(points: np.ndarray) -> np.ndarray:
    """Points (n, D) that t-SNE can take: it ends the process where all are equal.

    Raises:
        InputError: some are not finite, or there is no difference between them.
    """
    if not np.isfinite(points).all():
        raise InputError("the features are not all finite: the network has diverged, take another")
    if np.ptp(points, axis=0).max() <= SMALLEST_SPREAD:
        raise InputError("the features are all the same: the network tells no cell from another")
    return points


def embed(points: np.ndarray) -> np.ndarray:
    """Joint t-SNE (n, 2) of points (n, D); the same bits for the same points.

    Raises:
        InputError: as `checked`, or scikit-learn is not installed.
    """
    checked(points)
    if importlib.util.find_spec("sklearn") is None:
        raise InputError("--figure 3 needs scikit-learn: pip install scikit-learn")
    from sklearn.manifold import TSNE

    return TSNE(
        n_components=2,
        perplexity=perplexity(len(points)),
        init="pca",
        learning_rate="auto",
        max_iter=1000,
        random_state=0,
    ).fit_transform(points)


def overlap_cells(pair: CropPair, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the shared cells in crop I and in crop II, both `cells` x `cells`, no flip."""
    down, right = (pair.top2 - pair.top1) // CELL, (pair.left2 - pair.left1) // CELL
    rows = np.arange(max(0, down), min(cells, cells + down))
    columns = np.arange(max(0, right), min(cells, cells + right))
    first = rows[:, None] * cells + columns
    second = (rows[:, None] - down) * cells + (columns - right)
    return first.ravel(), second.ravel()


def crop_side(height: int, width: int, wanted: int) -> int:
    """The run's crop, or what leaves room for another place of it in a small image: pixels."""
    return max(CELL, min(wanted, 3 * min(height, width) // 4 // CELL * CELL))


class Views:
    """Three views of one image: pixels (3, 3, c, c) in [0, 255], and the overlap's cells in each.

    cells: (3, n) numbers of cells with a truth. classes: (n,) these cells' true classes.
    color: "strong" or None, which leaves III as it is.
    """

    def __init__(
        self,
        image: np.ndarray,
        truth: np.ndarray,
        crop: int,
        iou_range: tuple[float, float],
        rng: np.random.Generator,
        color: str | None = "strong",
    ) -> None:
        pair = draw_pair(*truth.shape, crop, iou_range, rng)
        corners = (pair.top1, pair.left1), (pair.top2, pair.left2), (pair.top1, pair.left1)
        cuts = [image[top : top + crop, left : left + crop] for top, left in corners]
        self.pixels = torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).float()
        if color is not None:
            changes = no_change()
            while (changes == no_change()).all():  # some draws of the trainer's change nothing
                changes = COLORS[color](rng)
            set_place(changes, crop, 0, crop)
            apply_photometric(self.pixels[2:], torch.from_numpy(changes)[None])
        first, second = overlap_cells(pair, crop // CELL)
        half = CELL // 2
        centers = truth[pair.top1 + half :: CELL, pair.left1 + half :: CELL]
        classes = centers[: crop // CELL, : crop // CELL].ravel()[first]
        known = classes != IGNORE
        self.classes = classes[known]
        self.cells = np.stack([first, second, first])[:, known]


def views_of(samples: Sequence[Sample], data: SegmentationData, run: Run, seed: int) -> list[Views]:
    """Of every sample, in its own size, the views that the run's settings allow."""
    rng = np.random.default_rng(seed)
    found = []
    for sample in samples:
        pixels, truth = PixelReader(data).both(sample)
        image = np.asarray(pixels)
        crop = crop_side(*truth.shape, run.config.data.crop_size)
        found.append(Views(image, truth, crop, run.config.data.iou_range, rng))
    return found


def projector_of(run: Run) -> nn.Module:
    """The projector that a run of cac trained.

    Raises:
        InputError: its last state has none.
    """
    weights = {
        name.removeprefix("projector."): value
        for name, value in checkpoint.read(run.path).get("method", {}).items()
        if name.startswith("projector.")
    }
    if not weights:
        raise InputError(f"{run.path} holds no projector: use --features encoder, or runs of cac")
    channels = run.predictor.network.feature_channels
    layers = nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, PROJECTOR_CHANNELS, 1)
    projector = nn.Sequential(*layers)
    checkpoint.load_model(projector, weights, run.path)
    return projector


@torch.no_grad()
def features_of(run: Run, views: Views, projector: nn.Module | None) -> Tensor:
    """(3, n, D) unit vectors of the overlap's cells in the three views, as the loss sees them."""
    predictor = run.predictor
    features = predictor.network.features((views.pixels / 255 - predictor.mean) / predictor.std)
    if predictor.network.feature_stride == CELL // 2:
        features = F.avg_pool2d(features, 2)
    if projector is not None:
        features = projector(features)
    flat = F.normalize(features.flatten(2).transpose(1, 2), dim=2)
    return torch.stack(
        [view[torch.from_numpy(c)] for view, c in zip(flat, views.cells, strict=True)]
    )


def mean_cosines(features: Tensor) -> tuple[float, float]:
    """Mean cosine of the pairs (I, II) and (I, III) of unit vectors (3, n, D)."""
    first, second, third = features.double()
    return float((first * second).sum(1).mean()), float((first * third).sum(1).mean())


def thinned(features: Tensor, classes: np.ndarray, seed: int) -> tuple[Tensor, np.ndarray]:
    """At most 400 of the cells, drawn by seed.

    Raises:
        InputError: there are too few.
    """
    if len(classes) < LEAST_CELLS:
        raise InputError(f"the overlaps have {len(classes)} cells of known truth: use more --rows")
    places = np.random.default_rng(seed).permutation(len(classes))[:MOST_CELLS]
    return features[:, torch.from_numpy(places)], classes[places]


def make(options: argparse.Namespace) -> Drawn:
    """Embed the overlaps of a few images by each run.

    Raises:
        InputError: a run, its data or its features cannot be used.
    """
    # The projector is in the last state alone, and belongs to that network.
    projected = options.features == "projected"
    runs = open_runs(options.runs, options.captions, "last.pt" if projected else None)
    data = data_of_run(runs[0], options.data_dir)
    samples = drawn_by_seed(with_masks(data, options.split), options.rows, options.seed)
    views = views_of(samples, data, runs[0], options.seed)
    all_classes = np.concatenate([one.classes for one in views])
    panels, numbers = [], []
    for run in runs:
        projector = projector_of(run) if projected else None
        features = torch.cat([features_of(run, one, projector) for one in views], dim=1)
        features, classes = thinned(features, all_classes, options.seed)
        context, color = mean_cosines(features)
        points = embed(features.flatten(0, 1).numpy()).reshape(3, -1, 2)
        text = f"{run.name}: mean cosine of (I, II) {context:.3f}, of (I, III) {color:.3f}"
        print(text)
        panels.append((text, points, classes))
        numbers.append({"run": run.name, "cells": len(classes), "I-II": context, "I-III": color})
    shown = [sample.name for sample in samples]
    return Drawn(
        draw(panels, data), {"images": shown, "features": options.features, "runs": numbers}
    )


def draw(
    panels: Sequence[tuple[str, np.ndarray, np.ndarray]], data: SegmentationData
) -> Image.Image:
    """A row of three panels for each run, with equal axes, colored by true class."""
    from matplotlib.figure import Figure

    heads = "I: one crop", "II: another crop", "III: I in strong colors"
    figure = Figure(figsize=(10.5, 3.6 * len(panels) + 0.5), dpi=90, layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(panels), 1))
    there = np.unique(np.concatenate([classes for _, _, classes in panels]))
    for part, (text, points, classes) in zip(parts, panels, strict=True):
        part.suptitle(text.replace("$", r"\$"), fontsize=11)
        low, high = points.min((0, 1)), points.max((0, 1))
        margin = 0.04 * (high - low)
        for axis, head, view in zip(part.subplots(1, 3), heads, points, strict=True):
            for index in there:
                axis.scatter(
                    *view[classes == index].T,
                    s=14,
                    color=np.array(data.palette[index]) / 255,
                    edgecolors="0.25",
                    linewidths=0.3,
                    label=data.classes[index],
                )
            axis.set(title=head, xticks=[], yticks=[])
            axis.set(xlim=(low[0] - margin[0], high[0] + margin[0]))
            axis.set(ylim=(low[1] - margin[1], high[1] + margin[1]))
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    return picture_of(figure)
