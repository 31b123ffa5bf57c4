"""What stands behind the objects: sky, houses, greenery, sidewalk and road."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cac_fast.train.data.toycity.canvas import HEIGHT, WIDTH, Canvas
from cac_fast.train.data.toycity.classes import BUILDING, ROAD, SIDEWALK, SKY, VEGETATION
from cac_fast.train.data.toycity.texture import smooth_noise, tiles

SKIES = np.array(
    [
        ((104, 156, 216), (206, 224, 238)),
        ((150, 160, 172), (212, 214, 214)),
        ((112, 118, 178), (246, 196, 154)),
    ],
    dtype=np.float32,
)
BRICKS = np.array([(158, 84, 66), (138, 70, 64), (172, 108, 80)], dtype=np.float32)
PLASTERS = np.array([(214, 200, 172), (196, 204, 208), (222, 186, 160)], dtype=np.float32)
LEAVES = np.array([(74, 116, 52), (96, 128, 56), (58, 100, 66)], dtype=np.float32)
ROADS = {
    "dark": np.array((74, 76, 82), dtype=np.float32),
    "light": np.array((156, 152, 146), dtype=np.float32),
}
FRAME, GLASS, LAMPLIGHT = (236, 232, 222), (52, 66, 88), (238, 214, 140)


class Block(NamedTuple):
    """A stretch of the row behind the sidewalk, from pixel column `left` to `right`.

    `kind` is "brick", "plaster", "greenery" or "open", the last a gap through which the sky shows.
    """

    kind: str
    left: int
    right: int


def draw_sky(rng: np.random.Generator) -> Canvas:
    """A new canvas filled with sky and clouds."""
    top, bottom = SKIES[rng.integers(len(SKIES))]
    down = np.minimum(np.arange(HEIGHT, dtype=np.float32) / 80, 1)[:, None, None]
    large, small = (smooth_noise(rng, HEIGHT, WIDTH, *cell) for cell in ((14, 48), (6, 14)))
    cover = np.minimum(np.maximum((large * 2 + small) * 1.33 - 2, 0), 0.8)
    sky = top + (bottom - top) * down
    return Canvas(sky + (244 - sky) * cover, SKY)


def draw_block(canvas: Canvas, rng: np.random.Generator, block: Block, base: int) -> None:
    """Draw one block of the row, standing on line `base`."""
    if block.kind == "greenery":
        _draw_greenery(canvas, rng, block, base)
    elif block.kind != "open":
        _draw_house(canvas, rng, block, base)


def _draw_house(canvas: Canvas, rng: np.random.Generator, block: Block, base: int) -> None:
    left, right = block.left, block.right
    top = 4 + int(rng.integers(27))
    height, width = base - top, right - left
    if block.kind == "brick":
        paint = BRICKS[rng.integers(len(BRICKS))]
        tone, joint = tiles(rng, height, width, (5, 10))
        wall = np.where(joint, paint * 0.45 + 100, paint * (0.78 + 0.4 * tone))
    else:
        paint = PLASTERS[rng.integers(len(PLASTERS))]
        stains, grit = (smooth_noise(rng, height, width, cell) for cell in (20, 3))
        wall = paint * (0.84 + 0.16 * stains + 0.08 * grit)
    canvas.fill(left, top, right, base, wall, BUILDING)
    canvas.fill(left, base - 5, right, base, paint * 0.6)
    canvas.fill(left - 1, top - 3, right + 1, top + 2, paint * 0.72, BUILDING)

    columns = (right - left - 4) // 16
    step = (right - left) / columns
    for column in range(columns):
        x = int(left + (column + 0.5) * step)
        for y in range(top + 7, base - 20, 19):
            canvas.fill(x - 5, y, x + 5, y + 13, FRAME)
            glass = GLASS if rng.random() < 0.7 else LAMPLIGHT
            canvas.fill(x - 4, y + 1, x - 1, y + 12, glass)
            canvas.fill(x + 1, y + 1, x + 4, y + 12, glass)


def _draw_greenery(canvas: Canvas, rng: np.random.Generator, block: Block, base: int) -> None:
    leaf = LEAVES[rng.integers(len(LEAVES))]
    large, middle, small = (smooth_noise(rng, HEIGHT, WIDTH, cell) for cell in (9, 4, 2))
    texture = leaf * (0.35 + 0.42 * (large + middle + small))
    top = 18 + 22 * rng.random()
    canvas.box(block.left, top + 22, block.right, base, texture * 0.8, VEGETATION, radius=3)
    count = (block.right - block.left) // 20
    for n in range(count):
        radius = 12 + 5 * rng.random()
        x = block.left + radius + (block.right - block.left - 2 * radius) * n / max(count - 1, 1)
        y = top + 12 * rng.random()
        canvas.box(x - 2, y, x + 2, base, (86, 66, 50), VEGETATION)
        canvas.ellipse(x, y + 8, radius, radius * 1.1, texture, VEGETATION)


def draw_ground(canvas: Canvas, rng: np.random.Generator, tone: str, base: int, curb: int) -> None:
    """Draw the sidewalk from line `base` to `curb` and below it a "dark" or "light" road."""
    slab, joint = tiles(rng, curb - base, WIDTH, (6, 14))
    stone = np.array((1, 0.97, 0.91), dtype=np.float32)
    canvas.fill(0, base, WIDTH, curb, np.where(joint, 128, 164 + 34 * slab) * stone, SIDEWALK)
    patches, grit = (smooth_noise(rng, HEIGHT - curb, WIDTH, *cell) for cell in ((8, 24), (2,)))
    canvas.fill(0, curb, WIDTH, HEIGHT, ROADS[tone] * (0.86 + 0.16 * patches + 0.12 * grit), ROAD)
    canvas.fill(0, curb - 1, WIDTH, curb + 1, (112, 110, 108))
    line = curb + 0.55 * (HEIGHT - curb)
    for x in range(-rng.integers(36), WIDTH, 36):
        canvas.polygon(
            ((x, line + 3), (x + 4, line), (x + 22, line), (x + 18, line + 3)), (226, 224, 212)
        )
