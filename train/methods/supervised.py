"""Supervised training: cross entropy on the labeled images alone."""

from __future__ import annotations

from cac_fast.train.methods.base import Batch, Method


class Supervised(Method):
    """`L = L_ce` of the upsampled logits."""

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        loss = self.supervised_loss(labeled)
        return {"loss": loss, "loss_ce": loss.detach()}
