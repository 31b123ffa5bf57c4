"""As dc_loss.py, with the partial sums by the kernel whose warps have roles."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cac_fast import tiles
from cac_fast.kernels import configs, dc_loss, plan
from cac_fast.kernels.dc_loss_gluon_kernels import dc_loss_partial

# Rows of 128 bytes with their chunks of 16 exchanged, as the matrix unit reads them.
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


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
    """As `cac_fast.kernels.gluon.dc_loss_rows`."""
    count, dim = anchors.shape
    if count == 0 or len(negatives) == 0:
        return anchors.new_zeros(count, dtype=torch.float32), torch.zeros_like(anchors)
    padded = min(size for size in configs.GLUON if size >= dim)
    config = configs.GLUON[padded]
    programs = configs.describe(anchors.device).multiprocessors
    sizes = tiles.Sizes(config.tile, config.block, programs, padded)
    numbers = tiles.numbers(anchors.dtype, temperature)
    with torch.cuda.device_of(anchors):
        order, parts, sorted_negatives, _ = plan.prepare(
            anchors, negatives, anchor_labels, negative_labels, active, sizes, classes
        )
        count_tiles = len(parts.ends)
        sums = dc_loss.new_sums(anchors, (count_tiles + programs - 1) * config.tile, padded)
        dc_loss_partial[(programs,)](
            anchors,
            TensorDescriptor.from_tensor(sorted_negatives, [config.block, padded], _SWIZZLED),
            order.anchors,
            order.excluded_from,
            order.excluded_to,
            order.active,
            order.admissible,
            *parts,
            *sums,
            *anchors.stride(),
            count_tiles,
            numbers.scale,
            numbers.lowest,
            D=dim,
            D_PAD=padded,
            TILE=config.tile,
            BLOCK=config.block,
            OFFSET=numbers.offset_needed,
            HEADROOM=numbers.headroom,
            STAGES=config.stages,
            REGISTERS=config.registers,
            num_warps=4,
        )
        return dc_loss.combine(anchors, positives, order, parts, sums, numbers, config.tile, padded)
