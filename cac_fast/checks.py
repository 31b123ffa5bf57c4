"""Argument checks of the loss; each raises a ValueError that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cac_fast.operands import Operands
from cac_fast.overlap import Overlap


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_classes(classes: int | None) -> None:
    if classes is not None and classes < 1:
        raise ValueError(f"classes must be at least 1, not {classes}")


def checked_labels(operands: Operands, classes: int | None) -> tuple[Tensor, Tensor]:
    """The labels of both sides in int64; asks the device whether they lie below `classes`."""
    both = operands.anchor_labels.long(), operands.negative_labels.long()
    if classes is not None:
        for name, labels in zip(("anchor_labels", "negative_labels"), both, strict=True):
            if labels.numel() > 0 and (largest := int(labels.max())) >= classes:
                raise ValueError(f"{name} must lie below classes, {classes}, and one is {largest}")
    return both


# A float32 cosine is right to 6e-8 at best, so that here logits are right to 0.06; much below,
# weights would differ from the true ones by more than a float32 can hold.
_LOWEST_TEMPERATURE = 1e-6


def check_temperature(temperature: float) -> None:
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise ValueError(
            "temperature must not require grad, as no gradient reaches it: pass float(temperature)"
        )
    if not _LOWEST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature must be a number of at least {_LOWEST_TEMPERATURE}, not {temperature}"
        )


def check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], not {threshold}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")


def check_kind(name: str, tensor: Tensor, kind: str) -> None:
    """kind: "floating point", "integers" or "bool"."""
    dtype = tensor.dtype
    if dtype.is_floating_point:
        found = "floating point"
    elif dtype.is_complex:
        found = "complex"
    else:
        found = "bool" if dtype == torch.bool else "integers"
    if found != kind:
        raise ValueError(f"{name} must be {kind}, not {dtype}")


def check_rows(
    name: str, tensor: Tensor, shape: tuple[int, ...], kind: str, device: torch.device
) -> None:
    check_shape(name, tensor, shape)
    check_kind(name, tensor, kind)
    if tensor.device != device:
        raise ValueError(f"{name} must be on the anchors' device {device}, not {tensor.device}")


def check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{name} must not require grad, as no gradient reaches them: pass {name}.detach()"
        )


def check_features(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
) -> None:
    if anchors.ndim != 2:
        raise ValueError(f"anchors must have shape (A, D), not {tuple(anchors.shape)}")
    (a, d), device = anchors.shape, anchors.device
    if negatives.ndim != 2 or negatives.shape[1] != d:
        raise ValueError(f"negatives must have shape (M, {d}), not {tuple(negatives.shape)}")
    m = negatives.shape[0]
    for name, tensor, shape, kind in (
        ("anchors", anchors, (a, d), "floating point"),
        ("positives", positives, (a, d), "floating point"),
        ("negatives", negatives, (m, d), "floating point"),
        ("anchor_labels", anchor_labels, (a,), "integers"),
        ("negative_labels", negative_labels, (m,), "integers"),
    ):
        check_rows(name, tensor, shape, kind, device)


def check_operands(operands: Operands) -> None:
    check_features(*operands[:5])
    anchors = operands.anchors
    check_rows("active", operands.active, anchors.shape[:1], "bool", anchors.device)
    check_temperature(operands.temperature)


def check_views(
    features1: Tensor,
    features2: Tensor,
    logits1: Tensor,
    logits2: Tensor,
    overlap: Overlap,
    truth: tuple[Tensor, Tensor] | None,
) -> None:
    if features1.ndim != 4:
        raise ValueError(f"features1 must have shape (B, D, h, w), not {tuple(features1.shape)}")
    batch, _, h, w = features1.shape
    if logits1.ndim != 4:
        raise ValueError(f"logits1 must have shape (B, K, h, w), not {tuple(logits1.shape)}")
    of_logits = (batch, logits1.shape[1], h, w)
    for name, tensor, shape in (
        ("features1", features1, features1.shape),
        ("features2", features2, features1.shape),
        ("logits1", logits1, of_logits),
        ("logits2", logits2, of_logits),
    ):
        check_shape(name, tensor, shape)
        check_kind(name, tensor, "floating point")
    for name in ("partner1", "partner2", "valid1", "valid2"):
        check_shape(f"overlap.{name}", getattr(overlap, name), (batch, h * w))
    for number, labels in enumerate(truth or (), start=1):
        check_shape(f"truth{number}", labels, (batch, h, w))
        check_kind(f"truth{number}", labels, "integers")
