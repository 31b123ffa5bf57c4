"""Which neighbors of the paper's ranking a table compares."""

from __future__ import annotations

from typing import Any

import pytest

from accuracy.paper_tables import TABLES
from accuracy.table_outcome import orderings


def row(name: str, paper: float | None, values: dict[int, float], folder: str) -> dict[str, Any]:
    last = {"mean": 0.0, "sd": None, "values": list(values.values())} if values else None
    folders = [f"{folder}-{seed}" for seed in values]
    names = {"row": name, "paper": paper, "folders": folders}
    return {**names, "seeds": list(values), "last": last}


def test_neighbors_are_compared_seed_by_seed() -> None:
    rows = [
        row("low", 60.0, {0: 50.0, 1: 40.0, 2: 45.0}, "a"),
        row("high", 64.0, {0: 53.0, 2: 46.0, 3: 90.0}, "b"),
        row("not ours", 62.0, {}, "c"),
        row("not theirs", None, {0: 1.0}, "d"),
    ]
    assert orderings(TABLES[3], rows) == []  # each has a neighbor without runs
    (found,) = orderings(TABLES[3], [rows[0], rows[1], rows[3]])
    assert (found["above"], found["below"], found["paper"]) == ("high", "low", 4.0)
    assert found["seeds"] == 2 and found["mean"] == pytest.approx(2.0)
    assert found["standard_error"] == pytest.approx(1.0)
    assert orderings(TABLES[2], rows) == []  # several columns have several rankings


def test_rows_with_the_same_runs_are_not_compared() -> None:
    capped = [row("6.4k", 71.3, {0: 50.0}, "a"), row("12.8k", 71.9, {0: 50.0}, "a")]
    assert orderings(TABLES[4], capped) == []
    (found,) = orderings(TABLES[4], [capped[0], row("12.8k", 71.9, {0: 50.0}, "b")])
    assert found["mean"] == 0
