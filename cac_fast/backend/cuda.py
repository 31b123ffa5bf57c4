"""CUDA C++ (csrc/cuda): the plan of tiles.py, and kernels; asked by name for those for sm_90a."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cac_fast import _extension, tiles
from cac_fast.backend import triton
from cac_fast.backend.base import Backend
from cac_fast.operands import Operands

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Other numbers of channels are padded to the next of these.
_KERNEL_CHANNELS = (64, 128, 256)


def unavailable(sm_90a: bool = False) -> str | None:
    if reason := _extension.unavailable("_C_cuda"):
        return reason
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    gpus = list(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if sm_90a:
        if (9, 0) not in gpus:
            return "needs a GPU of compute capability 9.0"
        if not any(arch.startswith("9.0a") for arch in _extension.cuda_archs()):
            return "is built without code for sm_90a: install again with TORCH_CUDA_ARCH_LIST=9.0"
    if all(gpu < (8, 0) for gpu in gpus):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def refuses(anchors: Tensor, sm_90a: bool = False) -> str | None:
    dtypes = _DTYPES[1:] if sm_90a else _DTYPES
    if anchors.device.type != "cuda":
        return f"it works on a CUDA device, not on {anchors.device}"
    if anchors.dtype not in dtypes:
        return f"it works on {', '.join(map(str, dtypes))}, not on {anchors.dtype}"
    if anchors.shape[1] > _KERNEL_CHANNELS[-1]:
        return f"it takes features of up to {_KERNEL_CHANNELS[-1]} channels, not {anchors.shape[1]}"
    capability = torch.cuda.get_device_capability(anchors.device)
    gpu = ".".join(map(str, capability))
    if sm_90a and capability != (9, 0):
        return f"it needs a GPU of compute capability 9.0, not {gpu}"
    archs = _extension.cuda_archs()
    if not runs_on(capability, archs):
        return (
            f"it is built for {', '.join(archs)}, and the GPU is {gpu}: install again with "
            f"TORCH_CUDA_ARCH_LIST={gpu}"
        )
    return None


def runs_on(capability: tuple[int, int], archs: tuple[str, ...]) -> bool:
    """Whether code for `archs`, as in TORCH_CUDA_ARCH_LIST, runs on a GPU of that capability.

    Binaries run on later GPUs of the same major capability, those of 9.0a on no other, and +PTX
    on all later ones. True for what is not a number (PyTorch knows some names of architectures).
    """
    for arch in archs:
        parts = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if parts is None:
            return True
        built = int(parts[1]), int(parts[2])
        if built == capability:
            return True
        same_major = built[0] == capability[0] or (parts[4] is not None and not parts[3])
        if parts[3] != "a" and same_major and built < capability:
            return True
    return False


@cache
def _sizes(
    device: torch.device, dtype: torch.dtype, padded: int, tf32: bool, sm_90a: bool
) -> tiles.Sizes:
    anchors = torch.empty(0, dtype=dtype, device=device)
    return tiles.Sizes(*_operators().dc_loss_sizes_cuda(anchors, padded, tf32, sm_90a), padded)


def dc_loss_rows(
    operands: Operands, classes: int | None = None, sm_90a: bool = False
) -> tuple[Tensor, Tensor]:
    """On the current stream. float32 products are made in full unless
    `torch.backends.cuda.matmul` allows TF32. The same bits on every run on one device.

    sm_90a: whether the kernels for sm_90a do it, which take bfloat16 and float16.
    """
    anchors, positives, negatives, *_, temperature = operands
    count, dim = anchors.shape
    if count == 0 or len(negatives) == 0:
        return anchors.new_zeros(count, dtype=torch.float32), anchors.new_zeros(count, dim)
    operators = _operators()
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    padded = next(size for size in _KERNEL_CHANNELS if size >= dim)
    sizes = _sizes(anchors.device, anchors.dtype, padded, tf32, sm_90a)
    with torch.cuda.device_of(anchors):
        order, plan, ordered_negatives, ordered_anchors = triton.preparation(anchors.device)(
            operands, sizes, classes, copy_anchors=True
        )
    return operators.dc_loss_rows_cuda(
        ordered_anchors,
        positives,
        ordered_negatives,
        *order[1:],
        *plan,
        *tiles.numbers(anchors.dtype, temperature),
        tf32,
        sm_90a,
    )


def _operators() -> Any:
    return torch.ops.cac_fast


BACKEND = Backend(dc_loss_rows, unavailable, refuses)
