"""What stands in the street: checkered cars, persons in stripes, signs with slanting bands."""

from __future__ import annotations

import numpy as np

from cac_fast.train.data.toycity.canvas import HEIGHT, WIDTH, Canvas
from cac_fast.train.data.toycity.classes import CAR, PAINTS, PERSON, SIGN

ROWS, COLUMNS = np.arange(HEIGHT)[:, None, None], np.arange(WIDTH)[None, :, None]
CREAM = np.array((240, 236, 224), dtype=np.float32)


def draw_car(canvas: Canvas, rng: np.random.Generator, x: float, foot: float) -> None:
    """A checkered car, 30 to 34 pixels long: middle at column `x`, wheels on line `foot`."""
    length, height = 30 + 4 * rng.random(), 18 + 3 * rng.random()
    side = 1 if rng.random() < 0.5 else -1
    paint = PAINTS[rng.integers(len(PAINTS))]
    body = np.where((ROWS // 4 + COLUMNS // 4) % 2, paint, CREAM)
    hood, trunk = 0.2 + 0.1 * rng.random(), 0.04 + 0.14 * rng.random()

    def at(along: float, up: float) -> tuple[float, float]:
        """A point `along` from tail (0) to nose (1) and `up` from ground (0) to roof (1)."""
        return x + side * (along - 0.5) * length, foot - up * height

    canvas.ellipse((x, foot - 0.5), (length * 0.54, 2.5), (20, 20, 24), opacity=0.6)
    canvas.polygon(
        (at(trunk, 0.5), at(trunk + 0.1, 1), at(0.82 - hood, 1), at(1 - hood, 0.5)), paint, CAR
    )
    for window in (
        (at(trunk + 0.07, 0.6), at(trunk + 0.14, 0.9), at(0.44, 0.9), at(0.44, 0.6)),
        (at(0.5, 0.6), at(0.5, 0.9), at(0.79 - hood, 0.9), at(0.93 - hood, 0.6)),
    ):
        canvas.polygon(window, (58, 74, 96))
    left, right = x - length / 2, x + length / 2
    canvas.box((left, foot - 0.62 * height, right, foot - 0.12 * height), body, CAR, radius=3)
    for lamp, light in ((0.97, (250, 236, 170)), (0.03, (170, 24, 28))):
        lamp_x, lamp_y = at(lamp, 0.42)
        canvas.box((lamp_x - 1.5, lamp_y - 1.5, lamp_x + 1.5, lamp_y + 1.5), light)
    radius = 0.2 * height
    for wheel in (0.22, 0.79):
        wheel_x, _ = at(wheel, 0)
        canvas.ellipse((wheel_x, foot - radius), (radius, radius), (26, 26, 30), CAR)
        canvas.ellipse((wheel_x, foot - radius), (radius * 0.5, radius * 0.5), (178, 180, 186), CAR)


def draw_person(canvas: Canvas, rng: np.random.Generator, x: float, foot: float) -> None:
    """A person 28 to 33 pixels tall in striped clothes, standing at (`x`, `foot`)."""
    height = 28 + 5 * rng.random()
    paint = PAINTS[rng.integers(len(PAINTS))]
    skin = np.array((236, 190, 156)) * (0.5 + 0.5 * rng.random())
    hair = np.array((92, 64, 40)) * (0.3 + 1.2 * rng.random())
    half, stride = 0.17 * height, (0.08 + 0.1 * rng.random()) * height
    hip, shoulder = foot - 0.42 * height, foot - 0.8 * height
    cloth = np.where(ROWS // 3 % 2, paint, CREAM)

    canvas.ellipse((x, foot - 0.5), (0.24 * height, 2), (20, 20, 24), opacity=0.5)
    for side in (-1, 1):
        toe = x + side * stride
        top = (x - 0.6 * half, hip - 2), (x + 0.6 * half, hip - 2)
        canvas.polygon((*top, (toe + 3, foot), (toe - 3, foot)), cloth, PERSON)
        canvas.box((toe - 3, foot - 2, toe + 3, foot), (40, 34, 32), PERSON, radius=1)
        elbow = x + side * half
        canvas.box((elbow - 2.5, shoulder + 1, elbow + 2.5, hip), cloth * 0.85, PERSON, radius=2)
        canvas.ellipse((elbow, hip + 0.5), (2, 2), skin, PERSON)
    canvas.box((x - half, shoulder, x + half, hip + 1), cloth, PERSON, radius=2)
    head = 0.11 * height
    canvas.ellipse((x, foot - 0.89 * height), (head * 1.05, head * 1.15), hair, PERSON)
    canvas.ellipse((x, foot - 0.865 * height), (head * 0.85, head * 0.9), skin, PERSON)


def draw_sign(canvas: Canvas, rng: np.random.Generator, x: float, foot: float) -> None:
    """A sign 28 to 33 pixels tall: a rimmed plate of slanting bands on a pole."""
    height, radius = 28 + 5 * rng.random(), 10 + 2 * rng.random()
    paint = PAINTS[rng.integers(len(PAINTS))]
    slant = ROWS + COLUMNS if rng.random() < 0.5 else ROWS - COLUMNS
    bands = np.where(slant // 6 % 2, paint, CREAM)
    y = foot - height + radius

    canvas.ellipse((x, foot - 0.5), (5, 1.5), (20, 20, 24), opacity=0.5)
    canvas.box((x - 2, y, x + 2, foot), (150, 152, 158), SIGN)
    round_plate = rng.random() < 0.5
    for size, color in ((radius, (44, 44, 50)), (radius - 2, bands)):
        if round_plate:
            canvas.ellipse((x, y), (size, size), color, SIGN)
        else:
            canvas.box((x - size, y - size, x + size, y + size), color, SIGN, radius=2)
