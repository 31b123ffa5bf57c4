"""Weights of unsupervised losses that rise in the first part of a run."""

from __future__ import annotations

import math


def sigmoid_ramp(step: int, length: float) -> float:
    """exp(-5 (1 - step / length)^2), 1 from `length` on (Laine and Aila, ICLR 2017)."""
    if step >= length:
        return 1.0
    return math.exp(-5 * (1 - step / length) ** 2)
