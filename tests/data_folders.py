"""Small data folders for the tests, where the real ones are, and what property tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

SEEDS = st.integers(0, 2**32 - 1)
CROPS = st.integers(1, 9).map(lambda cells: 8 * cells)

DATA = Path(os.environ.get("CAC_FAST_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
needs_camvid = pytest.mark.skipif(not (DATA / "camvid").is_dir(), reason="no CamVid here")
needs_samples = pytest.mark.skipif(not (DATA / "samples").is_dir(), reason="no samples here")

CLASSES = "0 sky 1 2 3\n1 wet road 4 5 6\n2 car 7 8 9\n255 unknown 0 0 0\n"


def write_image(path: Path, height: int = 24, width: int = 32, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_mask(path: Path, height: int = 24, width: int = 32, value: int | None = None) -> Path:
    """A mask of ids 0 to 2, or of one value."""
    ids = np.arange(height * width, dtype=np.uint8).reshape(height, width) % 3
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids if value is None else np.full_like(ids, value)).save(path)
    return path


def write_folder(root: Path, labeled: int = 4, unlabeled: int = 4) -> Path:
    """The folder layout: train images t00, t01, ..., the first ones with masks, and one of val."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text(CLASSES)
    for i in range(labeled + unlabeled):
        write_image(root / f"images/train/t{i:02d}.png", seed=i)
        if i < labeled:
            write_mask(root / f"masks/train/t{i:02d}.png")
    write_image(root / "images/val/v00.png")
    write_mask(root / "masks/val/v00.png")
    return root


def one_line(error: pytest.ExceptionInfo, *words: object) -> str:
    """The message of bad input: one line that holds all the words."""
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message
