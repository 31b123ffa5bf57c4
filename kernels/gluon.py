"""The Triton back end's path for compute capability 9.0, written in Gluon: by name only.

Triton, and Gluon with it, is imported on the first call, not with the package.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from cac_fast import kernels

NEEDED = 9, 0
"""Compute capability."""


def why_not() -> str | None:
    """Why this back end cannot be used here, or None if it can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Gluon has no interpreter: unset TRITON_INTERPRET"
    gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    if torch.version.hip is not None or all(gpu != NEEDED for gpu in gpus):
        return "needs a GPU of compute capability 9.0"
    if missing := kernels.why_not():
        return missing
    if not _has_gluon():
        return "needs Triton 3.6 or newer, which has Gluon"
    return None


def refuses(anchors: Tensor) -> str | None:
    """Why these anchors (A, D) cannot be worked on, or None."""
    if anchors.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {anchors.dtype}: use 'triton'"
    if refusal := kernels.refuses(anchors):
        return refusal
    capability = torch.cuda.get_device_capability(anchors.device)
    if torch.version.hip is not None or capability != NEEDED:
        return f"{anchors.device} has compute capability {capability}, it needs 9.0"
    return None


def dc_loss_rows(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
    classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (A,) and its gradient by the anchors (A, D), Eq. 5, on the current stream.

    Arguments as for `cac_fast.ops.dc_loss_rows`, none that `refuses`. The loss is float32, the
    gradient has the anchors' dtype.
    """
    from cac_fast.kernels import dc_loss_gluon

    return dc_loss_gluon.dc_loss_rows(
        anchors, positives, negatives, anchor_labels, negative_labels, active, temperature, classes
    )


def _has_gluon() -> bool:
    """Without importing it."""
    folder = Path(importlib.util.find_spec("triton").origin).parent
    return (folder / "experimental/gluon/language/nvidia/hopper").is_dir()
