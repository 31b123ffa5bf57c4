"""The shares of false negatives among admitted and among all pairs, against loops over pairs."""

from __future__ import annotations

import pytest
import torch

from cac_fast.negatives import false_negatives

ROWS = 40


def rows(classes: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Truth (some of it unknown), labels, active, chosen and usable, all drawn."""
    rng = torch.Generator().manual_seed(seed)

    def draw(most: int, count: int = ROWS) -> torch.Tensor:
        return torch.randint(0, most, (count,), generator=rng)

    truth = draw(classes).masked_fill(draw(5) == 0, 255)
    chosen = torch.randperm(ROWS, generator=rng)[:25]
    return truth, draw(3), draw(2).bool(), chosen, draw(4, 25) > 0


@pytest.mark.parametrize("seed", range(5))
def test_both_shares_equal_a_double_loop(seed: int) -> None:
    truth, labels, active, chosen, usable = given = rows(4, seed)
    same, count = [0, 0], [0, 0]
    for i in range(ROWS):
        for j, use in zip(chosen.tolist(), usable.tolist(), strict=True):
            if not active[i] or not use or 255 in (truth[i], truth[j]):
                continue
            for place, admitted in enumerate((labels[i] != labels[j], True)):
                count[place] += int(admitted)
                same[place] += int(admitted and truth[i] == truth[j])
    found = {name: value.item() for name, value in false_negatives(*given).items()}
    assert 0 < same[0] < same[1] and 0 < count[0] < count[1]
    assert [found["admitted_pairs"], found["random_pairs"]] == count
    assert found["false_negatives"] == pytest.approx(same[0] / count[0])
    assert found["false_negatives_random"] == pytest.approx(same[1] / count[1])


def test_one_class_makes_every_negative_false() -> None:
    found = false_negatives(*rows(1))
    assert found["false_negatives"] == found["false_negatives_random"] == 1


def test_no_admitted_pair() -> None:
    truth, labels, *rest = rows(4)
    found = false_negatives(truth, labels * 0, *rest)
    assert found["admitted_pairs"] == 0 == found["false_negatives"]
    assert found["random_pairs"] > 0 and found["false_negatives_random"] > 0
