"""The CUDA C++ back end by its kernels for sm_90a (csrc/cuda/sm90)."""

from __future__ import annotations

from functools import partial

from cac_fast.backend import cuda
from cac_fast.backend.base import Backend

BACKEND = Backend(
    *(partial(f, sm_90a=True) for f in (cuda.dc_loss_rows, cuda.unavailable, cuda.refuses))
)
