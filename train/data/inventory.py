"""What is in a data folder: images, masks, pixels of each class, and what looks wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cac_fast.train.data import forms
from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.names import some

LARGE_IGNORED_SHARE = 0.5
"""Share of ignored pixels above which a warning is due."""

_DARK = 16
_TURNED_IN_PLACE, _TURNED = (2, 3, 4), (2, 3, 4, 5, 6, 7, 8)
_LOOKS_WRONG = {
    "turned": "are turned by their EXIF orientation: see that their masks are upright too",
    "stored_band": "have a fourth band, which is not used: not as transparency either",
    "dark": f"are black or almost so, no value being above {_DARK - 1} of 255: are they of fewer "
    "bits than their files say?",
}
"""What the attributes of `Seen` say of images."""


class Seen(NamedTuple):
    """What one image and its mask hold.

    counts: pixels of each of the 256 ids. palette: an id with its color in the file, where that is
    not the class's. The rest is said of the image; all but `counts` is known of source files alone.
    """

    name: str
    counts: np.ndarray
    palette: tuple[int, forms.Color] | None = None
    stored_band: bool = False
    dark: bool = False
    turned: bool = False


def look(
    sample: Sample, image: Image.Image | np.ndarray, mask: np.ndarray, data: SegmentationData
) -> Seen:
    """What there is to know of a sample, given its pixels as they were read."""
    counts = np.array(Image.fromarray(np.asarray(mask)).histogram())
    if not isinstance(image, Image.Image):  # out of a cache, which knows pixels alone
        return Seen(sample.name, counts)
    palette = None
    if data.label_map is None:
        palette = _other_color(forms.mask_palette(sample.mask), counts, data.palette)
    stored_band, orientation, _ = forms.header(sample.image)
    # Where height and width are exchanged, the sizes tell whether the mask is turned as well.
    turned = orientation in (_TURNED if image.width == image.height else _TURNED_IN_PLACE)
    return Seen(sample.name, counts, palette, stored_band, is_dark(image), turned)


def is_dark(image: Image.Image) -> bool:
    """Whether an image is all but black, as one of more bits than were looked for reads."""
    few = image.resize((16, 16), Image.Resampling.NEAREST)  # nearly always enough to say no
    return all(max(high for _, high in one.getextrema()) < _DARK for one in (few, image))


def _other_color(
    found: list[forms.Color] | None, counts: np.ndarray, palette: Sequence[forms.Color]
) -> tuple[int, forms.Color] | None:
    if found is None:
        return None
    used = [index for index in range(len(palette)) if counts[index]]
    if all(len(set(found[index])) == 1 for index in used):
        return None  # gray: it says nothing of colors
    return next(((i, found[i]) for i in used if found[i] != tuple(palette[i])), None)


@dataclass
class Part:
    """The images of one part of a data folder: labeled, validation, ..."""

    name: str
    seen: list[Seen]
    images: int = -1
    """How many there are, those without a mask included; -1: as many as `seen`."""
    pixels: np.ndarray = field(init=False)
    """Of each of the 256 ids."""
    masks: np.ndarray = field(init=False)
    """In how many masks each id is."""

    def __post_init__(self) -> None:
        counts = np.array([one.counts for one in self.seen], np.int64).reshape(-1, 256)
        self.pixels, self.masks = counts.sum(0), (counts > 0).sum(0)
        self.images = len(self.seen) if self.images < 0 else self.images

    @property
    def ignored(self) -> float:
        """Share of the pixels that are ignored."""
        return float(self.pixels[IGNORE] / max(1, self.pixels.sum()))

    def share(self, index: int) -> float:
        """Share of a class in the pixels that are not ignored."""
        return float(self.pixels[index] / max(1, self.pixels[:IGNORE].sum()))


@dataclass
class Inventory:
    """All parts of a data folder. The first one is what the network learns from."""

    data: SegmentationData
    parts: list[Part]

    def table(self) -> str:
        """Rows of classes, columns of parts; short enough for the start of a run."""
        masked = [part for part in self.parts if part.seen]
        width = max(len(name) for name in (*self.data.classes, "images without mask"))

        def row(index: int | str, name: str, *cells: tuple[object, object]) -> str:
            numbers = "".join(f"  {pixels:>10} {masks:>6}" for pixels, masks in cells)
            return f"{index:>3} {name:<{width}}{numbers}"

        lines = [row("", "class", *((part.name, "masks") for part in masked))]
        for index, name in enumerate(self.data.classes):
            shares = [_percent(p.share(index)) if p.pixels[index] else "-" for p in masked]
            masks = [part.masks[index] for part in masked]
            lines.append(row(index, name, *zip(shares, masks, strict=True)))
        ignored = ((_percent(part.ignored), part.masks[IGNORE]) for part in masked)
        lines.append(row(IGNORE, "ignored, of all", *ignored))
        totals = ((_count(int(part.pixels.sum())), len(part.seen)) for part in masked)
        lines.append(row("", "pixels", *totals))
        if any(part.images > len(part.seen) for part in self.parts):
            rest = ((part.images - len(part.seen), "") for part in masked)
            lines.append(row("", "images without mask", *rest).rstrip())
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """What a user should know, a sentence each."""
        found = list(self.data.notes)
        for part in self.parts:
            if part.seen:
                found += _class_warnings(part, self.data) + file_warnings(part, self.data)
        return found

    def refusal(self) -> str | None:
        """Why no training can come of it, in one sentence; None if it can."""
        classes = self.data.classes
        if len(classes) == 1:
            return (
                f"'{classes[0]}' is the only class, so that there is nothing to tell apart: list "
                "the background as a class of its own"
            )
        learned = self.parts[0]
        if not learned.seen:
            return f"no training image in {self.data.root} has a mask that can be used"
        for part in self.parts:
            if part.seen and not part.pixels[:IGNORE].any():
                return (
                    f"every pixel of all {len(part.seen)} {part.name} masks is {IGNORE}, which is "
                    "ignored: write the ids of classes.txt into them"
                )
        present = np.flatnonzero(learned.pixels[:IGNORE])
        if len(present) == 1:
            only = classes[present[0]]
            missing = [f"{name!r}" for index, name in enumerate(classes) if index != present[0]]
            cause = (
                f"and {IGNORE}, which is ignored: write the object as 1"
                if learned.pixels[IGNORE] and len(classes) == 2
                else "alone: write the ids of the other classes into them"
            )
            return (
                f"the {len(learned.seen)} {learned.name} masks hold the id {present[0]} ('{only}') "
                f"{cause} (no pixel of {some(missing)})"
            )
        return None

    def as_json(self) -> dict[str, Any]:
        """All that the table and the warnings say, as plain values."""
        return {
            "dataset": self.data.dataset,
            "root": str(self.data.root),
            "parts": {
                part.name: {
                    "images": part.images,
                    "masks": len(part.seen),
                    "pixels": int(part.pixels.sum()),
                    "ignored_pixels": int(part.pixels[IGNORE]),
                }
                for part in self.parts
            },
            "classes": [
                {
                    "id": index,
                    "name": name,
                    "color": list(self.data.palette[index]),
                    "pixels": {part.name: int(part.pixels[index]) for part in self.parts},
                    "masks": {part.name: int(part.masks[index]) for part in self.parts},
                }
                for index, name in enumerate(self.data.classes)
            ],
            "warnings": self.warnings(),
            "refusal": self.refusal(),
        }


def _class_warnings(part: Part, data: SegmentationData) -> list[str]:
    found = []
    absent = [f"'{name}'" for index, name in enumerate(data.classes) if not part.pixels[index]]
    if absent:
        found.append(f"no pixel of {some(absent, 8)} is in the {part.name} masks")
    if len(data.classes) == 2:
        binary = [one.name for one in part.seen if _is_0_and_255(one.counts)]
        if binary:
            found.append(
                f"{len(binary)} {part.name} masks hold 0 and {IGNORE} alone, and {IGNORE} is "
                f"ignored: if it is '{data.classes[1]}', write 1 ({some(binary)})"
            )
    if part.ignored > LARGE_IGNORED_SHARE:
        found.append(f"{_percent(part.ignored)} of the pixels of the {part.name} masks are ignored")
    return found


def _is_0_and_255(counts: np.ndarray) -> bool:
    return bool(counts[0] and counts[IGNORE] and not counts[1:IGNORE].any())


def file_warnings(part: Part, data: SegmentationData) -> list[str]:
    """What looks wrong with the files of a part: palettes, bands, darkness, turned images."""

    found = []
    if disagreeing := {one.name: one.palette for one in part.seen if one.palette is not None}:
        index, color = next(iter(disagreeing.values()))
        palette = [tuple(color) for color in data.palette]
        other = f", that of '{data.classes[palette.index(color)]}'" if color in palette else ""
        found.append(
            f"{len(disagreeing)} {part.name} masks hold a palette that disagrees with the class "
            f"list: {index} is {color} there{other}, but '{data.classes[index]}' is "
            f"{palette[index]}; ids count, not colors ({some(disagreeing)})"
        )
    for attribute, what in _LOOKS_WRONG.items():
        if wrong := [one.name for one in part.seen if getattr(one, attribute)]:
            found.append(f"{len(wrong)} {part.name} images {what} ({some(wrong)})")
    return found


def _percent(share: float) -> str:
    return "<0.01 %" if 0 < share < 5e-5 else f"{100 * share:.2f} %"


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
