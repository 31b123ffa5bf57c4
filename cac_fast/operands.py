"""The seven operands of the loss operator, from the operator down to the launch of its kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """One direction of the loss: A anchors with their positives, against M shared negatives.

    anchors, positives: (A, D), negatives: (M, D), floating point, of unit norm.
    anchor_labels (A,), negative_labels (M,): integers; an anchor admits the negatives of other
        labels, and none admits a negative whose label is below 0.
    active: (A,) bool, the anchors that have a loss.
    temperature: tau.
    """

    anchors: Tensor
    positives: Tensor
    negatives: Tensor
    anchor_labels: Tensor
    negative_labels: Tensor
    active: Tensor
    temperature: float

    def to(self, dtype: torch.dtype) -> Operands:
        """The same with features of another dtype."""
        return type(self)(*(features.to(dtype) for features in self[:3]), *self[3:])

    def rows(self, chosen: Tensor | slice) -> Operands:
        """The same with some anchors only."""
        return self._replace(
            anchors=self.anchors[chosen],
            positives=self.positives[chosen],
            anchor_labels=self.anchor_labels[chosen],
            active=self.active[chosen],
        )
