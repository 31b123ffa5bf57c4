"""What files hold beyond the pixels that Pillow hands out: samples, bands, orientation."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Gray of more than 8 bits."""

Color = tuple[int, int, int]

_ORIENTATION, _EXTRA_SAMPLES = 0x0112, 338
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _PLANAR = 258, 277, 284
_BANDS_APART = 2
_PREMULTIPLIED = 1
_TWELVE_BITS = 4095
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
"""Of the bytes of a sample; N is this machine's own, in which libtiff hands out what it unpacks."""
_WIDE_COLORS = re.compile("(RGB[XA]?;16)([LBN])")


def raw_mode(file: Image.Image) -> str:
    """How the samples of an opened file are stored, in Pillow's words; unknown once loaded."""
    args = file.tile[0][3] if getattr(file, "tile", None) else ""
    words = args if isinstance(args, (tuple, list)) else (args,)
    return words[0] if words and isinstance(words[0], str) else ""


def raw_ids(file: Image.Image) -> np.ndarray | None:
    """The samples of an opened gray, palette or 1-bit file, (H, W), before any scaling.

    None for other modes.
    """
    if file.mode not in ("L", "P", "1", *WIDE_MODES):
        return None
    bits = raw_mode(file).partition(";")[2][:1]
    samples = np.asarray(file)
    if file.mode == "1":
        return samples.astype(np.uint8)
    if file.mode == "L" and bits in ("2", "4"):  # which Pillow multiplies, so that white is 255
        return samples // (255 // (2 ** int(bits) - 1))
    if file.format == "GIF" and file.mode == "P":
        # A GIF always has a palette: gray values become gray entries, in whatever order.
        colors = palette_of(file)
        used = np.unique(samples)
        if all(len(set(colors[index])) == 1 for index in used):
            return np.array([color[0] for color in colors], np.uint8)[samples]
    return samples


def count_pages(file: Image.Image) -> int:
    """Pages of an opened file that have the first one's size; previews and pyramids do not."""
    size, pages = file.size, 1
    for number in range(1, getattr(file, "n_frames", 1)):
        file.seek(number)
        pages += file.size == size
    file.seek(0)
    return pages


def palette_of(file: Image.Image) -> list[Color]:
    """256 colors of a palette file; black beyond its end."""
    values = (file.getpalette() or [])[:768]
    values += [0] * (768 - len(values))
    return [(values[i], values[i + 1], values[i + 2]) for i in range(0, 768, 3)]


def colors_of(file: Image.Image) -> np.ndarray:
    """The pixels of a palette file as colors, uint8 (H, W, 3)."""
    return np.array(palette_of(file), np.uint8)[np.asarray(file)]


def has_class_colors(
    file: Image.Image, palette: Sequence[Color] | None, ignore: Color | None
) -> bool:
    """Whether a palette file that is not gray has colors of classes alone, each of one class."""
    if file.mode != "P" or palette is None:
        return False
    colors = palette_of(file)
    used = {colors[index] for index in np.unique(np.asarray(file))}
    known = [*map(tuple, palette), *([] if ignore is None else [ignore])]
    return any(len(set(color)) > 1 for color in used) and all(known.count(c) == 1 for c in used)


def mask_palette(path: Path) -> list[Color] | None:
    """The palette of a mask file, None if it has none."""
    with path.open("rb") as stream, Image.open(stream) as file:
        return palette_of(file) if file.mode == "P" and file.format != "GIF" else None


def ids_of_colors(
    pixels: np.ndarray | None,
    mode: str,
    palette: Sequence[Color] | None,
    ignore: Color | None,
) -> np.ndarray:
    """Class ids (H, W) uint8 of a mask that has no raw ones: of its colors, or of opaque gray.

    pixels: (H, W, C) of the modes RGB, RGBA and LA, else None. ignore: the color of 255. A color
    that two classes share is unknown.

    Raises:
        ValueError: what cannot be told from the picture.
    """
    if mode in ("RGBA", "LA"):
        opaque = pixels[..., -1] == 255
        if not opaque.all():
            y, x = np.unravel_index(opaque.argmin(), opaque.shape)
            raise ValueError(f"with a transparent pixel at x {x}, y {y}")
        if mode == "LA":
            return pixels[..., 0]
    if pixels is None or palette is None:
        raise ValueError(f"(mode {mode})")
    known = {} if ignore is None else {_code(ignore): 255}
    shared = {color for color in palette if list(palette).count(color) > 1}
    known |= {_code(color): i for i, color in enumerate(palette) if color not in shared}
    codes = np.array(sorted(known))
    wide = pixels.astype(np.int32)
    found = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    index = np.searchsorted(codes, found).clip(max=max(0, len(codes) - 1))
    unknown = codes[index] != found if len(codes) else np.ones(found.shape, bool)
    if unknown.any():
        y, x = np.unravel_index(unknown.argmax(), unknown.shape)
        color = tuple(int(value) for value in pixels[y, x, :3])
        classes = "several classes" if color in palette else "no class"
        raise ValueError(
            f"whose color {color} at x {x}, y {y} is of {classes} (if it should be, correct the "
            "class list)"
        )
    return np.array([known[code] for code in codes], np.uint8)[index]


def _code(color: Color) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


def has_stored_band(image: Image.Image) -> bool:
    """Whether a TIFF's band behind the colors is data: infrared is marked as alpha by most writers.

    Only colors that were multiplied by it say that it is transparency.
    """
    if image.format != "TIFF" or image.mode not in ("RGB", "RGBA", "LA"):
        return False
    if image.mode == "RGB":  # bands that are not marked as anything
        return image.tag_v2.get(_SAMPLES_PER_PIXEL, 3) > 3
    return _PREMULTIPLIED not in image.tag_v2.get(_EXTRA_SAMPLES, ())


def to_8_bits(samples: np.ndarray) -> np.ndarray:
    """Gray of more than 8 bits as uint8: of 16 bits the high byte, of 12 bits the highest 8."""
    samples = np.clip(samples, 0, 65535)
    shift = 4 if samples.max(initial=0) <= _TWELVE_BITS else 8
    return (samples >> shift).astype(np.uint8)


def load_colors(file: Image.Image, stream: BinaryIO) -> None:
    """Load an opened file; colors of 12 bits in 16 come as their highest 8 bits.

    Pillow keeps the high byte of 16 bits, in which 12 bits are almost black.

    Raises:
        ValueError: bands of 16 bits lie apart, in a form that Pillow garbles.
    """
    wide, apart = _WIDE_COLORS.fullmatch(raw_mode(file)), _has_wide_planes(file)
    garbled = apart and file.tile[0][0] == "raw"
    if not garbled:
        file.load()
        high = max(high for _, high in file.getextrema()[:3]) if wide else 255
        if high > _TWELVE_BITS >> 8:
            return
    if apart:
        raise ValueError(
            "its bands of 16 bits lie apart: write them pixel by pixel, as does gdal_translate "
            "-co INTERLEAVE=PIXEL"
        )
    stream.seek(0)
    with Image.open(stream) as again:  # with the bytes of each sample exchanged: the low ones
        swapped = wide[1] + _OTHER_ORDER[wide[2]]
        again.tile = [_with_mode(tile, swapped) for tile in again.tile]
        again.load()
        low = np.asarray(again)
    high = np.array(file)
    bits = high[..., :3].astype(np.uint16) << 8 | low[..., :3]
    high[..., :3] = bits >> 4
    file.paste(Image.fromarray(high))


def _has_wide_planes(file: Image.Image) -> bool:
    if file.format != "TIFF" or file.tag_v2.get(_PLANAR) != _BANDS_APART:
        return False
    return len(file.getbands()) > 1 and max(file.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8


def _with_mode(tile: tuple, mode: str) -> tuple:
    args = tile[3]
    parts = *tile[:3], mode if isinstance(args, str) else (mode, *args[1:])
    # Pillow's decoder for libtiff asks for its own kind of tuple, which old versions do not have.
    return tile._make(parts) if hasattr(tile, "_make") else parts


class Header(NamedTuple):
    """What an image file says of itself: `has_stored_band`, EXIF orientation, more than 8 bits."""

    stored_band: bool = False
    orientation: int = 1
    wide: bool = False


def header(path: Path) -> Header:
    """The header of an image file, read without its pixels; the defaults where it says nothing."""
    try:
        with path.open("rb") as stream, Image.open(stream) as file:
            wide = file.mode in WIDE_MODES or ";16" in raw_mode(file)
            if file.format == "PNG" and "exif" not in file.info:
                return Header(wide=wide)  # Pillow would decode all of it to look behind the pixels
            return Header(has_stored_band(file), file.getexif().get(_ORIENTATION, 1), wide)
    except Exception:  # whoever reads its pixels says what is wrong
        return Header()


def size_hint(mask: Sequence[int], image: Sequence[int], turned: bool) -> str:
    """Why the sizes (H, W) of a mask and its image may differ, and the remedy; "" if unknown.

    turned: the image is turned by its EXIF orientation.
    """
    if tuple(mask) == tuple(image[::-1]):
        if turned:
            return (
                "the image's EXIF orientation turns it and the mask is as the camera stored it: "
                "turn the mask, or remove the orientation from the image"
            )
        return "height and width are swapped: turn the mask by 90 degrees"
    factor = image[0] / mask[0]
    if all(abs(long / factor - short) < 1 for long, short in zip(image, mask, strict=True)):
        return (
            f"the image is {factor:.4g} times the mask: resize the mask with nearest neighbor, "
            "or train on the images it was drawn on"
        )
    return ""
