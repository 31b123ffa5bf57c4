"""Noise and tiling, cut at a random place from large sheets that are drawn once, which is quick."""

from __future__ import annotations

from functools import cache

import numpy as np

SHEET = (384, 768)
SEED = 7


def smooth_noise(rng: np.random.Generator, height: int, width: int, *cell: int) -> np.ndarray:
    """Value noise in [0, 1], float32 (height, width, 1).

    `cell` is the size of its blotches in pixels: one number, or their height and their width.
    """
    return _cut(rng, _noise_sheet(cell[0], cell[-1]), height, width)


def sensor_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Triangular noise in (-1, 1), each pixel by itself, float32 (height, width, 3)."""
    return _cut(rng, _sensor_sheet(), height, width)


def tiles(
    rng: np.random.Generator, height: int, width: int, tile: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A wall of tiles of the given height and width, every other row shifted by half a tile.

    Returns a number in [0, 1) for each tile, float32, and where the joints are, bool, both
    (height, width, 1).
    """
    rows, columns = np.arange(height)[:, None], np.arange(width)
    row = rows // tile[0]
    along = columns + row % 2 * (tile[1] // 2)
    tone = rng.random((height // tile[0] + 1, width // tile[1] + 2), dtype=np.float32)
    joint = (rows % tile[0] == 0) | (along % tile[1] == 0)
    return tone[row, along // tile[1]][..., None], joint[..., None]


def _cut(rng: np.random.Generator, sheet: np.ndarray, height: int, width: int) -> np.ndarray:
    top = rng.integers(sheet.shape[0] - height + 1)
    left = rng.integers(sheet.shape[1] - width + 1)
    return sheet[top : top + height, left : left + width]


@cache
def _noise_sheet(cell_height: int, cell_width: int) -> np.ndarray:
    rng = np.random.default_rng([SEED, cell_height, cell_width])
    (rows, down), (columns, across) = _cells(SHEET[0], cell_height), _cells(SHEET[1], cell_width)
    grid = rng.random((rows[-1] + 2, columns[-1] + 2), dtype=np.float32)
    grid = grid[:, columns] + (grid[:, columns + 1] - grid[:, columns]) * across
    return (grid[rows] + (grid[rows + 1] - grid[rows]) * down[:, None])[..., None]


def _cells(size: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """For every pixel of a line its cell and how far it lies in that, eased, in [0, 1)."""
    pixels = np.arange(size)
    along = (pixels % cell / cell).astype(np.float32)
    return pixels // cell, along * along * (3 - 2 * along)


@cache
def _sensor_sheet() -> np.ndarray:
    noise = np.random.default_rng(SEED).random((2, *SHEET, 3), dtype=np.float32)
    return noise[0] - noise[1]
