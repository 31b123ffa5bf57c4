"""Plain PNGs, the usual form of masks and of the large data sets, in half of Pillow's time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

try:
    # libpng on zlib-ng: 38 ms for a PNG of 2048 x 1024, Pillow 74, torchvision 61 (one thread).
    from imagecodecs import png_decode
except ImportError:  # it is there for its speed alone
    png_decode = None

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FORMS = (b"\x08\x00", b"\x08\x02")
"""Bits of a value, color type: gray, RGB."""
# None of them changes the pixels that are read, or says which side is up.
_HARMLESS = frozenset(
    b"IHDR PLTE IDAT IEND gAMA cHRM sRGB iCCP cICP sBIT bKGD hIST pHYs sPLT tIME".split()
)
_TEXTS = frozenset(b"tEXt zTXt iTXt".split())


def read_plain(stream: BinaryIO) -> np.ndarray | None:
    """The pixels of a PNG, uint8 (H, W) for gray or (H, W, 3) for RGB.

    None where anything has to be done beyond decoding (more or fewer bits, palettes, transparency,
    orientation), where the file is broken or no PNG, or without the library: the stream is at its
    beginning again, for a reader that knows all forms and says what is wrong.
    """
    head = stream.read(33) if png_decode is not None else b""
    plain = head.startswith(_SIGNATURE) and head[24:26] in _FORMS
    pixels = None
    if plain:
        data = head + stream.read()
        if all(_is_harmless(*chunk) for chunk in _chunks(data)):
            try:
                pixels = png_decode(data)
            except Exception:  # the other reader finds it too, and says it in its words
                pixels = None
    if pixels is None:
        stream.seek(0)
    return pixels


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and first bytes of each chunk, as many as are there."""
    start = len(_SIGNATURE)
    while start + 8 <= len(data):
        length = int.from_bytes(data[start : start + 4])
        yield data[start + 4 : start + 8], data[start + 8 : start + 8 + min(length, 80)]
        start += 12 + length


def _is_harmless(name: bytes, begin: bytes) -> bool:
    # "Raw profile type exif" and "XML:com.adobe.xmp" may hold an orientation.
    text = name in _TEXTS and not any(word in begin.lower() for word in (b"exif", b"app1", b"xmp"))
    return text or name in _HARMLESS
