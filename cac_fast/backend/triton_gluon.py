"""The Triton back end's path for compute capability 9.0, written in Gluon (kernels/)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from cac_fast.backend import triton
from cac_fast.backend.base import Backend
from cac_fast.operands import Operands

_NEEDED_CAPABILITY = 9, 0


def unavailable() -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Gluon has no interpreter: unset TRITON_INTERPRET"
    gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    if torch.version.hip is not None or all(gpu != _NEEDED_CAPABILITY for gpu in gpus):
        return "needs a GPU of compute capability 9.0"
    if reason := triton.unavailable():
        return reason
    if not _has_gluon():
        return "needs Triton 3.6 or newer, which has Gluon"
    return None


def refuses(anchors: Tensor) -> str | None:
    if anchors.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {anchors.dtype}: use 'triton'"
    if refusal := triton.refuses(anchors):
        return refusal
    capability = torch.cuda.get_device_capability(anchors.device)
    if torch.version.hip is not None or capability != _NEEDED_CAPABILITY:
        return f"{anchors.device} has compute capability {capability}, it needs 9.0"
    return None


def dc_loss_rows(operands: Operands, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """On the current stream."""
    from cac_fast.kernels import dc_loss_gluon

    return dc_loss_gluon.dc_loss_rows(operands, classes)


def _has_gluon() -> bool:
    """Without importing it."""
    folder = Path(importlib.util.find_spec("triton").origin).parent
    return (folder / "experimental/gluon/language/nvidia/hopper").is_dir()


BACKEND = Backend(dc_loss_rows, unavailable, refuses)
