"""Images and masks as people have them, read into one form each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cac_fast.train.data.png import read_plain
from cac_fast.train.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IGNORE = 255
"""The id of mask pixels that belong to no class."""

# Pillow takes 180 million pixels for an attack, but people train on their own photographs.
Image.MAX_IMAGE_PIXELS = None

_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_image(path: Path) -> Image.Image:
    """Read any photograph as an upright 8-bit RGB image.

    The EXIF orientation is applied; gray, palette and CMYK images are converted, transparency is
    composited on white, and 16-bit images keep their high byte.

    Raises:
        InputError: the file is missing, truncated, no image, or holds floating-point values.
    """
    try:
        # Pillow for all but plain RGB PNGs. Torchvision and OpenCV took 0.85 to 0.9 of its time,
        # but do not tell what else is in a file, and a JPEG drafted at half size would not be the
        # one that the cache and the others see. Given a path, Pillow maps a TIFF without
        # compression, and garbles it if it is rotated.
        with path.open("rb") as stream:
            if (pixels := read_plain(stream)) is not None:
                return Image.fromarray(pixels)
            with Image.open(stream) as file:
                file.load()
                ImageOps.exif_transpose(file, in_place=True)
                return to_rgb(file)
    except Exception as error:  # Pillow's decoders raise nearly every type there is
        raise _unreadable("image", path, error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB: transparency on white, of 16 bits the high byte.

    Raises:
        ValueError: the image holds floating-point values.
    """
    if image.mode == "F":
        raise ValueError("it holds floating-point values")
    if image.mode in _WIDE_MODES:
        high = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_mask(path: Path, num_classes: int, label_map: tuple[int, ...] | None = None) -> np.ndarray:
    """Read a mask of class ids, uint8 (H, W), with 255 where no class is known.

    The ids are the raw values of a gray, palette, 1-bit or 16-bit file: palette colors are not
    looked at. `label_map`, if given, holds the class of each of the 256 ids of the file.

    Raises:
        InputError: the file is missing or truncated, is a color picture, or holds an id that is
            neither below `num_classes` nor 255.
    """
    try:
        with path.open("rb") as stream, Image.open(stream) as file:
            mode = file.mode
            ids = np.asarray(file) if mode in ("L", "P", "1", *_WIDE_MODES) else None
            if mode == "1":
                ids = ids.astype(np.uint8)
    except Exception as error:
        raise _unreadable("mask", path, error) from error
    if ids is None:
        raise InputError(
            f"mask {path} is a color picture (mode {mode}), but a mask must hold one class id a "
            f"pixel: save it as an 8-bit gray or palette PNG with ids 0 to {num_classes - 1} and "
            f"{IGNORE} for pixels to ignore"
        )
    if label_map is None:
        classes = ids
    else:
        classes = np.asarray(label_map)[np.clip(ids, 0, 255)]
        classes = np.where((ids < 0) | (ids > 255), -1, classes)
    wrong = (classes != IGNORE) & ((classes < 0) | (classes >= num_classes))
    if wrong.any():
        raise InputError(
            f"mask {path} holds the id {int(ids[wrong].min())}, but only 0 to {num_classes - 1} "
            f"are classes here and {IGNORE} is ignored: correct the mask or the class list"
        )
    return classes.astype(np.uint8)


def check_size(
    mask: Path, mask_size: Sequence[int], image: Path, image_size: Sequence[int]
) -> None:
    """Compare the sizes, each (H, W), of a mask and its image.

    Raises:
        InputError: they differ.
    """
    if tuple(mask_size) != tuple(image_size):
        raise InputError(
            f"mask {mask} is {mask_size[1]} x {mask_size[0]} but image {image} is "
            f"{image_size[1]} x {image_size[0]}: make them the same size"
        )


def _unreadable(kind: str, path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{kind} {path} does not exist")
    if isinstance(error, MemoryError):
        return InputError(f"{kind} {path} is too large to be decoded: replace or remove the file")
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{kind} {path} cannot be read ({reason}): replace or remove the file")
