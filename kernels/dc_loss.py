"""From the operator's arguments to the two kernels, and nowhere a question to the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cac_fast import tiles
from cac_fast.kernels import configs, plan
from cac_fast.kernels.dc_loss_kernels import dc_loss_combine, dc_loss_partial

_COMBINED_ROWS = 16


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
    """As `cac_fast.kernels.dc_loss_rows`."""
    count = len(anchors)
    if count == 0 or len(negatives) == 0:
        return anchors.new_zeros(count, dtype=torch.float32), torch.zeros_like(anchors)
    with torch.cuda.device_of(anchors):
        return _launch(
            anchors,
            positives,
            negatives,
            anchor_labels,
            negative_labels,
            active,
            temperature,
            classes,
        )


def _launch(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
    classes: int | None,
) -> tuple[Tensor, Tensor]:
    dim = anchors.shape[1]
    padded = max(16, triton.next_power_of_2(dim))
    gpu = configs.describe(anchors.device)
    kind = configs.precision(anchors.dtype, gpu.family)
    config = configs.find(gpu.family, kind, padded)
    programs = config.programs * gpu.multiprocessors
    tma = gpu.family == "sm_90"
    sizes = tiles.Sizes(config.tile, config.block, programs, padded)
    order, parts, sorted_negatives, _ = plan.prepare(
        anchors, negatives, anchor_labels, negative_labels, active, sizes, classes
    )

    count_tiles = len(parts.ends)
    sums = new_sums(anchors, (count_tiles + programs - 1) * config.tile, padded)
    numbers = tiles.numbers(anchors.dtype, temperature)
    dc_loss_partial[(programs,)](
        anchors,
        TensorDescriptor.from_tensor(sorted_negatives, [config.block, padded])
        if tma
        else sorted_negatives,
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
        TMA=tma,
        OFFSET=numbers.offset_needed,
        HEADROOM=numbers.headroom,
        PRECISION="ieee" if kind == "half" else kind,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return combine(anchors, positives, order, parts, sums, numbers, config.tile, padded)


class Sums(NamedTuple):
    """Of each slot's rows. weighted: (slots * padded,) float32. total, offset: (slots,) float32."""

    weighted: Tensor
    total: Tensor
    offset: Tensor


def new_sums(anchors: Tensor, slots: int, padded: int) -> Sums:
    """Where a kernel leaves its sums, not initialized."""
    sums = anchors.new_empty(slots * (padded + 2), dtype=torch.float32)
    return Sums(*sums.split((slots * padded, slots, slots)))


def combine(
    anchors: Tensor,
    positives: Tensor,
    order: tiles.LabelOrder,
    parts: tiles.Plan,
    sums: Sums,
    numbers: tiles.Numbers,
    tile: int,
    padded: int,
) -> tuple[Tensor, Tensor]:
    """Loss (A,) and gradient (A, D) from the sums of a plan's tiles."""
    count, dim = anchors.shape
    loss = anchors.new_empty(count, dtype=torch.float32)
    gradient = anchors.new_empty((count, dim))
    dc_loss_combine[(len(parts.ends), tile // _COMBINED_ROWS)](
        anchors,
        positives,
        order.anchors,
        order.active,
        parts.ends,
        parts.share,
        *sums,
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
        TILE=tile,
        ROWS=_COMBINED_ROWS,
        OFFSET=numbers.offset_needed,
    )
    return loss, gradient
