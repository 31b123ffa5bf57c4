"""Names as lists and folders hold them: two ways to write the same one, and the nearest one."""

from __future__ import annotations

import codecs
import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from cac_fast.train.errors import InputError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif", ".jpe", ".ppm",
    ".pgm", ".pnm", ".jp2", ".avif",
)  # fmt: skip

# The longer ones first: a UTF-32 text begins as a UTF-16 one does.
_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-8-sig": (codecs.BOM_UTF8,),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_DRIVE = re.compile(r"[A-Za-z]:/")
_SEPARATOR = re.compile(r"\s*[,;]\s*|\s+")
_TWO_COLUMNS = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})[\s,;]", re.IGNORECASE)
_MOST_COMPARED = 200


def read_list(path: Path) -> list[tuple[int, str]]:
    """The lines of a list with their numbers from 1, without blank ones and comments (#).

    UTF-8, or UTF-16 or UTF-32 with their mark. Other bytes stay what they are in file names.

    Raises:
        InputError: there is no such file, or it is no text.
    """
    try:
        content = path.read_bytes()
        encoding = next((name for name, of in _MARKS.items() if content.startswith(of)), None)
        if encoding is None and b"\0" in content:
            raise ValueError("it is no text, or UTF-16 without a byte order mark")
        strict = encoding is not None and encoding != "utf-8-sig"
        text = content.decode(encoding or "utf-8", "strict" if strict else "surrogateescape")
    except FileNotFoundError:
        raise InputError(f"the list {path} does not exist: correct its path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"the list {path} cannot be read ({error}): give a text file") from error
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def spellings(text: str) -> Iterator[str]:
    """A path of a list as it is, then as this system would have written it."""
    texts = [text]
    if "\\" in text:
        texts.append(text.replace("\\", "/"))
    if (western := _western(texts[-1])) != texts[-1]:
        texts.append(western)
    for form in texts:
        yield form
        if (shorter := form.removeprefix("./").lstrip("/")) != form:
            yield shorter


def ends(path: str) -> Iterator[str]:
    """A path, then without its first parts, longest first, down to two parts."""
    yield path
    parts = [part for part in _DRIVE.sub("", path).split("/") if part not in ("", ".")]
    for start in range(1, len(parts) - 1):
        yield "/".join(parts[start:])


def is_one_path(line: str) -> bool:
    """Whether a line may be a single path, which can hold blanks: no file's suffix is inside it."""
    return "\t" not in line and not _TWO_COLUMNS.search(line)


def columns(line: str) -> list[tuple[str, str]]:
    """All ways to cut a line in two, at a tab if it has one, else at each comma or blank."""
    if "\t" in line:
        parts = [part.strip() for part in line.split("\t") if part.strip()]
        return [(parts[0], parts[1])] if len(parts) == 2 else []
    cuts = _SEPARATOR.finditer(line)
    pairs = [(line[: cut.start()], line[cut.end() :]) for cut in cuts]
    return [pair for pair in pairs if all(pair)]


def without_suffix(name: str) -> str:
    """A name or path without the suffix of an image, if it has one."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def folded(name: str) -> str:
    """The same text for names that differ in case, encoding or an image's suffix alone."""
    return unicodedata.normalize("NFC", without_suffix(_western(name)).casefold())


def _western(text: str) -> str:
    """A name or path with bytes that are no UTF-8, as a program that knew none meant it."""
    if not any("\udc80" <= letter <= "\udcff" for letter in text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar one, None where none is similar."""
    if len(name) > _MOST_COMPARED:
        return None
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
