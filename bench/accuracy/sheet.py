"""Where two trained networks differ: a sheet of images, chosen by rule.

    python bench/accuracy/sheet.py --checkpoints runs/a/last.pt runs/b/last.pt --dataset folder \\
        --data-dir DIR --output sheet.png

A row shows an image, the truth, what each network says, and where one of them alone is right. The
rows are the images of the split on which the second network gains most over the first, on which it
gains as much as in the median, and on which it gains least or loses most, by the mean IoU of the
classes that the image's mask has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.figure_runs import fitted
from cac_fast.train import load
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.images import IGNORE, read_image
from cac_fast.train.data.layouts import Sample, open_data
from cac_fast.train.data.lists import named
from cac_fast.train.distributed import run_command
from cac_fast.train.errors import InputError, writing
from cac_fast.train.evaluation import ConfusionMatrix
from cac_fast.train.options import Parser, add_data_options
from cac_fast.train.pictures import colorize
from lib.measure import progress

TILE = (320, 240)
_MARGIN, _CAPTION, _LINE = 8, 24, 18
_PAPER, _INK = (250, 250, 248), (30, 30, 34)
FIRST_ALONE, SECOND_ALONE = (214, 39, 40), (44, 160, 44)
"""Colors of pixels where one network alone is right."""


class Row(NamedTuple):
    """An image with its truth and both predictions, (H, W) uint8, and the second one's gain."""

    sample: Sample
    truth: np.ndarray
    predictions: tuple[np.ndarray, np.ndarray]
    gain: float


def image_miou(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Mean IoU of the classes that `truth` has, over its labeled pixels; 0 where it has none."""
    confusion = ConfusionMatrix(IGNORE, "cpu")
    confusion.update(torch.from_numpy(truth), torch.from_numpy(prediction))
    return confusion.iou_of_true.nanmean().nan_to_num().item()


def choose(gains: Sequence[float], rows: int) -> dict[str, list[int]]:
    """The places of the largest gains, of those nearest to the median, and of the least ones.

    rows: of each kind; fewer where there are not enough images for all to be different.
    """
    order = np.argsort(gains, kind="stable")[::-1].tolist()
    rows = min(rows, max(1, len(order) // 3))
    begin = (len(order) - rows) // 2
    kinds = {"gain": order[:rows], "median": order[begin : begin + rows], "least": order[-rows:]}
    return kinds if len(order) >= 3 else {"gain": order[:1]}


def draw(rows: dict[str, list[Row]], names: Sequence[str], palette: Sequence) -> Image.Image:
    """The sheet of all rows, with a line of words above each."""
    heads = ["image", "truth", *names, f"right: {names[1]} alone green, {names[0]} alone red"]
    drawn = []
    for kind, of_kind in rows.items():
        for row in of_kind:
            maps = [colorize(ids, palette) for ids in (row.truth, *row.predictions)]
            tiles = [read_image(row.sample.image), *map(Image.fromarray, [*maps, told(row)])]
            drawn.append(
                (f"{kind}: {row.sample.name}, {100 * row.gain:+.1f} points of mIoU", tiles)
            )
    return grid(heads, drawn)


def grid(
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    tile: tuple[int, int] = TILE,
) -> Image.Image:
    """Rows of pictures below their heads, each fitted into `tile`, a line of words above a row.

    A head that is too long goes on in further lines, of a row's words the end is kept.
    """
    font = ImageFont.load_default(15)
    lines = [wrapped(head, tile[0]) for head in heads]
    begin = _CAPTION + _LINE * (max(map(len, lines)) - 1)
    step = tile[0] + _MARGIN, tile[1] + _CAPTION + _MARGIN
    size = len(heads) * step[0] + _MARGIN, len(rows) * step[1] + begin + _MARGIN
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(lines):
        for number, line in enumerate(head):
            pen.text((_MARGIN + column * step[0], 4 + number * _LINE), line, _INK, font)
    for top, (text, pictures) in zip(range(begin, size[1], step[1]), rows, strict=False):
        pen.text((_MARGIN, top + 4), fitted(text, size[0] - 2 * _MARGIN), _INK, font)
        for column, picture in enumerate(pictures):
            padded = ImageOps.pad(picture, tile, Image.Resampling.NEAREST, _PAPER)
            sheet.paste(padded, (_MARGIN + column * step[0], top + _CAPTION))
    return sheet


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` pixels; of a longer word its end."""
    font = ImageFont.load_default(15)
    first, *others = (fitted(word, width) for word in text.split() or [""])
    lines = [first]
    for word in others:
        line = f"{lines[-1]} {word}"
        if font.getlength(line) <= width:
            lines[-1] = line
        else:
            lines.append(word)
    return lines


def told(row: Row) -> np.ndarray:
    """(H, W, 3) uint8: where one network alone is right; gray where both are, or none."""
    first, second = (row.truth == prediction for prediction in row.predictions)
    picture = np.full((*row.truth.shape, 3), 225, np.uint8)
    picture[(row.truth != IGNORE) & ~first & ~second] = 170
    picture[first & ~second], picture[second & ~first] = FIRST_ALONE, SECOND_ALONE
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose and draw.

    Raises:
        InputError: a checkpoint or an image cannot be used, or the sheet cannot be written.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    parser.add_argument("--checkpoints", type=Path, nargs=2, required=True, metavar="RUN")
    parser.add_argument("--captions", nargs=2, metavar="NAME", help="of the two (default: folders)")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="(%(default)s)")
    parser.add_argument(
        "--names", type=Path, metavar="FILE", help="only these images, a NAME a line"
    )
    parser.add_argument("--rows", type=int, default=1, help="of each kind (%(default)s)")
    parser.add_path("--output", "FILE.png", "the sheet", writable=True, required=True)
    options = parser.parse_args(arguments)
    data = open_data(options.dataset, options.data_dir)
    samples = [sample for sample in data.splits[options.split] if sample.mask is not None]
    if options.names is not None:
        samples = named(samples, options.names)
    if not samples:
        raise InputError(f"the {options.split} split of {data.root} holds no image with a mask")
    networks = [load(path) for path in options.checkpoints]
    found = []
    for number, sample in enumerate(samples, start=1):
        image, truth = PixelReader(data).both(sample)
        one, other = (network.predict(image) for network in networks)
        gain = image_miou(truth, other) - image_miou(truth, one)
        found.append(Row(sample, truth, (one, other), gain))
        progress(f"image {number} of {len(samples)}")
    chosen = choose([row.gain for row in found], options.rows)
    rows = {kind: [found[place] for place in places] for kind, places in chosen.items()}
    names = options.captions or [
        path.parent.name if path.is_file() else path.name for path in options.checkpoints
    ]
    with writing(options.output):
        draw(rows, names, data.palette).save(options.output)
    for kind, of_kind in rows.items():
        for row in of_kind:
            print(f"{kind}: {row.sample.name} {100 * row.gain:+.1f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
