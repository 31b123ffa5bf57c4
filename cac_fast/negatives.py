"""How many negatives are of their anchor's true class (Fig. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

_UNKNOWN_TRUTH = 255


def false_negatives(
    truth: Tensor, labels: Tensor, active: Tensor, chosen: Tensor, usable: Tensor
) -> dict[str, Tensor]:
    """Shares of one true class among the pairs of active anchor and chosen negative.

    truth, labels, active: (R,) of all rows: true class, 255 where unknown; what a negative must not
        share with its anchor; whether the row learns. chosen, usable: (N,), rows that are negatives
        and whether each may be one.

    Returns scalar tensors by their names in `DCLossOutput`: `false_negatives` of `admitted_pairs`,
    whose labels differ, and `false_negatives_random` of the `random_pairs`, which are all. Only
    pairs whose two classes are known count; a share of no pair is 0.

    >>> truth, labels, yes = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.ones(3).bool()
    >>> found = false_negatives(truth, labels, yes, torch.arange(3), yes)
    >>> {name: value.item() for name, value in found.items() if "pairs" in name}
    {'admitted_pairs': 4, 'random_pairs': 9}
    >>> found["false_negatives"].item()
    0.5
    """
    anchors = active & (truth < _UNKNOWN_TRUTH)
    negatives = usable & (truth[chosen] < _UNKNOWN_TRUTH)

    def equal_pairs(keys: Tensor) -> Tensor:
        pool = keys[chosen].masked_fill(~negatives, -1).sort().values
        equal = torch.searchsorted(pool, keys, right=True) - torch.searchsorted(pool, keys)
        return (equal * anchors).sum()

    pairs, same_class = anchors.sum() * negatives.sum(), equal_pairs(truth)
    # Pairs of one label are not admitted: taken off both counts.
    admitted = pairs - equal_pairs(labels)
    same_admitted = same_class - equal_pairs(labels * (_UNKNOWN_TRUTH + 1) + truth)
    return {
        "false_negatives": same_admitted / admitted.clamp_min(1),
        "false_negatives_random": same_class / pairs.clamp_min(1),
        "admitted_pairs": admitted,
        "random_pairs": pairs,
    }
