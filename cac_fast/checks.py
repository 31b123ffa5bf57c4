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


def check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, not {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")


def check_integers(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, not {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
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
    check_shape("positives", positives, tuple(anchors.shape))
    if negatives.ndim != 2 or negatives.shape[1] != anchors.shape[1]:
        raise ValueError(
            f"negatives must have shape (M, {anchors.shape[1]}), not {tuple(negatives.shape)}"
        )
    for name, tensor in (("anchors", anchors), ("positives", positives), ("negatives", negatives)):
        check_float(name, tensor)
        check_device(name, tensor, anchors.device)
    for name, tensor, rows in (
        ("anchor_labels", anchor_labels, anchors.shape[0]),
        ("negative_labels", negative_labels, negatives.shape[0]),
    ):
        check_shape(name, tensor, (rows,))
        check_integers(name, tensor)
        check_device(name, tensor, anchors.device)


def check_operands(operands: Operands) -> None:
    *features_and_labels, active, temperature = operands
    check_features(*features_and_labels)
    check_shape("active", active, (operands.anchors.shape[0],))
    if active.dtype != torch.bool:
        raise ValueError(f"active must be bool, not {active.dtype}")
    check_device("active", active, operands.anchors.device)
    check_temperature(temperature)


def check_rows(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    anchor_confidence: Tensor,
    positive_confidence: Tensor,
) -> None:
    check_features(anchors, positives, negatives, anchor_labels, negative_labels)
    for name, tensor in (
        ("anchor_confidence", anchor_confidence),
        ("positive_confidence", positive_confidence),
    ):
        check_shape(name, tensor, (anchors.shape[0],))
        check_float(name, tensor)
        check_device(name, tensor, anchors.device)
    check_constant("negatives", negatives)


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
    check_shape("features2", features2, tuple(features1.shape))
    if logits1.ndim != 4:
        raise ValueError(f"logits1 must have shape (B, K, h, w), not {tuple(logits1.shape)}")
    check_shape("logits1", logits1, (batch, logits1.shape[1], h, w))
    check_shape("logits2", logits2, tuple(logits1.shape))
    for name, tensor in (
        ("features1", features1),
        ("features2", features2),
        ("logits1", logits1),
        ("logits2", logits2),
    ):
        check_float(name, tensor)
    for name in ("partner1", "partner2", "valid1", "valid2"):
        check_shape(f"overlap.{name}", getattr(overlap, name), (batch, h * w))
    for number, labels in enumerate(truth or (), start=1):
        check_shape(f"truth{number}", labels, (batch, h, w))
        check_integers(f"truth{number}", labels)
