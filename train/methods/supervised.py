"""Supervised training: cross entropy on the labelled images alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast.train.distributed import World
from cac_fast.train.networks import Segmenter

Batch = dict[str, Tensor]


class Supervised(nn.Module):
    """Cross entropy of the upsampled logits, over the valid pixels of the whole global batch.

    ``forward(labeled, unlabeled)`` returns named scalars; ``"loss"`` is the one to minimise. It is
    scaled so that the mean of the gradients over ranks, which DDP takes, is the gradient of the
    global loss.
    """

    def __init__(self, network: Segmenter, world: World) -> None:
        super().__init__()
        self.network = network
        self.world = world

    def set_unlabeled(self, used: bool) -> None:
        """Say whether the coming steps use unlabelled images (no part of this method does)."""

    def supervised_loss(self, labeled: Batch) -> Tensor:
        """Cross entropy of ``image`` (B, 3, H, W) by ``label`` (B, H, W) uint8, 255 ignored."""
        labels = labeled["label"].long()
        logits = self.network(labeled["image"]).float()
        total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
        valid = self.world.all_reduce((labels != 255).sum()).clamp(min=1)
        return total * self.world.size / valid

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        loss = self.supervised_loss(labeled)
        return {"loss": loss, "loss_ce": loss.detach()}

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold beyond ``state_dict``."""
        return {}

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what :meth:`extra_state` gave."""
