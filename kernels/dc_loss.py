"""From the operator's arguments to the two kernels, and nowhere a question to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cac_fast import tiles
from cac_fast.kernels import configs
from cac_fast.kernels import plan as plans
from cac_fast.kernels.dc_loss_kernels import dc_loss_combine, dc_loss_partial
from cac_fast.operands import Operands

_COMBINED_ROWS = 16


def dc_loss_rows(operands: Operands, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """As `cac_fast.backend.triton.dc_loss_rows`."""
    anchors = operands.anchors
    padded = max(16, triton.next_power_of_2(anchors.shape[1]))
    gpu = configs.describe(anchors.device)
    kind = configs.precision(anchors.dtype, gpu.family)
    config = configs.find(gpu.family, kind, padded)
    tma = gpu.family == "sm_90"
    return launch(
        dc_loss_partial,
        operands,
        classes,
        tiles.Sizes(config.tile, config.block, config.programs * gpu.multiprocessors, padded),
        TensorDescriptor.from_tensor if tma else lambda negatives, _: negatives,
        TMA=tma,
        PRECISION="ieee" if kind == "half" else kind,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def launch(
    partial: Any,
    operands: Operands,
    classes: int | None,
    sizes: tiles.Sizes,
    describe: Callable[[Tensor, list[int]], Any],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The plan, the kernel `partial` on its tiles, and the kernel that combines their sums.

    describe: from the ordered negatives and the shape of a block to what the kernel reads them by.
    options: further arguments of the kernel.
    """
    anchors, positives, negatives, *_, temperature = operands
    count, dim = anchors.shape
    if count == 0 or len(negatives) == 0:
        return anchors.new_zeros(count, dtype=torch.float32), torch.zeros_like(anchors)
    tile, block, programs, padded = sizes
    numbers = tiles.numbers(anchors.dtype, temperature)
    shared = {"D": dim, "D_PAD": padded, "TILE": tile, "OFFSET": numbers.offset_needed}
    with torch.cuda.device_of(anchors):
        order, plan, ordered_negatives, _ = plans.prepare(operands, sizes, classes)
        num_tiles = len(plan.ends)
        slots = (num_tiles + programs - 1) * tile
        sums = anchors.new_empty(slots * (padded + 2), dtype=torch.float32)
        weighted_total_offset = sums.split((slots * padded, slots, slots))
        partial[(programs,)](
            anchors,
            describe(ordered_negatives, [block, padded]),
            *order[1:],
            *plan,
            *weighted_total_offset,
            *anchors.stride(),
            num_tiles,
            numbers.scale,
            numbers.lowest,
            BLOCK=block,
            HEADROOM=numbers.headroom,
            **shared,
            **options,
        )
        loss = anchors.new_empty(count, dtype=torch.float32)
        gradient = anchors.new_empty((count, dim))
        dc_loss_combine[(num_tiles, tile // _COMBINED_ROWS)](
            anchors,
            positives,
            order.anchors,
            order.num_active,
            plan.ends,
            plan.share,
            *weighted_total_offset,
            loss,
            gradient,
            *anchors.stride(),
            *positives.stride(),
            count,
            numbers.scale,
            numbers.lowest,
            numbers.inverse_temperature,
            ROWS=_COMBINED_ROWS,
            **shared,
        )
    return loss, gradient
