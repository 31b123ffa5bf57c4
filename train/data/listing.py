"""Folders as people have them: links, masks beside images, and files of other kinds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cac_fast.train.data.names import IMAGE_SUFFIXES, folded, some
from cac_fast.train.errors import InputError

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
"""Those that keep every value."""

# Beside images these say nothing of a picture that was meant to be one.
_NOTES = frozenset(
    (
        " .txt .md .csv .tsv .json .jsonl .xml .yaml .yml .html .log .ini .db .py .sh .pdf .lock "
        ".xlsx"
    ).split(" ")
)


def files(folder: Path, without: Path | None = None) -> Iterator[Path]:
    """Files below a folder, hidden ones left out; none without it.

    Links to folders are followed, but none that leads back: to a folder above it, to one that is
    listed anyway, or to one that is being listed. `without` is a folder to pass over.

    Raises:
        InputError: a folder is there but cannot be listed.
    """
    root = os.path.realpath(folder)
    skipped = None if without is None else os.path.realpath(without)

    def walk(place: str, above: tuple[str, ...]) -> Iterator[Path]:
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise InputError(
                f"the folder {place} cannot be listed ({error.strerror or error}): mend that or "
                "move it elsewhere"
            ) from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not os.path.isdir(entry.path):  # an entry's own is_dir() fails for a link to itself
                yield Path(entry.path)
                continue
            real = os.path.realpath(entry.path)
            if real == skipped or (entry.is_symlink() and _leads_back(real, root, above)):
                continue
            yield from walk(entry.path, (*above, real))

    return walk(str(folder), (root,)) if root != skipped else iter(())


def _leads_back(real: str, root: str, above: tuple[str, ...]) -> bool:
    def holds(outer: str, inner: str) -> bool:
        return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)

    return holds(root, real) or any(holds(real, place) for place in above)


def is_image(path: Path) -> bool:
    """Whether a file's suffix is that of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def kinds(counts: Counter[str]) -> str:
    """As `.heic 3, .npy 1`."""
    return ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in counts.most_common())


def not_read(folder: Path, paths: Iterable[Path]) -> list[str]:
    """What there is to say about files of other kinds in a folder of images or masks."""
    suffixes = (path.suffix.lower() for path in paths if not is_image(path))
    counts = Counter(suffix for suffix in suffixes if suffix not in _NOTES)
    if not counts:
        return []
    return [f"{counts.total()} files in {folder} are of other kinds and not read: {kinds(counts)}"]


def by_name(paths: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """Images by their names.

    Raises:
        InputError: two have the same one.
    """
    found: dict[str, Path] = {}
    for path in filter(is_image, paths):
        name = name_of(path)
        if name in found:
            raise InputError(f"{found[name]} and {path} have the same name: rename one of them")
        found[name] = path
    return found


def masks_by_name(paths: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """Masks by their names; of two of a name the one whose suffix promises exact values.

    Raises:
        InputError: two of a name promise it.
    """
    images = list(filter(is_image, paths))
    exact = [path for path in images if path.suffix.lower() in MASK_SUFFIXES]
    return {name_of(path): path for path in images} | by_name(exact, name_of)


def pair(
    images: dict[str, Path], masks: dict[str, Path], where: str
) -> tuple[dict[str, Path], list[str]]:
    """The masks by the names of their images, and what there is to say about it.

    A mask whose name differs from an image's in case, Unicode form or a suffix alone belongs to it
    if no other one does.

    where: what the masks are called in a message.
    """
    found = {name: masks[name] for name in images if name in masks}
    alone = [name for name in masks if name not in images]
    if not alone:
        return found, []
    free: dict[str, list[str]] = {}
    for name in images:
        if name not in masks:
            free.setdefault(folded(name), []).append(name)
    taken = Counter(folded(name) for name in alone)
    near = {
        name: free[folded(name)][0]
        for name in alone
        if taken[folded(name)] == 1 and len(free.get(folded(name), ())) == 1
    }
    found |= {image: masks[name] for name, image in near.items()}
    notes = []
    if near:
        pairs = (f"{masks[name].name} to {images[image].name}" for name, image in near.items())
        notes.append(
            f"{len(near)} of {where} have the names of their images but for case, suffix or "
            f"Unicode form and were matched: {some(pairs)}"
        )
    lost = sorted(masks[name].name for name in alone if name not in near)
    if lost:
        notes.append(f"{len(lost)} of {where} belong to no image and are not used: {some(lost)}")
    return found, notes
