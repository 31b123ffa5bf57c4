"""The one operator, its back ends and its autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cac_fast import eager, reference

Rows = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float],
    tuple[Tensor, Tensor],
]

# A back end, or the reason why there is none.
BACKENDS: dict[str, Rows | str] = {
    "reference": reference.dc_loss_rows,
    "eager": eager.dc_loss_rows,
    "cpp": "not built yet",
    "triton": "not built yet",
    "cuda": "not built yet",
}


def backends() -> dict[str, str | None]:
    """Every back end's name, with None where it can be used and else the reason why not."""
    return {name: rows if isinstance(rows, str) else None for name, rows in BACKENDS.items()}


def find_backend(name: str) -> Rows:
    """The function behind a name; "auto" is the fastest one there is.

    Raises ValueError for an unknown name or a back end that cannot be used.
    """
    rows = BACKENDS.get("eager" if name == "auto" else name)
    if rows is None:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, not {name!r}")
    if isinstance(rows, str):
        raise ValueError(f"backend {name!r} cannot be used: {rows}")
    return rows


def dc_loss_rows(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Directional contrastive loss of each anchor and its gradient (Eq. 5, without reduction).

    anchors, positives: (A, D), negatives: (M, D), unit norm, floating point; the work is done in
    the anchors' dtype. anchor_labels (A,), negative_labels (M,): integers; an anchor admits the
    negatives of other labels, none admits a negative whose label is below 0. active: (A,) bool.
    temperature: tau.

    Returns the loss (A,) and its gradient by the anchors (A, D); both are 0 in rows that are not
    active or admit no negative. Backward reaches the anchors alone, and only through the loss.
    """
    return _DCLossRows.apply(
        anchors,
        positives.detach(),
        negatives.detach(),
        anchor_labels,
        negative_labels,
        active,
        temperature,
        find_backend(backend),
    )


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast would compute the products in less than the dtype that was asked for."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class _DCLossRows(torch.autograd.Function):
    """Forward computes the gradient as well; backward only scales its rows."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        *arguments, rows = arguments
        with _without_autocast(anchors.device.type):
            loss, gradient = rows(anchors, *arguments)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(gradient)
        return loss, gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream.unsqueeze(1) * gradient, *(None,) * 7
