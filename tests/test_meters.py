"""What the lines of metrics.jsonl make of the steps' scalars."""

from __future__ import annotations

import pytest
import torch

from cac_fast.train.batch import Step
from cac_fast.train.log import Meters, train_line

STEP = Step({"image": torch.zeros(2)}, None, 0.0)
REDUCTIONS = {"share": "pairs", "pairs": "sum"}


def reading(*steps: dict[str, float]) -> dict:
    meters = Meters(torch.device("cpu"), REDUCTIONS)
    for iteration, values in enumerate(steps):
        scalars = {name: torch.tensor(value) for name, value in values.items()}
        meters.add(iteration, {"loss": torch.tensor(1.0), **scalars}, STEP)
    return meters.read() | {"skipped": 0}


def test_a_share_is_weighted_by_its_count_over_the_steps() -> None:
    means = reading({"share": 0.5, "pairs": 8}, {"share": 0.0, "pairs": 0}, {})["means"]
    assert means == {"loss": 1, "share": 0.5, "pairs": 4}
    means = reading({"share": 0.5, "pairs": 8}, {"share": 1.0, "pairs": 24})["means"]
    assert means["share"] == (4 + 24) / 32


def test_a_share_of_nothing_is_zero() -> None:
    assert reading({"share": 0.0, "pairs": 0})["means"] == {"loss": 1, "share": 0, "pairs": 0}


def test_a_line_holds_the_share_of_all_steps_and_ranks() -> None:
    first = reading({"share": 0.5, "pairs": 8}, {"share": 0.25, "pairs": 4})
    second = reading({"share": 0.0, "pairs": 0}, {"share": 1.0, "pairs": 4})
    line = train_line([first, second], 0.1, REDUCTIONS)
    assert line["share"] == pytest.approx((4 + 1 + 4) / 16)
    assert line["pairs"] == 6 + 2  # of a step
    assert line["loss"] == 1


def test_a_reading_starts_anew() -> None:
    meters = Meters(torch.device("cpu"), REDUCTIONS)
    for share, pairs in ((1.0, 100), (0.5, 8)):
        values = {"loss": torch.tensor(1.0), "share": torch.tensor(share)}
        meters.add(1, values | {"pairs": torch.tensor(pairs)}, STEP)
        found = meters.read()["means"]
    assert found["share"] == 0.5
