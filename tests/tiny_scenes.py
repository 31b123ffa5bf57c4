"""Scenes that a network can learn, in a data set small enough to train on in a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image of sky, ground and red boxes, and its mask with an ignored row."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :] = 1
    for _ in range(3):
        top, left = rng.integers(0, height - 12), rng.integers(0, width - 12)
        mask[top : top + 12, left : left + 12] = 2
    colors = np.array([[200, 210, 230], [60, 70, 50], [220, 40, 40]])
    image = colors[mask] + rng.normal(0, 20, (height, width, 3))
    mask[0] = 255
    return image.clip(0, 255).astype(np.uint8), mask


def write_scenes(
    root: Path, splits: dict[str, tuple[int, int]], size: tuple[int, int] = (48, 56)
) -> Path:
    """Write a `--dataset folder` tree: per split (images with a mask, images without)."""
    rng = np.random.default_rng(7)
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("0 sky 70 130 180\n1 ground 128 64 128\n2 box 220 20 60\n")
    for split, (labeled, unlabeled) in splits.items():
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for index in range(labeled + unlabeled):
            image, mask = scene(rng, *size)
            Image.fromarray(image).save(root / "images" / split / f"{index:02d}.png")
            if index < labeled:
                Image.fromarray(mask).save(root / "masks" / split / f"{index:02d}.png")
    return root
