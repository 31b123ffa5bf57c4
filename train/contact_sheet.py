"""One picture of a data folder: images with their masks over them, and the classes' colors."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cac_fast.train.colors import colorize
from cac_fast.train.data.images import IGNORE, check_size, read_image
from cac_fast.train.data.inventory import Inventory, Part
from cac_fast.train.data.layouts import Sample, SegmentationData

COLUMNS, ROWS = 4, 3
TILE = (320, 240)
"""Width and height that a picture is fitted into."""
OPACITY = 0.55

_MARGIN, _CAPTION = 16, 24
_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 34), (120, 120, 128)
_SPLITS = {"labeled": "train", "validation": "val", "test": "test"}


def draw(inventory: Inventory) -> Image.Image:
    """The labeled images, validation and test below them, evenly chosen, with a legend."""
    data, font = inventory.data, ImageFont.load_default(15)
    blocks = [
        (part, _chosen(part, data, COLUMNS * (ROWS if part is inventory.parts[0] else 1)))
        for part in inventory.parts
        if part.seen
    ]
    step = TILE[0] + _MARGIN, TILE[1] + _CAPTION + _MARGIN
    width = COLUMNS * step[0] + _MARGIN
    legend = _legend(inventory, width - 2 * _MARGIN, font)
    rows = sum(-(-len(samples) // COLUMNS) for _, samples in blocks)
    height = _MARGIN + legend.height + 2 * _MARGIN
    sheet = Image.new("RGB", (width, height + rows * step[1] + len(blocks) * 40), _PAPER)
    sheet.paste(legend, (_MARGIN, _MARGIN))
    pen, top = ImageDraw.Draw(sheet), height
    for part, samples in blocks:
        text = f"{part.name}: {len(samples)} of {len(part.seen)} images with a mask"
        pen.text((_MARGIN, top), text, _INK, ImageFont.load_default(20))
        top += 40
        for index, sample in enumerate(samples):
            left = _MARGIN + index % COLUMNS * step[0]
            place = top + index // COLUMNS * step[1]
            tile = _tile(sample, data)
            shift = (TILE[0] - tile.width) // 2, (TILE[1] - tile.height) // 2
            sheet.paste(tile, (left + shift[0], place + shift[1]))
            caption = _shortened(sample.name, TILE[0], font)
            pen.text((left, place + TILE[1] + 4), caption, _FAINT, font)
        top += -(-len(samples) // COLUMNS) * step[1]
    return sheet


def _chosen(part: Part, data: SegmentationData, most: int) -> list[Sample]:
    usable = {one.name for one in part.seen}
    samples = [sample for sample in data.splits[_SPLITS[part.name]] if sample.name in usable]
    places = np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int)
    return [samples[place] for place in places]


def _tile(sample: Sample, data: SegmentationData) -> Image.Image:
    image, mask = read_image(sample.image), data.read_mask(sample.mask)
    check_size(sample.mask, mask.shape, sample.image, image.size[::-1])
    small = ImageOps.contain(image, TILE)
    ids = np.asarray(Image.fromarray(mask).resize(small.size, Image.Resampling.NEAREST))
    pixels = np.asarray(small).astype(np.float32)
    known = (ids != IGNORE)[..., None]
    mixed = (1 - OPACITY) * pixels + OPACITY * colorize(ids, data.palette)
    # What is ignored stays gray and striped, so that it is not taken for a dark class.
    gray = pixels.mean(2, keepdims=True) * 0.5 + 110 * _stripes(ids.shape)[..., None]
    mixed = np.where(known, mixed, gray)
    mixed[_edges(ids)] = 255
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _stripes(shape: tuple[int, int]) -> np.ndarray:
    rows, columns = np.indices(shape)
    return (rows + columns) // 4 % 2


def _edges(ids: np.ndarray) -> np.ndarray:
    edges = np.zeros(ids.shape, bool)
    edges[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edges[1:] |= ids[1:] != ids[:-1]
    return edges


def _legend(inventory: Inventory, width: int, font: ImageFont.ImageFont) -> Image.Image:
    data, learned = inventory.data, inventory.parts[0]
    entries = [
        (tuple(color), f"{index} {name}", learned.share(index))
        for index, (name, color) in enumerate(zip(data.classes, data.palette, strict=True))
    ]
    cell = max(200, 64 + int(max(font.getlength(text) + 70 for _, text, _ in entries)))
    columns = max(1, width // cell)
    rows = -(-(len(entries) + 1) // columns)
    legend = Image.new("RGB", (width, 36 + rows * 26), _PAPER)
    pen = ImageDraw.Draw(legend)
    title = _shortened(f"{data.dataset}  {data.root}", width, ImageFont.load_default(20))
    pen.text((0, 0), title, _INK, ImageFont.load_default(20))
    for index, (color, text, share) in enumerate([*entries, (None, "255 ignored", None)]):
        left, top = index % columns * cell, 36 + index // columns * 26
        if color is None:
            stripes = (70 + 110 * _stripes((18, 28))).astype(np.uint8)
            legend.paste(Image.fromarray(stripes).convert("RGB"), (left, top))
        else:
            pen.rectangle((left, top, left + 27, top + 17), color, _FAINT)
        pen.text((left + 36, top), text, _INK, font)
        if share is not None:
            after = left + 44 + font.getlength(text)
            pen.text((after, top), f"{100 * share:.1f} %", _FAINT, font)
    return legend


def _shortened(text: str, width: int, font: ImageFont.ImageFont) -> str:
    """The end of a text that fits into `width` pixels."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text
