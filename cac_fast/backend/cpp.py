"""C++ on the CPU (csrc)."""

from __future__ import annotations

import torch
from torch import Tensor

from cac_fast import _extension
from cac_fast.backend.base import Backend
from cac_fast.checks import checked_labels
from cac_fast.operands import Operands

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuses(anchors: Tensor) -> str | None:
    if anchors.device.type != "cpu":
        return f"it works on the CPU, not on {anchors.device}"
    if anchors.dtype not in _DTYPES:
        return f"it works on {', '.join(map(str, _DTYPES))}, not on {anchors.dtype}"
    return None


def dc_loss_rows(operands: Operands, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Sums in float32 (float64 for float64 features), and takes products of float32 values, or of
    bfloat16 ones where the CPU has units for them (Intel's AVX-512 BF16 and AMX). Beyond one
    ordered copy of the admitted negatives (with those units two, of bfloat16) it needs the memory
    of a tile or two per thread. The same bits on every run and for every number of threads.
    """
    labels = checked_labels(operands, classes)
    return torch.ops.cac_fast.dc_loss_rows_cpp(
        *operands[:3], *labels, *operands[5:], _extension.bfloat16_units()
    )


BACKEND = Backend(dc_loss_rows, _extension.unavailable, refuses)
