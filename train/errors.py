"""The one exception that bad input raises in the trainer, and what its messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """Input that cannot be used: its message is one sentence that names the thing and the remedy.

    The commands print it as a single line and exit with code 2. Under torchrun each
    machine's first rank prints it.
    """


class RankInputError(InputError):
    """Bad input that one rank met alone, in its part of the data: that rank prints it."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing `path` (a full disk, as a rule) into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): mend that, then give the same "
            "command again"
        ) from error


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """As `, did you mean voc?`; empty where no name is similar."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {nearest[0]}?" if nearest else ""
