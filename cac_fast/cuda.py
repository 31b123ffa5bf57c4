"""The CUDA C++ back end (csrc/cuda): the plan of tiles.py, and its kernels."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cac_fast import _extension, kernels, tiles

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SM_90A_DTYPES = _DTYPES[1:]
# What there are kernels for; other numbers of channels are padded to the next.
_PADDED = (64, 128, 256)


def why_not(sm_90a: bool = False) -> str | None:
    """Why this back end cannot be used here, or None if it can; its path for sm_90a, if asked."""
    if reason := _extension.why_not("_C_cuda"):
        return reason
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    gpus = list(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if sm_90a:
        if (9, 0) not in gpus:
            return "needs a GPU of compute capability 9.0"
        if not _has_sm_90a():
            return "is built without code for sm_90a: install again with TORCH_CUDA_ARCH_LIST=9.0"
    if all(gpu < (8, 0) for gpu in gpus):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def refuses(anchors: Tensor, sm_90a: bool = False) -> str | None:
    """Why these anchors (A, D) cannot be worked on, or None; on the path for sm_90a, if asked."""
    dtypes = _SM_90A_DTYPES if sm_90a else _DTYPES
    if anchors.device.type != "cuda":
        return f"it works on a CUDA device, not on {anchors.device}"
    if anchors.dtype not in dtypes:
        return f"it works on {', '.join(map(str, dtypes))}, not on {anchors.dtype}"
    if anchors.shape[1] > _PADDED[-1]:
        return f"it takes features of up to {_PADDED[-1]} channels, not {anchors.shape[1]}"
    capability = torch.cuda.get_device_capability(anchors.device)
    if sm_90a and capability != (9, 0):
        return "it needs a GPU of compute capability 9.0, not " + ".".join(map(str, capability))
    archs = _extension.cuda_archs()
    if not runs_on(capability, archs):
        gpu = ".".join(map(str, capability))
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


def _has_sm_90a() -> bool:
    return any(arch.startswith("9.0a") for arch in _extension.cuda_archs())


def dc_loss_rows(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
    classes: int | None = None,
    sm_90a: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss (A,) and its gradient by the anchors (A, D), Eq. 5, on the current stream.

    Arguments as `cac_fast.ops` hands them to a back end, if `refuses` has nothing against them.
    The loss is float32, the gradient has the anchors' dtype. float32 products are made in full
    unless `torch.backends.cuda.matmul` allows TF32. The same bits on every run on one device.
    sm_90a: whether the kernels for sm_90a do it, which take bfloat16 and float16.
    """
    count, dim = anchors.shape
    if count == 0 or len(negatives) == 0:
        return anchors.new_zeros(count, dtype=torch.float32), anchors.new_zeros(count, dim)
    operators = _operators()
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    padded = next(size for size in _PADDED if size >= dim)
    sizes = _sizes(anchors.device, anchors.dtype, padded, tf32, sm_90a)
    with torch.cuda.device_of(anchors):
        order, plan, ordered_negatives, ordered_anchors = kernels.preparation(anchors.device)(
            anchors,
            negatives,
            anchor_labels,
            negative_labels,
            active,
            sizes,
            classes,
            copy_anchors=True,
        )
    return operators.dc_loss_rows_cuda(
        ordered_anchors,
        positives,
        ordered_negatives,
        order.anchors,
        order.excluded_from,
        order.excluded_to,
        order.active,
        order.admissible,
        *plan,
        *tiles.numbers(anchors.dtype, temperature),
        tf32,
        sm_90a,
    )


def _operators() -> Any:
    return torch.ops.cac_fast
