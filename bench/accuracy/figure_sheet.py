"""Figure 8: what several networks say of the images on which they differ most, and of others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from accuracy.figure_runs import Drawn, data_of_run, open_runs, with_masks, with_truth
from accuracy.sheet import grid, image_miou
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.layouts import SegmentationData
from cac_fast.train.errors import InputError
from cac_fast.train.options import Parser, at_least
from cac_fast.train.pictures import colorize
from lib.measure import progress

TILE = (208, 156)
_SWATCH, _LINE = 14, 20


def add_options(parser: Parser) -> None:
    """Add the options of this figure alone."""
    text = "images chosen to differ, and again so many drawn by --seed (%(default)s)"
    parser.add_argument("--rows", type=at_least(1), default=4, help=text)


def choose(
    names: Sequence[str], scores: Sequence[Sequence[float]], rows: int, seed: int
) -> tuple[list[int], list[int]]:
    """Places of the images whose scores are furthest apart, and of others drawn by seed.

    names: of the images; a tie is decided by them. scores: of each image, one a run.
    rows: of each kind; fewer if there are not enough images.
    """
    apart = [max(of_image) - min(of_image) for of_image in scores]
    order = sorted(range(len(names)), key=lambda place: (-apart[place], names[place]))
    others = sorted(order[rows:])
    drawn = np.random.default_rng(seed).permutation(len(others))[:rows]
    return order[:rows], [others[place] for place in drawn]


def make(options: argparse.Namespace) -> Drawn:
    """Score every image, choose and draw.

    Raises:
        InputError: there is one run alone, or a run, its data or an image cannot be used.
    """
    if len(options.runs) < 2:
        raise InputError("--figure 8 compares runs: give two or more")
    runs = open_runs(options.runs, options.captions)
    data = data_of_run(runs[0], options.data_dir)
    samples = with_truth(with_masks(data, options.split), data)
    scores = []
    for number, sample in enumerate(samples, start=1):
        image, truth = PixelReader(data).both(sample)
        scores.append([image_miou(truth, run.predictor.predict(image)) for run in runs])
        progress(f"image {number} of {len(samples)}")
    names = [sample.name for sample in samples]
    chosen = choose(names, scores, options.rows, options.seed)
    rows, numbers = [], []
    for kind, places in zip(("chosen to differ", "drawn by seed"), chosen, strict=True):
        for place in places:
            image, truth = PixelReader(data).both(samples[place])
            maps = [truth, *(run.predictor.predict(image) for run in runs)]
            tiles = [image, *(Image.fromarray(colorize(ids, data.palette)) for ids in maps)]
            found = ", ".join(
                f"{run.name} {100 * score:.1f}"
                for run, score in zip(runs, scores[place], strict=True)
            )
            text = f"{kind}: {names[place]}, mIoU {found}"
            rows.append((text, tiles))
            numbers.append({"image": names[place], "kind": kind, "miou": scores[place]})
            print(text)
    heads = ["image", "truth", *(run.name for run in runs)]
    image = with_legend(grid(heads, rows, TILE), data)
    return Drawn(image, {"runs": [run.name for run in runs], "rows": numbers})


def with_legend(sheet: Image.Image, data: SegmentationData) -> Image.Image:
    """The sheet, and below it the name of every class beside its color."""
    font, margin = ImageFont.load_default(13), 8
    cell = 3 * margin + _SWATCH + max(int(font.getlength(name)) for name in data.classes)
    columns = max(1, (sheet.width - margin) // cell)
    height = sheet.height + -(-len(data.classes) // columns) * _LINE + margin
    whole = ImageOps.pad(
        sheet, (sheet.width, height), color=sheet.getpixel((0, 0)), centering=(0, 0)
    )
    pen = ImageDraw.Draw(whole)
    for index, (name, color) in enumerate(zip(data.classes, data.palette, strict=True)):
        left, top = margin + index % columns * cell, sheet.height + index // columns * _LINE
        pen.rectangle((left, top, left + _SWATCH, top + _SWATCH), tuple(color))
        pen.text((left + _SWATCH + margin, top), name, (30, 30, 34), font)
    return whole
