"""Class ids as colors."""

from __future__ import annotations

import numpy as np

IGNORED_COLOR = (0, 0, 0)


def colorize(labels: np.ndarray, palette: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Colors (H, W, 3) uint8 of class ids (H, W) uint8; 255 is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[255] = IGNORED_COLOR
    return table[labels]
