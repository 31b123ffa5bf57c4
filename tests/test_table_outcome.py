"""What a table says of its runs: neighbors in the paper's ranking, settings that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tabled import Programs

from accuracy import table_outcome, tables
from accuracy.paper_tables import TABLES, Row
from accuracy.table_outcome import orderings
from accuracy.table_plan import all_rows
from cac_fast.train import config
from cac_fast.train.registry import METHODS
from lib.measure import ROOT


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Programs:
    return Programs(monkeypatch, tmp_path)


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


SETTINGS = (
    "--unlabeled-scale 0.9,1.7 --iou-range 0.2,1 --temperature 0.2 --confidence 0.5 --ema-decay 0.9"
    " --no-projector --cutmix --warmup 3 --jitter-labeled --iterations 64"
)
SCALE = "unlabeled_scale: 0.9,1.7, the default is 0.8,2.0"


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("supervised", []),
        ("self_training", [SCALE, "confidence: 0.5", "warmup: 3, the method's preset is 0"]),
        ("cps", [SCALE, "cutmix: True", "warmup: 3, the method's preset is 0"]),
        ("mean_teacher", [SCALE, "ema_decay: 0.9", "warmup: 3, the method's preset is 0"]),
        # The paper's own method is compared with the paper, but for what the paper has not.
        ("cac", ["projector: False", "temperature: 0.2", "warmup: 3, the paper's 1/16"]),
    ],
)
def test_settings_that_a_method_reads_are_told(
    tmp_path: Path, method: str, told: list[str]
) -> None:
    words = ["--dataset", "voc", "--data-dir", str(tmp_path), "--method", method]
    ours = config.parse([*words, *SETTINGS.split()])
    lines = table_outcome._unlike(Row("one", (None,), method), ours, "voc")
    assert "jitter_labeled: True, the paper's False" in lines
    for text in told:
        assert any(line.startswith(text) for line in lines), text
    names = {line.partition(":")[0] for line in lines}
    of_all = {"iterations", "jitter_labeled", "weights"}
    of_cac = {"unlabeled_scale", "iou_range", "negatives_per_view"} if method == "cac" else set()
    assert names == {*of_all, *of_cac, *(text.partition(":")[0] for text in told)}


def test_the_preset_is_no_difference(tmp_path: Path) -> None:
    words = ["--dataset", "voc", "--data-dir", str(tmp_path), "--method"]
    for method in METHODS.entries:
        ours = config.parse([*words, method])
        lines = table_outcome._unlike(Row("one", (None,), method), ours, "voc")
        assert not any(line.startswith("warmup") for line in lines), method


@pytest.mark.parametrize("number", sorted(TABLES))
def test_runs_of_ecs_are_called_a_reading(number: int) -> None:
    table = TABLES[number]
    record = {"data": "voc", "title": "x", "cells": [], "orderings": [], "differences": []}
    text = table_outcome.markdown(number, table, record)
    assert any(row.method == "ecs" for row in all_rows(table)) == (number in (1, 2))
    assert ("\n- ECS's authors published neither code nor settings: " in text) == (number in (1, 2))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lists/{share}/{list}", "lists/{share}/{list}"),
        ("sets/voc/{share}", "voc/{share}"),
        ("sets/voc/list{list}", "voc/list{list}"),
        ("sets/mine", "mine"),
    ],
)
def test_lists_are_told_by_the_end_of_what_was_given(
    programs: Programs, given: str, said: str
) -> None:
    options = tables.parse(["--table", "1", *programs.words, "--lists", str(ROOT / given)])
    assert table_outcome._lists_text([], options) == f"lists: {said} of the call"
