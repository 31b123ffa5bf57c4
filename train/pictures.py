"""Pictures of masks as colors: a data folder's contact sheet, and what a network predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cac_fast.train.data.images import IGNORE, check_size, read_image
from cac_fast.train.data.inventory import Inventory, Part
from cac_fast.train.data.layouts import SPLITS, Sample, SegmentationData
from cac_fast.train.errors import writing

SAMPLES = 3
SAMPLE_WIDTH = 480

COLUMNS, ROWS = 4, 3
TILE = (320, 240)
"""Width and height that a picture of the contact sheet is fitted into."""
OPACITY = 0.55

_MARGIN, _CAPTION, _TITLE = 16, 24, 40
_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 34), (120, 120, 128)


def colorize(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Colors (H, W, 3) uint8 of class ids (H, W) uint8; 255 is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[labels]


class SampleSheet:
    """The first few predictions of an evaluation, one row each: image, truth, prediction."""

    def __init__(self, palette: Sequence[Sequence[int]]) -> None:
        self.palette = palette
        self.rows: list[np.ndarray] = []

    def add(self, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Take (H, W, 3), (H, W) and (H, W) uint8 arrays; all but the first few are passed over."""
        if len(self.rows) < SAMPLES:
            maps = (colorize(labels, self.palette) for labels in (truth, prediction))
            self.add_row(image, *maps)

    def add_row(self, *pictures: np.ndarray) -> None:
        """Add a row of pictures (H, W, 3) uint8."""
        row = Image.fromarray(np.concatenate(pictures, axis=1))
        row.thumbnail((len(pictures) * SAMPLE_WIDTH, row.height), reducing_gap=None)
        self.rows.append(np.asarray(row))

    def write(self, path: Path) -> np.ndarray | None:
        """Write the rows below each other; return the pixels (H, W, 3) uint8, None without rows.

        Raises:
            InputError: they cannot be written.
        """
        if not self.rows:
            return None
        width = max(row.shape[1] for row in self.rows)
        rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in self.rows]
        pixels = np.concatenate(rows)
        draft = path.with_suffix(".part")
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(draft, "PNG")
            draft.replace(path)
        return pixels


def draw_contact_sheet(inventory: Inventory) -> Image.Image:
    """The labeled images, validation and test below them, evenly chosen, with a legend."""
    data, font = inventory.data, ImageFont.load_default(15)
    step = TILE[0] + _MARGIN, TILE[1] + _CAPTION + _MARGIN
    width = COLUMNS * step[0] + _MARGIN
    legend = _legend(inventory, width - 2 * _MARGIN, font)
    top = legend.height + 3 * _MARGIN
    most = len(inventory.parts) * _TITLE + (ROWS + len(inventory.parts) - 1) * step[1]
    sheet = Image.new("RGB", (width, top + most), _PAPER)
    sheet.paste(legend, (_MARGIN, _MARGIN))
    pen = ImageDraw.Draw(sheet)
    for split, part, rows in zip(SPLITS, inventory.parts, (ROWS, 1, 1), strict=True):
        if not part.seen:
            continue
        samples = _chosen(part, data.splits[split], COLUMNS * rows)
        text = f"{part.name}: {len(samples)} of {len(part.seen)} images with a mask"
        pen.text((_MARGIN, top), text, _INK, ImageFont.load_default(20))
        top += _TITLE
        for index, sample in enumerate(samples):
            row, column = divmod(index, COLUMNS)
            left, place = _MARGIN + column * step[0], top + row * step[1]
            sheet.paste(ImageOps.pad(_tile(sample, data), TILE, color=_PAPER), (left, place))
            caption = shortened(sample.name, TILE[0], font)
            pen.text((left, place + TILE[1] + 4), caption, _FAINT, font)
        top += -(-len(samples) // COLUMNS) * step[1]
    return sheet.crop((0, 0, width, top))


def _chosen(part: Part, samples: Sequence[Sample], most: int) -> list[Sample]:
    usable = {one.name for one in part.seen}
    samples = [sample for sample in samples if sample.name in usable]
    places = np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int)
    return [samples[place] for place in places]


def _tile(sample: Sample, data: SegmentationData) -> Image.Image:
    image, mask = read_image(sample.image), data.read_mask(sample.mask)
    check_size(sample.mask, mask.shape, sample.image, image.size[::-1])
    small = ImageOps.contain(image, TILE)
    ids = np.asarray(Image.fromarray(mask).resize(small.size, Image.Resampling.NEAREST))
    pixels = np.asarray(small).astype(np.float32)
    mixed = (1 - OPACITY) * pixels + OPACITY * colorize(ids, data.palette)
    # What is ignored stays gray and striped, so that it is not taken for a dark class.
    gray = pixels.mean(2, keepdims=True) * 0.5 + 110 * _stripes(ids.shape)[..., None]
    mixed = np.where((ids != IGNORE)[..., None], mixed, gray)
    mixed[:, 1:][ids[:, 1:] != ids[:, :-1]] = 255
    mixed[1:][ids[1:] != ids[:-1]] = 255
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _stripes(shape: tuple[int, int]) -> np.ndarray:
    return np.indices(shape).sum(0) // 4 % 2


def _legend(inventory: Inventory, width: int, font: ImageFont.ImageFont) -> Image.Image:
    data, learned = inventory.data, inventory.parts[0]
    names = [*(f"{index} {name}" for index, name in enumerate(data.classes)), "255 ignored"]
    cell = max(200, 134 + int(max(map(font.getlength, names))))
    columns = max(1, width // cell)
    legend = Image.new("RGB", (width, 36 - len(names) // -columns * 26), _PAPER)
    pen = ImageDraw.Draw(legend)
    title_font = ImageFont.load_default(20)
    title = shortened(f"{data.dataset}  {data.root}", width, title_font)
    pen.text((0, 0), title, _INK, title_font)
    for index, name in enumerate(names):
        left, top = index % columns * cell, 36 + index // columns * 26
        pen.text((left + 36, top), name, _INK, font)
        if index == len(data.classes):
            stripes = (70 + 110 * _stripes((18, 28))).astype(np.uint8)
            legend.paste(Image.fromarray(stripes).convert("RGB"), (left, top))
        else:
            pen.rectangle((left, top, left + 27, top + 17), tuple(data.palette[index]), _FAINT)
            after = left + 44 + font.getlength(name)
            pen.text((after, top), f"{100 * learned.share(index):.1f} %", _FAINT, font)
    return legend


def shortened(text: str, width: int, font: ImageFont.ImageFont) -> str:
    """The end of a text that fits into `width` pixels."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text
