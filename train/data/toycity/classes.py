"""The classes of the toy city, in the order of their ids."""

from __future__ import annotations

import numpy as np

CLASSES = ("road", "sidewalk", "building", "sky", "vegetation", "car", "person", "sign")
PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (70, 130, 180), (107, 142, 35), (0, 0, 142),
    (220, 20, 60), (220, 220, 0),
)  # fmt: skip
ROAD, SIDEWALK, BUILDING, SKY, VEGETATION, CAR, PERSON, SIGN = range(len(CLASSES))

# Cars, clothes and plates are painted from one list: a color does not tell which of them it is.
_PAINTS = (
    (196, 58, 50), (226, 128, 48), (228, 188, 62), (64, 148, 122), (58, 92, 180), (146, 70, 142),
    (52, 54, 64),
)  # fmt: skip
PAINTS = np.array(_PAINTS, dtype=np.float32)
