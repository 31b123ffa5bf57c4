"""Pictures of what the network sees: image, truth and prediction side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cac_fast.train.colors import colorize
from cac_fast.train.errors import writing

PICTURES = 3
MAX_WIDTH = 480


class SampleSheet:
    """The first few predictions of an evaluation, one row each: image, truth, prediction."""

    def __init__(self, palette: tuple[tuple[int, int, int], ...]) -> None:
        self.palette = palette
        self.rows: list[Image.Image] = []

    def add(self, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Take (H, W, 3), (H, W) and (H, W) uint8 arrays; all but the first few are passed over."""
        if len(self.rows) == PICTURES:
            return
        row = Image.fromarray(
            np.concatenate(
                [image, colorize(truth, self.palette), colorize(prediction, self.palette)], axis=1
            )
        )
        if row.width > 3 * MAX_WIDTH:
            row = row.resize((3 * MAX_WIDTH, round(row.height * 3 * MAX_WIDTH / row.width)))
        self.rows.append(row)

    def picture(self) -> Image.Image | None:
        """The rows below each other, or None if there are none."""
        if not self.rows:
            return None
        sheet = Image.new(
            "RGB", (max(row.width for row in self.rows), sum(row.height for row in self.rows))
        )
        top = 0
        for row in self.rows:
            sheet.paste(row, (0, top))
            top += row.height
        return sheet

    def write(self, path: Path) -> np.ndarray | None:
        """Write the picture and return its pixels, (H, W, 3) uint8; None if there are no rows.

        Raises:
            InputError: it cannot be written.
        """
        picture = self.picture()
        if picture is None:
            return None
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        return np.asarray(picture)
