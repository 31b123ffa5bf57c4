"""Whether a back end is right on this machine: a case of its own against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cac_fast.backend import BACKENDS, reference
from cac_fast.checks import check_operands
from cac_fast.operands import Operands

# Anchors and negatives. Enough anchors that every program of a large GPU meets several blocks, and
# few enough negatives that one block of them counts.
THOROUGH = {"cpu": (600, 2900), "cuda": (20_000, 2900)}
# For the first use of a loss, which should hardly be noticed.
QUICK = {"cpu": (200, 700), "cuda": (4000, 2900)}
_CLASSES = 21
_DENSE_ANCHORS_AT_A_TIME = 500


class VerificationError(RuntimeError):
    """A back end fails on this machine, or is wrong: one line.

    >>> raise VerificationError("back end 'cpp' fails on cpu (MemoryError: no room)")
    Traceback (most recent call last):
    cac_fast.verification.VerificationError: back end 'cpp' fails on cpu (MemoryError: no room)
    """


@dataclass(frozen=True)
class Verification:
    """What was found: the largest errors of any row, relative to the norm of what is right.

    backend: its name.
    loss_error, gradient_error: how far it is off float64.
    plain_loss_error, plain_gradient_error: how far plain PyTorch is, dense and in the same dtype.

    >>> Verification("cpp", 1e-7, 2e-7, 1e-7, 3e-7).backend
    'cpp'
    """

    backend: str
    loss_error: float
    gradient_error: float
    plain_loss_error: float
    plain_gradient_error: float


@torch.no_grad()
def compare(name: str, operands: Operands) -> Verification:
    """Compare a back end with the reference in float64.

    Raises:
        VerificationError: the back end, which it names, fails or is further off in some row than
            rounding explains, or the comparison itself fails.
    """
    device, dtype = operands.anchors.device, operands.anchors.dtype
    with torch.autocast(device.type, enabled=False):
        verb = "cannot be compared with float64"
        try:
            truth = _dense(operands.to(torch.float64))
            plain = _errors(_dense(operands), truth)
            verb = "fails"
            mine = _errors(BACKENDS[name].load().rows(operands), truth)
        except Exception as error:  # a compiler or a driver may throw anything
            first = f"{error}".strip().partition("\n")[0]
            raise VerificationError(
                f"back end {name!r} {verb} on {device} ({type(error).__name__}: {first})"
            ) from error
    # Products of 16-bit features are exact, so that the loss is as good as in float32, and the
    # gradient is rounded at the end (where 16-bit units multiply also the weights before); in plain
    # PyTorch logits are too.
    if dtype.itemsize == 2 and name != "reference":
        rounding = (0, torch.finfo(dtype).eps)
    else:  # TF32 included, where PyTorch takes it as well
        rounding = tuple(2 * error for error in plain)
    # Ten times what float32 costs: of a logit, some 1e-7/tau.
    bounds = (rounding[0] + 1e-5, rounding[1] + 2e-6 / min(operands.temperature, 1))
    for what, off, usual, bound in zip(("loss", "gradient"), mine, plain, bounds, strict=True):
        if not off <= bound:  # nor is NaN
            raise VerificationError(
                f"back end {name!r} is wrong on {device}: its {what} is {off:.1e} off float64, "
                f"that of plain PyTorch in {dtype} {usual:.1e}"
            )
    return Verification(name, *mine, *plain)


def make_case(
    sizes: dict[str, tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    temperature: float,
) -> Operands:
    """Clustered classes, one in half of all places.

    sizes: `THOROUGH` or `QUICK`. Random states are left alone.

    Raises:
        ValueError: a bad dtype, D or temperature.
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, not {dim}")
    anchor_count, negative_count = sizes.get(device.type, sizes["cpu"])
    # The device is named, as the caller's default may be another.
    own = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
    centers = torch.randn(_CLASSES, dim, **own)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(-_CLASSES, _CLASSES, (count,), **own).clamp_min(0)
        features = centers[labels] + torch.randn(count, dim, **own)
        return F.normalize(features, dim=1).to(dtype), labels

    anchors, anchor_labels = drawn(anchor_count)
    positives, _ = drawn(anchor_count)
    negatives, negative_labels = drawn(negative_count)
    negative_labels[::7] = -1
    active = torch.rand(anchor_count, **own) < 0.5
    tensors = (anchors, positives, negatives, anchor_labels, negative_labels, active)
    operands = Operands(*(tensor.to(device) for tensor in tensors), temperature)
    check_operands(operands)
    return operands


def _dense(operands: Operands) -> tuple[Tensor, Tensor]:
    """The reference, a slice of the anchors at a time."""
    step = _DENSE_ANCHORS_AT_A_TIME
    parts = [
        reference.dc_loss_rows(operands.rows(slice(begin, begin + step)))
        for begin in range(0, len(operands.anchors), step)
    ]
    loss, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
    return loss, gradient


def _errors(mine: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of loss and gradient, the largest error of a row relative to its norm.

    A norm counts as at least a hundredth of the usual one, as that of a row with hardly anything to
    learn may be too small for a float32.
    """
    loss, gradient = (
        float((_norms(tensor.double() - right) / _floored(_norms(right))).max())
        for tensor, right in zip(mine, truth, strict=True)
    )
    return loss, gradient


def _norms(rows: Tensor) -> Tensor:
    return rows.view(len(rows), -1).norm(dim=1)


def _floored(norms: Tensor) -> Tensor:
    return norms.clamp_min(0.01 * float(norms.square().mean().sqrt()))
