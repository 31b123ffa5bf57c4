"""As dc_loss.py, with the partial sums by the kernel whose warps have roles."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cac_fast import tiles
from cac_fast.kernels import configs
from cac_fast.kernels.dc_loss_gluon_kernels import dc_loss_partial
from cac_fast.kernels.dc_loss_kernels import dc_loss_combine

_COMBINED_ROWS = 16
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
) -> tuple[Tensor, Tensor]:
    """As `cac_fast.kernels.gluon.dc_loss_rows`."""
    count = len(anchors)
    if count == 0 or len(negatives) == 0:
        return anchors.new_zeros(count, dtype=torch.float32), torch.zeros_like(anchors)
    with torch.cuda.device_of(anchors):
        return _launch(
            anchors, positives, negatives, anchor_labels, negative_labels, active, temperature
        )


def _launch(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    count, dim = anchors.shape
    padded = min(size for size in configs.GLUON if size >= dim)
    config = configs.GLUON[padded]
    programs = configs.describe(anchors.device).multiprocessors
    order = tiles.order_by_label(anchor_labels, negative_labels, active)
    plan = tiles.plan(order, config.tile, config.block, programs)
    sorted_negatives = tiles.gather(negatives, order.negatives, config.block, padded)

    count_tiles = len(plan.ends)
    slots = (count_tiles + programs - 1) * config.tile
    weighted = anchors.new_empty((slots, padded), dtype=torch.float32)
    total = anchors.new_empty(slots, dtype=torch.float32)
    offset = torch.empty_like(total)
    loss = anchors.new_empty(count, dtype=torch.float32)
    gradient = anchors.new_empty((count, dim))

    numbers = tiles.numbers(anchors.dtype, temperature)
    dc_loss_partial[(programs,)](
        anchors,
        TensorDescriptor.from_tensor(sorted_negatives, [config.block, padded], _SWIZZLED),
        order.anchors,
        order.excluded_from,
        order.excluded_to,
        order.active,
        order.admissible,
        *plan,
        weighted,
        total,
        offset,
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
    dc_loss_combine[(count_tiles, config.tile // _COMBINED_ROWS)](
        anchors,
        positives,
        order.anchors,
        order.active,
        plan.ends,
        plan.share,
        weighted,
        total,
        offset,
        loss,
        gradient,
        *anchors.stride(),
        *positives.stride(),
        count,
        numbers.scale,
        numbers.lowest,
        numbers.inverse_temperature,
        D=dim,
        D_PAD=padded,
        TILE=config.tile,
        ROWS=_COMBINED_ROWS,
        OFFSET=numbers.offset_needed,
    )
    return loss, gradient
