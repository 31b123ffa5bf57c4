"""Images and masks as people have them, read into one form each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from cac_fast.train.data import forms
from cac_fast.train.data.png import read_plain
from cac_fast.train.errors import InputError

IGNORE = 255
"""The id of mask pixels that belong to no class."""

# Pillow takes 180 million pixels for an attack, but people train on their own photographs.
Image.MAX_IMAGE_PIXELS = None
# And color profiles and texts above 1 MB, which printers and editors write.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30

_EXACT_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")


def read_image(path: Path) -> Image.Image:
    """Read any photograph as an upright 8-bit RGB image.

    The EXIF orientation is applied; gray, palette and CMYK images are converted, transparency is
    composited on white (a TIFF's fourth band is no transparency, and left out), and 16-bit images
    keep their high byte, or the highest 8 of 12 bits if no value needs more.

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
                forms.load_colors(file, stream)
                ImageOps.exif_transpose(file, in_place=True)
                return to_rgb(file)
    except Exception as error:  # Pillow's decoders raise nearly every type there is
        raise _unreadable("image", path, error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, in the way of `read_image`.

    Raises:
        ValueError: the image holds floating-point values.
    """
    if image.mode == "F":
        raise ValueError("it holds floating-point values")
    if image.mode in forms.WIDE_MODES:
        return Image.fromarray(forms.to_8_bits(np.asarray(image))).convert("RGB")
    if forms.has_stored_band(image):
        return image.convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_mask(
    path: Path,
    num_classes: int,
    label_map: tuple[int, ...] | None = None,
    palette: Sequence[forms.Color] | None = None,
    ignore_color: forms.Color | None = None,
) -> np.ndarray:
    """Read a mask of class ids, uint8 (H, W), with 255 where no class is known.

    The ids are the raw values of a gray, palette or 16-bit PNG, TIFF, BMP or GIF, of 1, 2 or 4 bits
    too: palette colors are not looked at. `label_map`, if given, holds the class of each of the
    256 ids of the file. A file of colors is read by `palette`, the classes' colors, and
    `ignore_color`, that of 255, if each of its pixels has one of them; so is a GIF that is not
    gray, if its colors are all among these.

    Raises:
        InputError: the file is missing or truncated, may have been changed by lossy compression,
            holds floating-point values, several pages, or a color or an id of no class.
    """
    colors = ids = None
    try:
        with path.open("rb") as stream, Image.open(stream) as file:
            mode, form, pages = file.mode, file.format, forms.count_pages(file)
            lossy = form == "TIFF" and file.info.get("compression") in _LOSSY_TIFF
            if form in _EXACT_FORMATS and not lossy:
                ids = forms.raw_ids(file)
                if ids is None and mode in ("RGB", "RGBA", "LA"):
                    colors = np.asarray(file)
                elif form == "GIF" and forms.has_class_colors(file, palette, ignore_color):
                    # Its indices may be the writer's own, who leaves out unused colors.
                    ids, colors, mode = None, forms.colors_of(file), "RGB"
    except Exception as error:
        raise _unreadable("mask", path, error) from error
    if form not in _EXACT_FORMATS or lossy:
        raise InputError(
            f"mask {path} is a {'TIFF with JPEG compression' if lossy else form} file, which may "
            "change the values at every edge: write it anew as PNG from the original labels"
        )
    if pages > 1:
        raise InputError(
            f"mask {path} holds {pages} pages: save the one with the class ids as a file of its own"
        )
    if mode == "F":
        raise InputError(
            f"mask {path} holds floating-point values, but a mask must hold one class id a pixel: "
            "save it as an 8-bit gray PNG"
        )
    if ids is None:
        try:
            ids = forms.ids_of_colors(colors, mode, palette, ignore_color)
        except ValueError as error:
            raise InputError(
                f"mask {path} is a color picture {error}, but a mask must hold one class id a "
                f"pixel: save it as an 8-bit gray or palette PNG with ids 0 to {num_classes - 1} "
                f"and {IGNORE} for pixels to ignore"
            ) from error
    classes = ids
    if label_map is not None and not (colors is not None and mode in ("RGB", "RGBA")):
        classes = np.take(label_map, ids, mode="clip")
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
        InputError: they differ; the message names the likely cause.
    """
    if tuple(mask_size) != tuple(image_size):
        hint = forms.size_hint(mask_size, image_size, forms.header(image).orientation >= 5)
        raise InputError(
            f"mask {mask} is {mask_size[1]} x {mask_size[0]} but image {image} is "
            f"{image_size[1]} x {image_size[0]}: {hint or 'make them the same size'}"
        )


def _unreadable(kind: str, path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{kind} {path} does not exist")
    if isinstance(error, MemoryError):
        return InputError(f"{kind} {path} is too large to be decoded: replace or remove the file")
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{kind} {path} cannot be read ({reason}): replace or remove the file")
