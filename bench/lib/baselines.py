"""The directional contrastive loss as others compute it: what the back ends are measured against.

Every baseline takes the arguments of a back end (see `cac_fast.ops.dc_loss_rows`) and returns the
same: loss (A,) in float32 (float64 for float64 features) and its gradient by the anchors (A, D) in
the features' dtype. Products are made in the features' dtype, all else in that of the loss, as
under autocast. Forward and backward are both inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

# Negatives of one chunk in the authors' code.
CHUNK = 8000


def _with_gradient(loss_of: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The loss of each row together with its gradient by autograd."""

    @wraps(loss_of)
    def loss_and_gradient(anchors: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        anchors = anchors.detach().requires_grad_()
        loss = loss_of(anchors, *rest)
        # Rows are independent, so the gradient of the sum holds that of each row.
        (gradient,) = torch.autograd.grad(loss.sum(), anchors)
        return loss.detach(), gradient

    return loss_and_gradient


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamic shapes, since the number of overlap locations changes with every step."""
    return torch.compile(function, dynamic=True)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _positive_logit(anchors: Tensor, positives: Tensor, temperature: float) -> Tensor:
    wide = _wide(anchors.dtype)
    return (anchors.to(wide) * positives.to(wide)).sum(1, keepdim=True) / temperature


def _logits(anchors: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    return (anchors @ negatives.T).to(_wide(anchors.dtype)) / temperature


def _admitted(anchor_labels: Tensor, negative_labels: Tensor) -> Tensor:
    return (negative_labels >= 0) & (negative_labels != anchor_labels.unsqueeze(1))


@_with_gradient
def dense(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
) -> Tensor:
    """Eq. 5 with autograd: all A x M logits at once, kept for the backward pass."""
    positive = _positive_logit(anchors, positives, temperature).squeeze(1)
    logits = (anchors @ negatives.T).to(_wide(anchors.dtype))
    # In place, as one who writes it with care would: backward needs but one such matrix.
    logits.div_(temperature).masked_fill_(~_admitted(anchor_labels, negative_labels), -torch.inf)
    loss = torch.logaddexp(positive, logits.logsumexp(1)) - positive
    return loss * active


def compiled(anchors: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`dense` through torch.compile, which fuses what lies between the products."""
    return _with_gradient(_compile(dense.__wrapped__))(anchors, *rest)


@_with_gradient
def chunked(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
) -> Tensor:
    """The algorithm of the paper's authors, for one direction; the other is a second such call.

    The negatives come in chunks of 8,000, and each chunk is checkpointed, so that its A x 8,000
    logits are computed again in the backward pass. The offset of the exponentials is the largest
    logit of the positive and of the first chunk. Inactive anchors are computed like all others and
    multiplied by 0 at the end. Left out are their two terms of 1e-8, which change the loss (it
    saturates near 18.4) and not what it costs.
    """
    positive = _positive_logit(anchors, positives, temperature)
    chunks = list(zip(negatives.split(CHUNK), negative_labels.split(CHUNK), strict=True))
    again = partial(checkpoint, use_reentrant=False)
    total, offset = again(_first_sum, anchors, positive, *chunks[0], anchor_labels, temperature)
    for chunk in chunks[1:]:
        total = total + again(_next_sum, anchors, offset, *chunk, anchor_labels, temperature)
    pair = (positive - offset).squeeze(1).exp()
    return -(pair / (pair + total)).log() * active


def _first_sum(
    anchors: Tensor,
    positive: Tensor,
    part: Tensor,
    labels: Tensor,
    anchor_labels: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    logits = _logits(anchors, part, temperature)
    offset = torch.cat((positive, logits), dim=1).detach().amax(1, keepdim=True)
    return ((logits - offset).exp() * _admitted(anchor_labels, labels)).sum(1), offset


def _next_sum(
    anchors: Tensor,
    offset: Tensor,
    part: Tensor,
    labels: Tensor,
    anchor_labels: Tensor,
    temperature: float,
) -> Tensor:
    logits = _logits(anchors, part, temperature)
    return ((logits - offset).exp() * _admitted(anchor_labels, labels)).sum(1)


def flex(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The active anchors attend to the negatives: K = V = N, scale 1/tau, a mask of labels.

    The output is the weighted mean of the negatives, lse the log of the sum of their e^{a.n/tau}.
    They give loss and gradient without a backward pass: x = lse - a.p/tau, loss = log(1 + e^x),
    gradient = sigmoid(x)/tau (mean - p). Both sides are sorted by label, so that the block mask,
    made anew in every step as the labels are, leaves out blocks of one label. Compiled on CUDA.
    """
    loss = anchors.new_zeros(len(anchors), dtype=_wide(anchors.dtype))
    gradient = torch.zeros_like(anchors)
    rows = active.nonzero().squeeze(1)
    if len(rows) == 0 or len(negatives) == 0:
        return loss, gradient
    labels, order = anchor_labels[rows].sort()
    rows = rows[order]
    negative_labels, order = negative_labels.sort()

    def admits(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (negative_labels[column] >= 0) & (negative_labels[column] != labels[row])

    attend, make_mask = flex_attention, create_block_mask
    if anchors.is_cuda:
        attend, make_mask = _compile(attend), _compile(make_mask)
    mask = make_mask(admits, None, None, len(rows), len(order), device=anchors.device)
    queries, keys = anchors[rows], negatives[order][None, None]
    mean, sums = attend(
        queries[None, None],
        keys,
        keys,
        block_mask=mask,
        scale=1 / temperature,
        return_aux=AuxRequest(lse=True),
    )
    x = sums.lse[0, 0] - _positive_logit(queries, positives[rows], temperature).squeeze(1)
    loss[rows] = torch.logaddexp(x, torch.zeros_like(x)).to(loss.dtype)
    pull = (x.sigmoid() / temperature).unsqueeze(1)
    difference = mean[0, 0].to(pull.dtype) - positives[rows]
    gradient[rows] = (pull * difference).to(gradient.dtype)
    return loss, gradient
