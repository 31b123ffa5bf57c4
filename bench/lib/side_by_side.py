"""Calls in processes of their own, all at once: what crashes or hangs costs its result alone."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any


def _answer(answers: Any, index: int, call: Callable[[], Any]) -> None:
    answers.put((index, call()))


def side_by_side(calls: Sequence[Callable[[], Any]], seconds: float) -> list[tuple[Any, str]]:
    """What each call returns, and "" or why it returned nothing: `(None, "exit code 3")`.

    calls: can be pickled, as their results can. seconds: after which they are killed.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_answer, args=(answers, index, call), daemon=True)
        for index, call in enumerate(calls)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(calls) and time.monotonic() < deadline:
        gone = all(process.exitcode is not None for process in processes)
        try:
            index, result = answers.get(timeout=0.2)
            found[index] = result
        except queue.Empty:
            if gone:
                break
    results = []
    for index, process in enumerate(processes):
        late = process.is_alive()
        process.kill()
        process.join()
        reason = f"not done in {seconds:g} s" if late else f"exit code {process.exitcode}"
        results.append((found[index], "") if index in found else (None, reason))
    return results
