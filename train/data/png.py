"""Plain RGB PNGs, the usual form of large data sets, in half of Pillow's time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

try:
    # libspng on zlib-ng: 41 ms for a PNG of 2048 x 1024, Pillow 75, torchvision 61 (one thread).
    # The same package's libpng is as fast, but leaks what it was decoding when a file is broken.
    from imagecodecs import spng_decode
except ImportError:  # it is there for its speed alone
    spng_decode = None

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BIT_RGB = b"\x08\x02"
# They change no pixel, say nothing of which side is up, and nothing that a picture made of this one
# should keep.
_HARMLESS = frozenset(b"IHDR PLTE IDAT IEND gAMA cHRM sRGB sBIT bKGD hIST pHYs sPLT tIME".split())
_TEXTS = frozenset(b"tEXt zTXt iTXt".split())


def read_plain(stream: BinaryIO) -> np.ndarray | None:
    """The pixels of an RGB PNG, uint8 (H, W, 3), the same that Pillow gives.

    None where there is more to do than decoding (other modes and depths, transparency, orientation,
    color profiles), where the file is broken or no PNG, or without the library: the stream is at
    its beginning again, for a reader that knows all forms and says what is wrong.
    """
    pixels = None
    if spng_decode is not None and _is_rgb(stream.read(33)):
        stream.seek(0)
        data = stream.read()
        if all(_is_harmless(*chunk) for chunk in _chunks(data)):
            try:
                pixels = spng_decode(data)
            except Exception:  # the other reader finds it too, and says it in its words
                pixels = None
    if pixels is None:
        stream.seek(0)
    return pixels


def _is_rgb(head: bytes) -> bool:
    return head.startswith(_SIGNATURE) and head[24:26] == _EIGHT_BIT_RGB


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
