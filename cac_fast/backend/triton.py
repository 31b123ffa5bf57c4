"""Triton (kernels/). It is imported on the first call: it is slow to import and may be absent."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cac_fast import tiles
from cac_fast.backend.base import Backend
from cac_fast.operands import Operands

_LARGEST_DIM = 256
_OLDEST_CAPABILITY = 8, 0
# Triton compiles its launchers at run time.
_COMPILER = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA or ROCm device"
    gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    if torch.version.hip is None and all(gpu < _OLDEST_CAPABILITY for gpu in gpus):
        return "needs a GPU of compute capability 8.0 or newer"
    if _COMPILER is None:
        return "needs a C compiler at run time: install gcc, or set CC"
    return None


def _needed_device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def refuses(anchors: Tensor) -> str | None:
    if anchors.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {anchors.dtype}"
    if anchors.shape[1] > _LARGEST_DIM:
        return f"it takes features of up to {_LARGEST_DIM} channels, not {anchors.shape[1]}"
    needed = _needed_device()
    if anchors.device.type != needed:
        return f"it takes tensors on a {needed} device, not on {anchors.device}"
    if needed == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(anchors.device)
        if capability < _OLDEST_CAPABILITY:
            return f"{anchors.device} has compute capability {capability}, it needs 8.0 or newer"
    return None


@cache
def preparation(device: torch.device) -> Callable[..., tiles.Prepared]:
    """`tiles.prepare` in two launches where Triton runs on such a device; else itself."""
    if unavailable() or device.type != _needed_device():
        return tiles.prepare
    from cac_fast.kernels import plan

    return plan.prepare


def dc_loss_rows(operands: Operands, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """On the current stream. float32 products are made in full unless
    `torch.backends.cuda.matmul` allows TF32.
    """
    from cac_fast.kernels import dc_loss

    return dc_loss.dc_loss_rows(operands, classes)


BACKEND = Backend(dc_loss_rows, unavailable, refuses)
