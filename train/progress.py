"""How far a task is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS_A_LINE = 10

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)` after each item."""


def show_progress(text: str) -> Progress:
    """A `Progress` on stderr: a bar on a terminal, else plain lines.

    A line is `text done/total` and comes every ten seconds, so that quick work is silent.
    """
    bar: tqdm | None = None
    said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal bar, said
        if sys.stderr.isatty():
            if bar is None:
                bar = tqdm(total=total, desc=text, dynamic_ncols=True)
            bar.update(done - bar.n)
            if done == total:
                bar.close()
        elif time.monotonic() - said >= SECONDS_A_LINE:
            said = time.monotonic()
            print(f"{text} {done}/{total}", file=sys.stderr, flush=True)

    return show


def warn(message: str) -> None:
    """Write one line `warning: message` to stderr, above a bar if one is shown."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
