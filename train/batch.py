"""What one iteration gets from the loaders and hands to the method."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Batch = dict[str, Tensor]
"""Tensors by name, the images of the batch along dim 0 of each."""


class Step(NamedTuple):
    """Batches on the device and the seconds the iteration waited for them."""

    labeled: Batch
    unlabeled: Batch | None
    waited: float

    @property
    def images(self) -> int:
        """Labeled and unlabeled images, however many views an image has."""
        batches = (batch for batch in (self.labeled, self.unlabeled) if batch is not None)
        return sum(len(next(iter(batch.values()))) for batch in batches)
