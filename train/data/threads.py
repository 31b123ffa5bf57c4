"""Work on many files at once, in threads: reading and decoding leave the interpreter free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cac_fast.train.progress import Progress

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], progress: Progress | None = None
) -> Iterator[Result]:
    """`function` of each item, in order; `progress`, if given, is called after each."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done, result in enumerate(pool.map(function, items), start=1):
            if progress is not None:
                progress(done, len(items))
            yield result
