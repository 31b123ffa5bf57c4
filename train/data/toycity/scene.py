"""One street scene: which blocks stand in the row, and which object stands where.

A scene is a row of blocks behind a sidewalk and a road, with objects in front. In a misleading
scene the context gives every object away: cars stand on a dark road before brick, persons on the
sidewalk before greenery, signs on the sidewalk before plaster. In any other scene each object
stands on either ground, before any block. How objects and backgrounds look, how large they are and
(about) how many, is drawn alike in both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cac_fast.train.data.toycity.background import Block, draw_block, draw_ground, draw_sky
from cac_fast.train.data.toycity.canvas import HEIGHT, WIDTH, Canvas
from cac_fast.train.data.toycity.objects import draw_car, draw_person, draw_sign
from cac_fast.train.data.toycity.texture import sensor_noise

SHARES = {"brick": 0.3, "plaster": 0.3, "greenery": 0.3, "open": 0.1}
DRAW = {"car": draw_car, "person": draw_person, "sign": draw_sign}
STANDS_BEFORE = {"brick": "car", "greenery": "person", "plaster": "sign"}
REACH = {"car": 58, "person": 24, "sign": 23}
"""Half the width of an object, rounded up, in pixels."""


class Scene(NamedTuple):
    """`image` uint8 (128, 256, 3) and `label` uint8 (128, 256), class ids 0..7."""

    image: np.ndarray
    label: np.ndarray


class Standing(NamedTuple):
    """An object and where it stands: the column of its middle, the line of its foot."""

    name: str
    x: float
    foot: float


def draw_scene(rng: np.random.Generator, misleading: bool) -> Scene:
    """Draw one scene with all randomness from `rng`."""
    tone = "dark" if rng.random() < (0.8 if misleading else 0.5) else "light"
    base = 74 + int(rng.integers(9))
    curb = base + 13 + int(rng.integers(6))
    blocks = _draw_row(rng)

    canvas = draw_sky(rng)
    for block in blocks:
        draw_block(canvas, rng, block, base)
    draw_ground(canvas, rng, tone, base, curb)
    standing = [
        item for block in blocks for item in _place(rng, block, tone, base, curb, misleading)
    ]
    for item in sorted(standing, key=lambda item: item.foot):
        DRAW[item.name](canvas, rng, item.x, item.foot)
    return Scene(_expose(rng, canvas), canvas.label)


def _draw_row(rng: np.random.Generator) -> list[Block]:
    """Blocks 116 to 148 pixels wide across the whole canvas, no two of a kind side by side."""
    blocks: list[Block] = []
    left = -int(rng.integers(80))
    while left < WIDTH:
        others = [kind for kind in SHARES if not blocks or kind != blocks[-1].kind]
        shares = np.array([SHARES[kind] for kind in others])
        kind = others[int((rng.random() * shares.sum() >= shares.cumsum()).sum())]
        right = left + 116 + int(rng.integers(33))
        blocks.append(Block(kind, left, right))
        left = right
    return blocks


def _place(
    rng: np.random.Generator, block: Block, tone: str, base: int, curb: int, misleading: bool
) -> list[Standing]:
    """The objects before one block: one car, two persons, two signs or nothing."""
    names = tuple(DRAW)
    if misleading:
        name = STANDS_BEFORE.get(block.kind)
        on_road = name == "car"
        empty = name is None or (on_road and tone == "light")
    else:
        name, on_road = names[rng.integers(len(names))], rng.random() < 0.5
        empty = rng.random() < 0.1
    if empty:
        return []
    count = 1 if name == "car" else 2
    slot = (block.right - block.left) / count
    nearest, farthest = (curb + 5, min(curb + 27, HEIGHT - 4)) if on_road else (base + 3, curb - 1)
    standing = []
    for n in range(count):
        free = slot - 2 * REACH[name]
        x = block.left + n * slot + REACH[name] + free * rng.random()
        standing.append(Standing(name, x, nearest + (farthest - nearest) * rng.random()))
    return standing


def _expose(rng: np.random.Generator, canvas: Canvas) -> np.ndarray:
    """Light, color cast and sensor noise of one photograph."""
    light = 0.8 + 0.3 * rng.random()
    cast = 0.94 + 0.12 * rng.random(3, dtype=np.float32)
    photo = canvas.color * (light * cast) + 8 * sensor_noise(rng, HEIGHT, WIDTH)
    return np.minimum(np.maximum(photo, 0), 255).astype(np.uint8)
