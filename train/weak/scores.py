"""How well a classification network finds the classes of images."""

from __future__ import annotations

from typing import Any

import numpy as np


def classification_scores(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """`map`, `f1` and `ap` of (images, classes) probabilities and truth, bool.

    ap: average precision of each class, None where no image has it. map: their mean, None without
    any. f1: of all decisions together at probability 0.5, 0 where none is positive.
    """
    pairs = zip(probabilities.T, truth.T, strict=True)
    precisions = [average_precision(*pair) for pair in pairs]
    known = [value for value in precisions if value is not None]
    chosen = probabilities > 0.5
    decisions = chosen.sum() + truth.sum()
    return {
        "map": float(np.mean(known)) if known else None,
        "f1": float(2 * (chosen & truth).sum() / decisions) if decisions else 0.0,
        "ap": precisions,
    }


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Sum over thresholds of the precision times the gain in recall; None without a positive.

    Images of equal scores come in together.
    """
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    precision = hits[last] / (last + 1)
    return float((np.diff(hits[last], prepend=0) * precision).sum() / truth.sum())
