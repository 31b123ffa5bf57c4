"""What stands behind the objects: sky, houses, greenery, sidewalk and road."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cac_fast.train.data.toycity.canvas import HEIGHT, WIDTH, Canvas
from cac_fast.train.data.toycity.classes import BUILDING, ROAD, SIDEWALK, SKY, VEGETATION
from cac_fast.train.data.toycity.texture import smooth_noise, tiles

SKIES = {
    "sunny": np.array(((72, 140, 222), (186, 218, 240)), dtype=np.float32),
    "cloudy": np.array(((108, 112, 122), (172, 174, 176)), dtype=np.float32),
    "sunset": np.array(((158, 96, 146), (252, 190, 122)), dtype=np.float32),
}
CLOUDS = {"sunny": (250, 250, 250), "cloudy": (206, 208, 212), "sunset": (255, 214, 170)}
BRICKS = np.array([(158, 84, 66), (138, 70, 64), (172, 108, 80)], dtype=np.float32)
PLASTERS = np.array([(214, 200, 172), (196, 204, 208), (222, 186, 160)], dtype=np.float32)
LEAVES = np.array([(74, 116, 52), (96, 128, 56), (58, 100, 66)], dtype=np.float32)
ASPHALT = np.array((92, 93, 98), dtype=np.float32)
FRAME, GLASS, LAMPLIGHT = (236, 232, 222), (52, 66, 88), (238, 214, 140)


class Block(NamedTuple):
    """A stretch of the row behind the sidewalk, from pixel column `left` to `right`.

    `kind` is "brick", "plaster" or "greenery".
    """

    kind: str
    left: int
    right: int


def draw_sky(rng: np.random.Generator, kind: str) -> Canvas:
    """A new canvas filled with a "sunny", "cloudy" or "sunset" sky."""
    top, bottom = SKIES[kind]
    down = np.minimum(np.arange(HEIGHT, dtype=np.float32) / 36, 1)[:, None, None]
    large, small = (smooth_noise(rng, HEIGHT, WIDTH, *cell) for cell in ((9, 30), (4, 10)))
    cover = np.minimum(np.maximum((large * 2 + small) * 1.33 - 2, 0), 0.8)
    sky = top + (bottom - top) * down
    return Canvas(sky + (np.array(CLOUDS[kind], dtype=np.float32) - sky) * cover, SKY)


def draw_block(canvas: Canvas, rng: np.random.Generator, block: Block, base: int) -> None:
    """Draw one block of the row, standing on line `base`."""
    if block.kind == "greenery":
        _draw_greenery(canvas, rng, block, base)
    else:
        _draw_house(canvas, rng, block, base)


def _draw_house(canvas: Canvas, rng: np.random.Generator, block: Block, base: int) -> None:
    left, right = block.left, block.right
    top = 8 + int(rng.integers(9))
    height, width = base - top, right - left
    if block.kind == "brick":
        paint = BRICKS[rng.integers(len(BRICKS))]
        tone, joint = tiles(rng, height, width, (4, 7))
        wall = np.where(joint, paint * 0.45 + 100, paint * (0.78 + 0.4 * tone))
    else:
        paint = PLASTERS[rng.integers(len(PLASTERS))]
        stains, grit = (smooth_noise(rng, height, width, cell) for cell in (14, 3))
        wall = paint * (0.84 + 0.16 * stains + 0.08 * grit)
    canvas.fill((left, top, right, base), wall, BUILDING)
    canvas.fill((left, base - 3, right, base), paint * 0.6)
    canvas.fill((left - 1, top - 2, right + 1, top + 1), paint * 0.72, BUILDING)

    columns = (right - left - 2) // 11
    step = (right - left) / columns
    for column in range(columns):
        x = int(left + (column + 0.5) * step)
        for y in range(top + 4, base - 11, 13):
            canvas.fill((x - 3, y, x + 4, y + 9), FRAME)
            glass = GLASS if rng.random() < 0.7 else LAMPLIGHT
            canvas.fill((x - 2, y + 1, x, y + 8), glass)
            canvas.fill((x + 1, y + 1, x + 3, y + 8), glass)


def _draw_greenery(canvas: Canvas, rng: np.random.Generator, block: Block, base: int) -> None:
    leaf = LEAVES[rng.integers(len(LEAVES))]
    large, middle, small = (smooth_noise(rng, HEIGHT, WIDTH, cell) for cell in (7, 4, 2))
    texture = leaf * (0.35 + 0.42 * (large + middle + small))
    top = 8 + 8 * rng.random()
    canvas.box((block.left, top + 14, block.right, base), texture * 0.8, VEGETATION, radius=3)
    count = (block.right - block.left) // 14
    for n in range(count):
        radius = 8 + 3 * rng.random()
        x = block.left + radius + (block.right - block.left - 2 * radius) * n / max(count - 1, 1)
        y = top + 6 * rng.random()
        canvas.box((x - 1.5, y, x + 1.5, base), (86, 66, 50), VEGETATION)
        canvas.ellipse((x, y + 6), (radius, radius * 1.1), texture, VEGETATION)


def draw_ground(canvas: Canvas, rng: np.random.Generator, base: int, curb: int) -> None:
    """Draw the sidewalk from line `base` to `curb` and the road below it."""
    slab, joint = tiles(rng, curb - base, WIDTH, (5, 11))
    stone = np.array((1, 0.97, 0.91), dtype=np.float32)
    canvas.fill((0, base, WIDTH, curb), np.where(joint, 128, 164 + 34 * slab) * stone, SIDEWALK)
    patches, grit = (smooth_noise(rng, HEIGHT - curb, WIDTH, *cell) for cell in ((6, 16), (2,)))
    canvas.fill((0, curb, WIDTH, HEIGHT), ASPHALT * (0.86 + 0.16 * patches + 0.12 * grit), ROAD)
    canvas.fill((0, curb - 1, WIDTH, curb + 1), (112, 110, 108))
    line = curb + 0.55 * (HEIGHT - curb)
    for x in range(-rng.integers(24), WIDTH, 24):
        canvas.polygon(
            ((x, line + 2), (x + 3, line), (x + 14, line), (x + 11, line + 2)), (226, 224, 212)
        )
