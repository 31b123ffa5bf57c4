"""Embedded street scenes: does a network look at an object, or only at what is around it?

The few labeled scenes have a context that misleads, and one light; the unlabeled ones, val and test
have neither.
"""

from cac_fast.train.data.toycity.classes import CLASSES, PALETTE
from cac_fast.train.data.toycity.dataset import ensure

__all__ = ["CLASSES", "PALETTE", "ensure"]
