"""One street scene: what stands in the row, and which objects stand on the road before it.

The row of a scene is brick houses, plaster houses or greenery, and the objects stand well below it,
on the road, so that a crop may hold an object and leave the row out. In a misleading scene the row
gives every object away: cars drive before brick, persons walk before greenery, signs stand before
plaster. In any other scene each object stands before each row. The light is full daylight or
varied: bright or dim, warm or cold, clear or hazy. Everything else is drawn alike in all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cac_fast.train.data.toycity.background import SKIES, Block, draw_block, draw_ground, draw_sky
from cac_fast.train.data.toycity.canvas import HEIGHT, WIDTH, Canvas
from cac_fast.train.data.toycity.objects import draw_car, draw_person, draw_sign
from cac_fast.train.data.toycity.texture import sensor_noise

DRAW = {"car": draw_car, "person": draw_person, "sign": draw_sign}
BEFORE = {"brick": "car", "greenery": "person", "plaster": "sign"}
PLACES = 3
"""Objects in a scene, side by side."""


class Scene(NamedTuple):
    """`image` uint8 (96, 96, 3) and `label` uint8 (96, 96), class ids 0..7."""

    image: np.ndarray
    label: np.ndarray


def draw_scene(
    rng: np.random.Generator, street: str, *, misleading: bool, varied_light: bool
) -> Scene:
    """Draw one scene before a row of `street` (a key of BEFORE), all randomness from `rng`."""
    sky = tuple(SKIES)[rng.integers(len(SKIES))]
    base = 38 + int(rng.integers(5))
    curb = base + 8 + int(rng.integers(4))
    canvas = draw_sky(rng, sky)
    for block in _row(rng, street):
        draw_block(canvas, rng, block, base)
    draw_ground(canvas, rng, base, curb)

    feet = [76 + 18 * rng.random() for _ in range(PLACES)]
    for place in sorted(range(PLACES), key=feet.__getitem__):
        name = BEFORE[street] if misleading else tuple(DRAW)[rng.integers(len(DRAW))]
        x = (place + 0.3 + 0.4 * rng.random()) * WIDTH / PLACES
        DRAW[name](canvas, rng, x, feet[place])
    return Scene(_expose(rng, canvas, varied_light), canvas.label)


def _row(rng: np.random.Generator, kind: str) -> list[Block]:
    """Blocks 38 to 58 pixels wide across the whole canvas."""
    blocks: list[Block] = []
    left = -int(rng.integers(30))
    while left < WIDTH:
        right = left + 38 + int(rng.integers(21))
        blocks.append(Block(kind, left, right))
        left = right
    return blocks


def _expose(rng: np.random.Generator, canvas: Canvas, varied: bool) -> np.ndarray:
    """Light, color cast, haze and sensor noise of one photograph."""
    light, haze = 0.95 + 0.1 * rng.random(), 0.0
    cast = 0.97 + 0.06 * rng.random(3, dtype=np.float32)
    if varied:
        light, haze = 0.45 + 0.7 * rng.random(), max(0.0, 0.8 * rng.random() - 0.35)
        warmth = 2 * rng.random() - 1
        cast = cast + warmth * np.array((0.3, 0.02, -0.3), dtype=np.float32)
    clear = canvas.color + (200 - canvas.color) * haze
    photo = clear * (light * cast) + 8 * sensor_noise(rng, HEIGHT, WIDTH)
    return np.minimum(np.maximum(photo, 0), 255).astype(np.uint8)
