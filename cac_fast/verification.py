"""Whether a back end is right on this machine: a small case against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cac_fast import reference
from cac_fast.checks import check_temperature
from cac_fast.dispatch import BACKENDS, choose_backend

# Rows of several tiles and blocks, the last of each not full.
_ANCHORS, _NEGATIVES, _CLASSES = 330, 2900, 21


@dataclass(frozen=True)
class Verification:
    """What `verify` found; errors are norms of differences by the norm of what is right.

    backend: its name. loss_error, gradient_error: how far it is off float64. plain_loss_error,
    plain_gradient_error: how far plain PyTorch is, dense and in the same dtype.
    """

    backend: str
    loss_error: float
    gradient_error: float
    plain_loss_error: float
    plain_gradient_error: float


@torch.no_grad()
def verify(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    dim: int = 128,
    temperature: float = 0.1,
) -> Verification:
    """Compare a back end with the reference in float64, on random features on ``device``.

    dtype: of the features. dim: D. temperature: tau. Takes milliseconds, and compiles what has to
    be compiled. Random states are left alone.

    Raises ValueError for bad choices, as the loss does, and RuntimeError, naming the back end,
    where it fails or is much further off than plain PyTorch.
    """
    check_temperature(temperature)
    given = _case(torch.device(device), dtype, dim)
    rows = choose_backend(backend, given[0])
    name = next(name for name, known in BACKENDS.items() if known.rows is rows)
    truth = reference.dc_loss_rows(
        *(tensor.double() if tensor.is_floating_point() else tensor for tensor in given),
        temperature,
    )
    plain = _errors(reference.dc_loss_rows(*given, temperature), truth)
    try:
        mine = _errors(rows(*given, temperature), truth)
    except Exception as error:  # a compiler or a driver may throw anything
        first = f"{error}".strip().partition("\n")[0]
        raise RuntimeError(
            f"back end {name!r} fails on {device} ({type(error).__name__}: {first})"
        ) from error
    for what, off, usual in zip(("loss", "gradient"), mine, plain, strict=True):
        # All are nearer than plain PyTorch, and one block left out is further off; so is NaN.
        if not off <= 2 * usual + 1e-5 / min(temperature, 1):
            raise RuntimeError(
                f"back end {name!r} is wrong on {device}: its {what} is {off:.1e} off float64, "
                f"that of plain PyTorch in {dtype} {usual:.1e}"
            )
    return Verification(name, *mine, *plain)


def _case(device: torch.device, dtype: torch.dtype, dim: int) -> tuple[Tensor, ...]:
    """Arguments of a back end but the temperature: clustered classes, one in half of all places."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(_CLASSES, dim, generator=generator)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(-_CLASSES, _CLASSES, (count,), generator=generator).clamp_min(0)
        features = centers[labels] + torch.randn(count, dim, generator=generator)
        return F.normalize(features, dim=1).to(dtype), labels

    anchors, anchor_labels = drawn(_ANCHORS)
    positives, _ = drawn(_ANCHORS)
    negatives, negative_labels = drawn(_NEGATIVES)
    negative_labels[::7] = -1
    active = torch.rand(_ANCHORS, generator=generator) < 0.5
    given = (anchors, positives, negatives, anchor_labels, negative_labels, active)
    return tuple(tensor.to(device) for tensor in given)


def _errors(mine: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    loss, gradient = (
        float((tensor.double() - right).norm() / right.norm())
        for tensor, right in zip(mine, truth, strict=True)
    )
    return loss, gradient
