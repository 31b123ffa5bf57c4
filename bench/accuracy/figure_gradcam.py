"""Figure 1: Grad-CAM of one location, where a network looks to tell that pixel's class.

The score is the logit of a class at one pixel, the map the backbone's last: behind the head's
pyramid the gradient reaches the pixel's own cell alone.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from accuracy.figure_runs import (
    Drawn,
    data_of_run,
    drawn_by_seed,
    open_runs,
    sample_called,
    with_masks,
    with_truth,
)
from accuracy.sheet import TILE, grid
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.images import IGNORE
from cac_fast.train.errors import InputError
from cac_fast.train.inference import Predictor, pad_image
from cac_fast.train.networks import upsample_logits
from cac_fast.train.options import Parser, at_least


class Place(NamedTuple):
    """A pixel, by row and column."""

    y: int
    x: int


def add_options(parser: Parser) -> None:
    """Add the options of this figure alone."""
    parser.add_argument("--image", metavar="NAME", help="one image, with --at; else drawn by seed")
    parser.add_argument("--at", type=_place, metavar="X,Y", help="the pixel of --image")
    text = "whose score is explained (default: what each run says there)"
    parser.add_argument("--class", dest="class_name", metavar="NAME", help=text)
    parser.add_argument(
        "--rows", type=at_least(1), default=3, help="images drawn by seed (%(default)s)"
    )


def _place(text: str) -> Place:
    try:
        x, y = (int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no pixel, as 120,40") from None
    return Place(y, x)


def grad_cam(
    network: nn.Module, layer: nn.Module, images: Tensor, place: Place, index: int | None = None
) -> tuple[Tensor, int]:
    """Grad-CAM (h, w) of the logit of a class at one pixel, and the class.

    network: images (1, 3, H, W) to logits (1, K, H, W); keeps its mode and gets no gradients.
    layer: whose output, or the last of its outputs, is the map (1, C, h, w).
    index: the class; None: the one of the largest logit.
    """
    kept = []

    def keep(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple:
        *others, last = output if isinstance(output, tuple) else (output,)
        kept.append(last.detach().requires_grad_())
        return (*others, kept[-1]) if others else kept[-1]

    handle = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            scores = network(images)[0, :, place.y, place.x]
    finally:
        handle.remove()
    index = int(scores.argmax()) if index is None else index
    (gradient,) = torch.autograd.grad(scores[index], kept[-1])
    weights = gradient[0].mean((1, 2), keepdim=True)
    return (weights * kept[-1][0].detach()).sum(0).relu(), index


def explained(
    predictor: Predictor, image: Image.Image, place: Place, index: int | None
) -> tuple[np.ndarray, int]:
    """Grad-CAM (H, W) in [0, 1] of an image, by its largest value unless all are 0; the class."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    normalized = (pixels / 255 - predictor.mean) / predictor.std
    padded = pad_image(normalized[None], predictor.multiple)
    network = predictor.network
    cam, index = grad_cam(network, network.backbone, padded, place, index)
    cam = upsample_logits(cam[None, None], padded.shape[-2:])[0, 0, : image.height, : image.width]
    return (cam / cam.max() if cam.max() > 0 else cam).numpy(), index


def region_of(truth: np.ndarray, place: Place) -> np.ndarray:
    """(H, W) bool: the pixels of the true class that are connected with a pixel, sides touching."""
    same = truth == truth[place]
    region = np.zeros_like(same)
    region[place] = True
    size = 0
    while size < (size := int(region.sum())):
        grown = region.copy()
        grown[1:] |= region[:-1]
        grown[:-1] |= region[1:]
        grown[:, 1:] |= region[:, :-1]
        grown[:, :-1] |= region[:, 1:]
        region = grown & same
    return region


def share_inside(cam: np.ndarray, region: np.ndarray) -> float | None:
    """The part of the map's sum that lies in a region; None of a map that is 0."""
    return float(cam[region].sum() / cam.sum()) if cam.any() else None


def draw_place(truth: np.ndarray, rng: np.random.Generator) -> Place:
    """A pixel of known truth: every class of the image is as likely, so is each of its pixels."""
    index = rng.choice(np.unique(truth[truth != IGNORE]))
    pixels = np.argwhere(truth == index)
    return Place(*map(int, pixels[rng.integers(len(pixels))]))


def marked(image: Image.Image, place: Place) -> Image.Image:
    """The image, as large as its tile will be, with a cross at the pixel."""
    ratio = min(TILE[0] / image.width, TILE[1] / image.height)
    size = round(ratio * image.width), round(ratio * image.height)
    larger = image.resize(size, Image.Resampling.BICUBIC)
    pen, (y, x) = ImageDraw.Draw(larger), (ratio * (place.y + 0.5), ratio * (place.x + 0.5))
    for width, color in ((5, (0, 0, 0)), (2, (255, 255, 255))):
        pen.line((x - 9, y, x + 9, y), color, width)
        pen.line((x, y - 9, x, y + 9), color, width)
    return larger


def heated(image: Image.Image, cam: np.ndarray) -> Image.Image:
    """The image and a map in [0, 1] as colors, half and half."""
    from matplotlib import colormaps

    colors = colormaps["jet"](cam)[..., :3] * 255
    return Image.fromarray((0.5 * np.asarray(image) + 0.5 * colors).astype(np.uint8))


def make(options: argparse.Namespace) -> Drawn:
    """Explain a pixel of each image by each run.

    Raises:
        InputError: a run, its data, the image, the pixel or the class cannot be used.
    """
    runs = open_runs(options.runs, options.captions)
    data = data_of_run(runs[0], options.data_dir)
    samples = with_masks(data, options.split)
    if (options.image is None) != (options.at is None):
        raise InputError("--image and --at go together: give both, or none to draw by --seed")
    index = None
    if options.class_name is not None:
        if options.class_name not in data.classes:
            raise InputError(f"--class {options.class_name}: use one of {', '.join(data.classes)}")
        index = data.classes.index(options.class_name)
    if options.image is None:
        drawn = drawn_by_seed(samples, len(samples), options.seed)
        chosen = with_truth(drawn, data, options.rows)
    else:
        chosen = [sample_called(samples, options.image)]
    rng = np.random.default_rng(options.seed)
    rows, numbers = [], []
    for sample in chosen:
        image, truth = PixelReader(data).both(sample)
        place = options.at or draw_place(truth, rng)
        if not (0 <= place.y < image.height and 0 <= place.x < image.width):
            raise InputError(
                f"--at {place.x},{place.y} lies outside of {sample.name}, which is {image.width} x "
                f"{image.height}"
            )
        tiles, found = [marked(image, place)], []
        known = truth[place] != IGNORE
        region = region_of(truth, place) if known else None
        for run in runs:
            cam, told = explained(run.predictor, image, place, index)
            share = share_inside(cam, region) if known else None
            found.append({"run": run.name, "class": data.classes[told], "inside": share})
            tiles.append(marked(heated(image, cam), place))
        true = data.classes[truth[place]] if known else "unknown"
        says = ", ".join(
            f"{one['run']}: {one['class']}, "
            + ("-" if one["inside"] is None else f"{100 * one['inside']:.0f} % inside")
            for one in found
        )
        text = f"{sample.name} at {place.x},{place.y}, {true}. {says}"
        print(text)
        rows.append((text, tiles))
        where = {"image": sample.name, "at": [place.x, place.y], "truth": true}
        numbers.append({**where, "runs": found})
    return Drawn(grid(["image", *(run.name for run in runs)], rows), {"rows": numbers})
