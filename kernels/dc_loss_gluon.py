"""As dc_loss.py, with the partial sums by the kernel whose warps have roles."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cac_fast import tiles
from cac_fast.kernels import configs, dc_loss
from cac_fast.kernels.dc_loss_gluon_kernels import dc_loss_partial
from cac_fast.operands import Operands

# Rows of 128 bytes with their chunks of 16 exchanged, as the matrix unit reads them.
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def dc_loss_rows(operands: Operands, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """As `cac_fast.backend.triton_gluon.dc_loss_rows`."""
    anchors = operands.anchors
    padded = min(size for size in configs.GLUON if size >= anchors.shape[1])
    config = configs.GLUON[padded]
    programs = configs.describe(anchors.device).multiprocessors
    return dc_loss.launch(
        dc_loss_partial,
        operands,
        classes,
        tiles.Sizes(config.tile, config.block, programs, padded),
        partial(TensorDescriptor.from_tensor, layout=_SWIZZLED),
        STAGES=config.stages,
        REGISTERS=config.registers,
        num_warps=4,
    )
