"""The operator as the paper writes it: dense, in any floating-point dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from cac_fast.backend.base import Backend
from cac_fast.checks import checked_labels
from cac_fast.operands import Operands


def dc_loss_rows(operands: Operands, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Makes tensors of A x M. Everything is in the anchors' dtype, as plain PyTorch would have it,
    and the loss converted at the end.
    """
    anchors, positives, negatives, *_, active, temperature = operands
    anchor_labels, negative_labels = checked_labels(operands, classes)
    admitted = (negative_labels >= 0) & (negative_labels != anchor_labels.unsqueeze(1))
    positive_logit = (anchors * positives).sum(1, keepdim=True) / temperature
    negative_logits = (anchors @ negatives.T / temperature).masked_fill(~admitted, -torch.inf)

    # -log(e^p / (e^p + sum e^n)) = log(1 + e^x) with x = log(sum e^n) - p: exact for a small loss.
    x = torch.logsumexp(negative_logits, dim=1) - positive_logit.squeeze(1)
    loss = torch.logaddexp(x, torch.zeros_like(x))
    weights = torch.softmax(torch.cat((positive_logit, negative_logits), dim=1), dim=1)[:, 1:]
    pull = weights.sum(1, keepdim=True)
    gradient = (weights @ negatives - pull * positives) / temperature
    return (
        loss.masked_fill(~active, 0.0).to(torch.promote_types(loss.dtype, torch.float32)),
        gradient.masked_fill(~active.unsqueeze(1), 0.0),
    )


BACKEND = Backend(dc_loss_rows)
