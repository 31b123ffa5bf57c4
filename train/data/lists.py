"""Lists of images as users hold them: names or paths, in the forms that other programs write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from cac_fast.train.data import names
from cac_fast.train.data.layouts import SPLITS, Sample, SegmentationData
from cac_fast.train.errors import InputError

_MOST_SHOWN = 200
"""Characters of a line that a message repeats: the list may be any file."""


def read_samples(path: Path, data: SegmentationData, needs_mask: bool) -> list[Sample]:
    """The images that a list names, in its order.

    A line is a NAME of the train split, or `image mask`, or `image`, as paths from the data folder
    or from anywhere. Lists of other systems are taken as they are: back slashes, a leading slash,
    folders that were elsewhere, another Unicode form or case, if only one file can be meant.

    needs_mask: every image must have one, in the second column or in its place.

    Raises:
        InputError: the list is missing or empty, or a line names what is not there.
    """
    finder = Finder(data)
    samples = []
    for place, line in _lines(path):
        sample = finder.sample(line, place, needs_mask)
        if needs_mask and sample.mask is None:
            raise InputError(
                f"{place}: {_shortened(line)} has no mask, but labeled images need one: name it in "
                "the second column, or move the line to the unlabeled list"
            )
        samples.append(sample)
    return samples


def named(samples: Sequence[Sample], path: Path) -> list[Sample]:
    """Those of the samples that the list `path` names, one a line; in the samples' order.

    A line is a NAME or the path of an image, in the forms that `read_samples` takes.

    Raises:
        InputError: the list is missing or empty, or names what is not among the samples.
    """
    there = {sample.name: sample for sample in samples}
    loose = _by_folded(
        (sample, (sample.name, *names.ends(sample.image.absolute().as_posix())))
        for sample in samples
    )
    found = set()
    for place, line in _lines(path):
        sample = there.get(line) or _alike(line, loose)
        if sample is None:
            near = names.nearest(names.without_suffix(line), there)
            raise InputError(
                f"{place}: {_shortened(line)} is no image of this split"
                f"{f' (the nearest is {near})' if near else ''}: correct the line or choose "
                "another split"
            )
        found.add(sample.name)
    return [sample for sample in samples if sample.name in found]


def _lines(path: Path) -> list[tuple[str, str]]:
    """Place and text of each line."""
    lines = [(f"{path} line {number}", line) for number, line in names.read_list(path)]
    if not lines:
        raise InputError(f"the list {path} is empty: give at least one image a line")
    return lines


def _by_folded(texts: Iterable[tuple[Sample, Iterable[str]]]) -> dict[str, Sample | None]:
    """Samples by what they are called, folded; None where several are."""
    found: dict[str, Sample | None] = {}
    for sample, calls in texts:
        for key in set(map(names.folded, calls)):
            found[key] = None if key in found else sample
    return found


def _alike(line: str, loose: dict[str, Sample | None]) -> Sample | None:
    for text in names.spellings(line):
        for end in names.ends(text):
            known = loose.get(names.folded(end))
            if known and not _of_another_split(text, end, known.image.absolute()):
                return known
    return None


def _of_another_split(text: str, end: str, image: str | Path) -> bool:
    """Whether what is before the common end of a path and an image's names two splits."""
    length = len(_parts(end))
    if _split(_parts(end)) is not None:
        return False
    theirs, ours = (_split(_parts(path)[:-length]) for path in (text, image))
    return None not in (theirs, ours) and theirs != ours


def _parts(path: str | Path) -> list[str]:
    return [part for part in str(path).casefold().split("/") if part not in ("", ".")]


def _split(parts: list[str]) -> str | None:
    return next((part for part in reversed(parts) if part in SPLITS), None)


class Finder:
    """What the words of a list stand for in a data folder."""

    def __init__(self, data: SegmentationData) -> None:
        self.data, self.root = data, data.root
        self.train = {sample.name: sample for sample in data.splits["train"]}
        self.by_image = {sample.image: sample for split in data.splits.values() for sample in split}

    @cached_property
    def by_real_path(self) -> dict[str, Sample]:
        return {os.path.realpath(path): sample for path, sample in self.by_image.items()}

    @cached_property
    def loose(self) -> dict[str, Sample | None]:
        """Samples by folded name and path; None where several have it."""
        return _by_folded(
            (sample, (self._below(sample.image), *self._names(sample)))
            for sample in self.by_image.values()
        )

    def sample(self, line: str, place: str, needs_mask: bool) -> Sample:
        """The image of a line; raises InputError, which begins with `place`, if there is none."""
        known = self.train.get(line)
        if known is not None:
            return known
        if names.is_one_path(line) and (whole := self.image(line)) is not None:
            return whole
        cuts = names.columns(line)
        found = [
            (image, mask)
            for first, second in cuts
            if (image := self.image(first)) is not None
            # An unlabeled image's mask is looked at for one diagnostic only, so it may be absent.
            and ((mask := self.mask(second, image)) is not None or not needs_mask)
        ]
        if len(found) == 1:
            image, mask = found[0]
            return Sample(image.name, image.image, mask)
        raise InputError(f"{place}: {self._problem(line, cuts, needs_mask)}")

    def image(self, word: str) -> Sample | None:
        """The image that a word names, None where there is none."""
        for text in names.spellings(word):
            if (known := self.train.get(text)) is not None:
                return known
            # os.path.isfile and not Path's: of what is no file name it says no, and raises nothing.
            if os.path.isfile(path := self.root / text.lstrip("/")):
                return self._at(path, text)
            if os.path.isabs(text) and os.path.isfile(text):
                known = self.by_real_path.get(os.path.realpath(text))
                return known or self._at(Path(text), text)
        for text in names.spellings(word):
            for end in names.ends(text):
                if os.path.isfile(path := self.root / end.lstrip("/")):
                    return self._at(path, end)
                known = self.loose.get(names.folded(end))
                if known and not _of_another_split(text, end, self._below(known.image)):
                    return known
        return None

    def mask(self, word: str, image: Sample) -> Path | None:
        """The mask that a word names, or the image's own one; None where there is none."""
        own = self.by_image.get(image.image, image).mask
        for text in names.spellings(word):
            ends = text.lstrip("/"), *names.ends(text)  # below the root; from anywhere; its tails
            for end in ends:
                if (found := self.data.find_mask(self.root / end)) is not None:
                    return found
            if own is not None and names.folded(self._below(own)) in map(names.folded, ends):
                return own
        return None

    def _at(self, path: Path, text: str) -> Sample:
        known = self.by_image.get(path)
        if known is not None and self.train.get(known.name) is known:
            return known
        # One of another split may have the name of a training image.
        name = Path(text.lstrip("/")).with_suffix("").as_posix()
        return Sample(name, path, None if known is None else known.mask)

    def _below(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else ""

    def _names(self, sample: Sample) -> tuple[str, ...]:
        """Of a training image: its name, also with all of the file's, `city/NAME_leftImg8bit`."""
        if self.train.get(sample.name) is not sample:
            return ()
        whole = f"{sample.name.rpartition('/')[0]}/{sample.image.stem}"
        return sample.name, whole.lstrip("/")

    def _problem(self, line: str, cuts: list[tuple[str, str]], needs_mask: bool) -> str:
        if needs_mask and len(cuts) == 1 and self.image(cuts[0][0]) is not None:
            *_, text = names.spellings(cuts[0][1])
            named = _shortened(str(self.root / text.lstrip("/")))
            return f"the mask {named} does not exist: correct the line"
        if len(cuts) != 1 and ("\t" in line or len(line.split()) > 2):
            return (
                f"{_shortened(line)!r} has more than two columns: separate image and mask by a tab "
                "if their paths hold spaces"
            )
        word = cuts[0][0] if cuts else line
        *_, text = names.spellings(word)
        known = [
            self._below(sample.image) if "/" in text else name
            for name, sample in self.train.items()
        ]
        near = names.nearest(text, known)
        return (
            f"{_shortened(word)} is neither an image below {self.root} nor a name of its train "
            f"split ({_shortened(str(self.root / text.lstrip('/')))} was looked for"
            f"{f'; the nearest is {near}' if near else ''}): correct the line or add the image"
        )


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."
