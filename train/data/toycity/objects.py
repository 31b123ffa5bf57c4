"""What stands in the street: cars, persons and signs, each told by its shape and texture."""

from __future__ import annotations

import numpy as np

from cac_fast.train.data.toycity.canvas import HEIGHT, Canvas
from cac_fast.train.data.toycity.classes import CAR, PAINTS, PERSON, SIGN


def draw_car(canvas: Canvas, rng: np.random.Generator, x: float, foot: float) -> None:
    """A car from the side, 84 to 104 pixels long: middle at column `x`, wheels on line `foot`."""
    length, height = 84 + 20 * rng.random(), 40 + 8 * rng.random()
    side = 1 if rng.random() < 0.5 else -1
    paint = PAINTS[rng.integers(len(PAINTS))]
    sheen = np.clip((foot - np.arange(HEIGHT)) / height, 0, 1)[:, None, None]
    body = paint * (0.55 + 0.6 * sheen)
    hood, trunk = 0.2 + 0.1 * rng.random(), 0.04 + 0.14 * rng.random()

    def at(along: float, up: float) -> tuple[float, float]:
        """A point `along` from tail (0) to nose (1) and `up` from ground (0) to roof (1)."""
        return x + side * (along - 0.5) * length, foot - up * height

    canvas.ellipse(x, foot - 1, length * 0.54, 6, (20, 20, 24), opacity=0.6)
    canvas.polygon(
        (at(trunk, 0.5), at(trunk + 0.1, 1), at(0.82 - hood, 1), at(1 - hood, 0.5)), body, CAR
    )
    glass = (58, 74, 96)
    middle = 0.46
    canvas.polygon(
        (at(trunk + 0.06, 0.57), at(trunk + 0.13, 0.92), at(middle, 0.92), at(middle, 0.57)), glass
    )
    canvas.polygon(
        (
            at(middle + 0.04, 0.57),
            at(middle + 0.04, 0.92),
            at(0.8 - hood, 0.92),
            at(0.94 - hood, 0.57),
        ),
        glass,
    )
    canvas.polygon((at(0.3, 0.57), at(0.36, 0.92), at(0.4, 0.92), at(0.34, 0.57)), (168, 188, 204))
    left, right = x - length / 2, x + length / 2
    canvas.box(left, foot - 0.58 * height, right, foot - 0.14 * height, body, CAR, radius=7)
    canvas.box(left + 5, foot - 0.47 * height, right - 5, foot - 0.42 * height, paint * 0.35 + 150)
    canvas.box(left + 2, foot - 0.2 * height, right - 2, foot - 0.13 * height, (34, 34, 38))
    for lamp, light in ((0.97, (250, 236, 170)), (0.03, (170, 24, 28))):
        lamp_x, lamp_y = at(lamp, 0.4)
        canvas.box(lamp_x - 3, lamp_y - 3, lamp_x + 3, lamp_y + 3, light)
    radius = 0.2 * height
    for wheel in (0.22, 0.79):
        wheel_x, _ = at(wheel, 0)
        canvas.ellipse(wheel_x, foot - radius, radius, radius, (26, 26, 30), CAR)
        canvas.ellipse(wheel_x, foot - radius, radius * 0.5, radius * 0.5, (178, 180, 186), CAR)


def draw_person(canvas: Canvas, rng: np.random.Generator, x: float, foot: float) -> None:
    """A person 68 to 80 pixels tall in a striped shirt, standing at (`x`, `foot`)."""
    height = 68 + 12 * rng.random()
    shirt, stripe, trousers = PAINTS[rng.integers(len(PAINTS), size=3)]
    skin = np.array((236, 190, 156)) * (0.5 + 0.5 * rng.random())
    hair = np.array((92, 64, 40)) * (0.3 + 1.2 * rng.random())
    half, stride = 0.15 * height, (0.1 + 0.1 * rng.random()) * height
    hip, shoulder = foot - 0.42 * height, foot - 0.8 * height
    rows = np.arange(HEIGHT)[:, None, None] // 3 % 2
    cloth = np.where(rows, shirt, stripe * 0.7 + 40)

    canvas.ellipse(x, foot - 0.5, 0.2 * height, 4, (20, 20, 24), opacity=0.5)
    for side, shade in ((-1, 0.6), (1, 0.75)):
        toe = x + side * stride
        canvas.polygon(
            (
                (x - 0.5 * half, hip - 2),
                (x + 0.5 * half, hip - 2),
                (toe + 4, foot),
                (toe - 4, foot),
            ),
            trousers * shade,
            PERSON,
        )
        canvas.box(toe - 5, foot - 4, toe + 5, foot, (40, 34, 32), PERSON, radius=2)
        elbow = x + side * half
        canvas.box(elbow - 4, shoulder + 2, elbow + 4, hip, cloth * 0.75, PERSON, radius=4)
        canvas.ellipse(elbow, hip + 1, 4, 4, skin, PERSON)
    canvas.box(x - 0.85 * half, shoulder, x + 0.85 * half, hip + 1, cloth, PERSON, radius=4)
    head = 0.1 * height
    canvas.ellipse(x, foot - 0.89 * height, head * 1.05, head * 1.15, hair, PERSON)
    canvas.ellipse(x, foot - 0.865 * height, head * 0.85, head * 0.9, skin, PERSON)


def draw_sign(canvas: Canvas, rng: np.random.Generator, x: float, foot: float) -> None:
    """A sign 66 to 80 pixels tall: a rimmed plate with a glyph on a banded pole."""
    height, radius = 66 + 14 * rng.random(), 18 + 4 * rng.random()
    plate, glyph = PAINTS[rng.integers(len(PAINTS), size=2)]
    rim = np.array((244, 242, 236)) if plate.sum() < 450 else np.array((44, 44, 50))
    if abs(plate - glyph).sum() < 120:
        glyph = rim
    y = foot - height + radius
    bands = np.arange(HEIGHT)[:, None, None] // 6 % 2
    pole = np.where(bands, (190, 192, 196), (120, 122, 128))

    canvas.ellipse(x, foot - 0.5, 10, 3, (20, 20, 24), opacity=0.5)
    canvas.box(x - 4, y, x + 4, foot, pole, SIGN)
    shape = rng.integers(3)
    for size, color in ((radius, rim), (radius - 4, plate)):
        if shape == 0:
            canvas.ellipse(x, y, size, size, color, SIGN)
        elif shape == 1:
            canvas.box(x - size, y - size, x + size, y + size, color, SIGN, radius=2)
        else:
            canvas.polygon(
                ((x, y - size), (x + size, y), (x, y + size), (x - size, y)), color, SIGN
            )
    if rng.random() < 0.5:
        canvas.box(x - 0.5 * radius, y - 2.5, x + 0.5 * radius, y + 2.5, glyph)
    else:
        canvas.polygon(
            (
                (x, y - 0.45 * radius),
                (x + 0.4 * radius, y + 0.3 * radius),
                (x - 0.4 * radius, y + 0.3 * radius),
            ),
            glyph,
        )
