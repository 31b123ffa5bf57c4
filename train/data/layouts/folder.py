"""A user's own folder: images/SPLIT, masks/SPLIT and classes.txt."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cac_fast.train.data import names
from cac_fast.train.data.forms import Color
from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.layouts import SPLITS, SegmentationData, paired_samples
from cac_fast.train.data.listing import by_name, files, masks_by_name, not_read, pair
from cac_fast.train.errors import InputError

Class = tuple[str, Color]

# Names under which 255 is listed by those who know that it is ignored.
_IGNORED_NAMES = re.compile(
    r"ignore|void|un-?\s?label|unknown|undefined|unclassified|none|null|border|edge|bound|don'?t|"
    r"outside|invalid|no.?label|no.?data|mask",
    re.IGNORECASE,
)


def open_folder(root: Path) -> SegmentationData:
    """List images/SPLIT and masks/SPLIT by the classes of classes.txt."""
    classes, palette, ignored = _read_classes(root / "classes.txt")
    splits, notes = {}, []
    if ignored is not None and not _IGNORED_NAMES.search(ignored[0]):
        notes.append(
            f"{root / 'classes.txt'} gives the id {IGNORE} to '{ignored[0]}', but {IGNORE} is "
            "always ignored: it is no class, give it another id if it should be learned"
        )

    def below(folder: Path) -> Callable[[Path], str]:
        return lambda path: path.relative_to(folder).with_suffix("").as_posix()

    for split in SPLITS:
        places = root / "images" / split, root / "masks" / split
        found = [list(files(place)) for place in places]
        images = by_name(found[0], below(places[0]))
        masks = masks_by_name(found[1], below(places[1]))
        matched, said = pair(images, masks, f"the masks in {places[1]}")
        splits[split] = paired_samples(images, matched)
        notes += said
        for place, paths in zip(places, found, strict=True):
            notes += not_read(place, paths)
    if not splits["train"]:
        suffixes = ", ".join(suffix[1:] for suffix in names.IMAGE_SUFFIXES)
        raise InputError(
            f"no image was found in {root / 'images' / 'train'} ({suffixes}): put the training "
            "images there"
        )
    color = None if ignored is None else ignored[1]
    return SegmentationData(
        "folder", root, classes, palette, splits, ignore_color=color, notes=tuple(notes)
    )


def _read_classes(path: Path) -> tuple[tuple[str, ...], tuple[Color, ...], Class | None]:
    """Names and colors of the classes, and of 255 if it has a line."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: write one line `id name R G B` for each class")
    rows: dict[int, Class] = {}
    for number, line in names.read_list(path):
        # Class names are printed: bytes that are no text would stop a run at its end.
        words = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").split()
        try:
            index, *color = (int(word) for word in (words[0], *words[-3:]))
        except ValueError:
            index, color = -1, []
        if len(words) < 5 or not 0 <= index <= 255 or not all(0 <= c <= 255 for c in color):
            raise InputError(
                f"{path} line {number}: {line!r} is not `id name R G B` with numbers from 0 to 255"
            )
        if index in rows:
            raise InputError(f"{path} line {number}: the id {index} is there twice: renumber it")
        rows[index] = (" ".join(words[1:-3]), (color[0], color[1], color[2]))
    ignored = rows.pop(IGNORE, None)
    if sorted(rows) != list(range(len(rows))) or not rows:
        raise InputError(
            f"{path}: the ids must be 0, 1, 2, ... without gaps ({IGNORE} is ignored), but are "
            f"{', '.join(map(str, sorted(rows))) or 'none'}: renumber them, in the masks too"
        )
    classes, palette = zip(*(rows[index] for index in range(len(rows))), strict=True)
    return classes, palette, ignored
