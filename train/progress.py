"""How far a task is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)`` after each item."""


def show_progress(text: str) -> Progress:
    """A :data:`Progress` on stderr: a bar on a terminal, else plain lines.

    A line is ``text done/total`` and comes at each tenth of the whole.
    """
    bar: tqdm | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if sys.stderr.isatty():
            if bar is None:
                bar = tqdm(total=total, desc=text, dynamic_ncols=True)
            bar.update(done - bar.n)
            if done == total:
                bar.close()
        elif done * 10 // total > (done - 1) * 10 // total:
            print(f"{text} {done}/{total}", file=sys.stderr, flush=True)

    return show


def warn(message: str) -> None:
    """Write one line ``warning: message`` to stderr, above a bar if one is shown."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
