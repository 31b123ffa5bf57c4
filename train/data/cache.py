"""Decoded images and masks on disk: raw pixels, memory-mapped, so that a crop reads only its rows.

An entry is one file: a header and the pixels as `read_image` or `read_mask` gave them. Entries
appear whole (written aside, flushed to the disk, read back, then renamed), so several processes may
fill one cache, and one that was interrupted, by a power cut too, goes on where it stopped.

An entry that does not fit is never used: the source is read instead. What is noticed, at the start
of a run and at every reading, is what the header and the two files' states tell: an entry of
another form or length, and a source of another size or time of change. The checksum of the pixels
is compared once, when they are written. Not noticed are pixels that the disk loses later, and a
source that was changed but kept its size and time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cac_fast.train.data.augment import Pixels, image_size
from cac_fast.train.data.images import check_size, read_image
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.threads import in_threads
from cac_fast.train.errors import InputError
from cac_fast.train.progress import Progress

VERSION = 2
"""To be raised with every change of an entry's form or of what decoding gives."""

_DRAFT = ".part"
_HOUR = 3600


class _Header(NamedTuple):
    """Height, width and channels of the pixels, size and time (ns) of the source, CRC-32."""

    height: int
    width: int
    channels: int
    source_size: int
    source_time: int
    checksum: int


_FORM = struct.Struct("<8s3IQqI")
_MAGIC = b"cacfast%d" % VERSION
_PIXELS_AT = 64
"""Where the pixels start in an entry."""


@dataclass(frozen=True)
class PixelReader:
    """Reads images and masks of a data folder, from a cache where one is given.

    Args:
        data: the folder, which knows how its masks are read.
        cache: folder of decoded files, or None. What is not there, or older than its source, is
            read from the source: a crop has the same bits either way.
    """

    data: SegmentationData
    cache: Path | None = None

    def image(self, path: Path) -> Pixels:
        """RGB, a Pillow image or memory-mapped uint8 (H, W, 3); raises as `images.read_image`."""
        pixels = self._mapped(path)
        return read_image(path) if pixels is None else pixels

    def mask(self, path: Path) -> np.ndarray:
        """Class ids, uint8 (H, W), perhaps memory-mapped; raises as `images.read_mask`."""
        pixels = self._mapped(path, mask=True)
        return self.data.read_mask(path) if pixels is None else pixels[..., 0]

    def mask_of(self, sample: Sample, image: Pixels) -> np.ndarray:
        """A sample's mask; InputError too if its size is not that of its image."""
        mask = self.mask(sample.mask)
        check_size(sample.mask, mask.shape, sample.image, image_size(image))
        return mask

    def both(self, sample: Sample) -> tuple[Pixels, np.ndarray]:
        """A sample's image and its mask, which fits it."""
        image = self.image(sample.image)
        return image, self.mask_of(sample, image)

    def fill(
        self,
        images: Sequence[Sample],
        masks: Sequence[Sample],
        show: Callable[[str], Progress | None] = lambda text: None,
    ) -> None:
        """Write the entries that are missing or do not fit, and no others.

        Files that cannot be read get none: whoever asks for them hears of it. Samples without a
        mask are passed over in `masks`. `show` makes a `Progress` of the name of a task: checking
        all entries, then writing some. A cache that lacks nothing may be read-only.

        Raises:
            InputError: the cache cannot be written, because the disk is full for one.
        """
        jobs = [(sample.image, False) for sample in images]
        jobs += [(sample.mask, True) for sample in masks if sample.mask is not None]
        jobs = list(dict.fromkeys(jobs))
        done = 0
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            self._remove_drafts()
            found = in_threads(lambda job: self._fits(*job), jobs, show("checking the cache"))
            jobs = [job for job, fits in zip(jobs, found, strict=True) if not fits]
            written = in_threads(lambda job: self._write(*job), jobs, show("writing the cache"))
            for _ in written:
                done += 1
        except OSError as error:
            raise InputError(
                f"the cache {self.cache} cannot be written ({error.strerror or error}) after "
                f"{done} of {len(jobs)} files: make room, or give --cache another folder; what is "
                "written is kept"
            ) from error

    def _entry(self, path: Path, mask: bool = False) -> Path:
        # What a mask decodes to depends on the classes.
        data = self.data
        of_mask = (data.num_classes, data.label_map, data.palette, data.ignore_color)
        form = of_mask if mask else "image"
        key = hashlib.sha256(os.fsencode(path.absolute()) + f"\n{form}".encode())
        return self.cache / f"{key.hexdigest()[:32]}.raw"

    def _mapped(self, path: Path, mask: bool = False) -> np.ndarray | None:
        """The pixels, or None where there is no entry or it does not fit the source."""
        if self.cache is None:
            return None
        try:
            with self._entry(path, mask).open("rb") as file:
                header = _read_header(file.read(_PIXELS_AT), os.fstat(file.fileno()).st_size)
                if header is None or _identity(path) != header[3:5]:
                    return None
                return np.memmap(file, np.uint8, "r", _PIXELS_AT, header[:3])
        except OSError:
            return None

    def _fits(self, path: Path, mask: bool) -> bool:
        return self._mapped(path, mask) is not None

    def _write(self, path: Path, mask: bool) -> None:
        entry = self._entry(path, mask)
        try:
            identity = _identity(path)  # first: a source that changes meanwhile makes it stale
            pixels = self.data.read_mask(path) if mask else np.asarray(read_image(path))
        except (InputError, OSError):
            return
        pixels = np.ascontiguousarray(pixels)
        shape = *pixels.shape[:2], 1 if mask else 3
        header = _Header(*shape, *identity, zlib.crc32(pixels))
        draft = entry.with_name(f".{uuid.uuid4().hex}{_DRAFT}")
        try:
            with draft.open("wb") as file:
                file.write(_FORM.pack(_MAGIC, *header).ljust(_PIXELS_AT, b"\0"))
                file.write(pixels)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the name without the pixels
            _check_written(draft)
            os.replace(draft, entry)
        finally:
            draft.unlink(missing_ok=True)

    def _remove_drafts(self) -> None:
        """Remove what a killed process left; what is younger, another one may be writing."""
        for draft in self.cache.glob(f".*{_DRAFT}"):
            # Another run may have renamed it by now, and a shared cache may be read-only.
            with contextlib.suppress(OSError):
                if time.time() - draft.stat().st_mtime > _HOUR:
                    draft.unlink()


def _read_header(start: bytes, size: int) -> _Header | None:
    """The header of an entry of `size` bytes; None if it is none of this version, or cut off."""
    if len(start) < _PIXELS_AT:
        return None
    magic, *fields = _FORM.unpack(start[: _FORM.size])
    header = _Header(*fields)
    whole = size == _PIXELS_AT + header.height * header.width * header.channels
    return header if magic == _MAGIC and whole else None


def _check_written(draft: Path) -> None:
    """Read an entry from the disk; raise OSError if it is not what its header says."""
    with draft.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # else the system may answer from its memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # Read, not mapped: an error of the disk is then an exception and not a signal.
        content = file.read()
    header = _read_header(content[:_PIXELS_AT], len(content))
    if header is None or zlib.crc32(memoryview(content)[_PIXELS_AT:]) != header.checksum:
        raise OSError(errno.EIO, "what was written reads back differently")


def _identity(path: Path) -> tuple[int, int]:
    """What tells a source from another version of it: its size, and when it changed, in ns."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
