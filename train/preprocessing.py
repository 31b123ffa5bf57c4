"""How images are made ready for a network."""

from __future__ import annotations

from typing import NamedTuple

from cac_fast.train.errors import check_crop

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocessing(NamedTuple):
    """What a network was made for.

    mean, std: of red, green and blue in [0, 1], for (value - mean) / std.
    multiple: sides of an image are multiples of so many pixels, at least the 8 of a feature.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    multiple: int = 8

    def check_crop(self, side: int) -> None:
        """Raise InputError if `side`, in pixels, is not a multiple."""
        check_crop(side, self.multiple, ", which this --backbone needs")
