"""The plan of `cac_fast.tiles` in two sorts and two launches."""

from __future__ import annotations

from functools import lru_cache

import torch
from triton import cdiv

from cac_fast import tiles
from cac_fast.kernels.plan_kernels import dc_loss_keys, dc_loss_plan
from cac_fast.operands import Operands

_KEYS_PER_PROGRAM = 1024
_SEARCHES_AT_A_TIME = 128
_COPIED_ELEMENTS_PER_PROGRAM = 4096


@lru_cache(maxsize=64)
def _lay_out(
    count: int, others: int, sizes: tiles.Sizes, copy_anchors: bool
) -> tuple[int, int, tuple[int, ...], int, int]:
    """What follows from shapes alone: tiles of anchors, rows of the negatives' copy, lengths of the
    parts of the workspace, programs of the two launches."""
    num_tiles = cdiv(count, sizes.tile)
    rows = cdiv(others, sizes.block) * sizes.block
    # Where a part does not begin at a multiple of 16 bytes, Triton compiles the kernels again: none
    # depends on the number of anchors.
    fixed = sizes.programs, sizes.programs, 1, 1
    parts = (*fixed, -sum(fixed) % 4, 4 * num_tiles, count, -count % 4, count)
    copied = _COPIED_ELEMENTS_PER_PROGRAM // sizes.padded
    programs = 1 + cdiv(count, _SEARCHES_AT_A_TIME) + cdiv(rows, copied)
    if copy_anchors:
        programs += cdiv(num_tiles * sizes.tile, copied)
    return num_tiles, rows, parts, cdiv(count + others, _KEYS_PER_PROGRAM), programs


def prepare(
    operands: Operands,
    sizes: tiles.Sizes,
    classes: int | None = None,
    copy_anchors: bool = False,
) -> tiles.Prepared:
    """As `tiles.prepare`, to the last bit; on the current stream of the current device.

    A view costs a call, so `num_active` and `num_admissible` are (1,) here, and `borders` is flat.
    """
    anchors, _, negatives, anchor_labels, negative_labels, active, _ = operands
    count, dim = anchors.shape
    others = len(negatives)
    num_tiles, rows, parts, key_programs, programs = _lay_out(count, others, sizes, copy_anchors)
    key_dtype = tiles.key_dtype(anchor_labels.dtype, negative_labels.dtype, classes)
    bits = key_dtype.itemsize * 8

    keys = active.new_empty(count + others, dtype=key_dtype)
    dc_loss_keys[(key_programs,)](
        anchor_labels,
        negative_labels,
        active,
        keys,
        anchor_labels.stride(0),
        negative_labels.stride(0),
        active.stride(0),
        count,
        others,
        BITS=bits,
        CHUNK=_KEYS_PER_PROGRAM,
    )
    anchor_keys, negative_keys = keys.split((count, others))
    anchor_keys, anchor_order = anchor_keys.sort(stable=True)
    negative_keys, negative_order = negative_keys.sort(stable=True)

    numbers = active.new_empty(sum(parts), dtype=torch.int32)
    first_tile, last_tile, *counts, _, borders, excluded_from, _, excluded_to = numbers.split(parts)
    ends = active.new_empty(num_tiles, dtype=torch.int64)
    share = active.new_empty((), dtype=torch.int64)
    padded = sizes.padded
    ordered_negatives = negatives.new_empty((rows, padded))
    ordered_anchors = anchors.new_empty((num_tiles * sizes.tile, padded)) if copy_anchors else None
    dc_loss_plan[(programs,)](
        anchor_keys,
        negative_keys,
        anchor_order,
        negative_order,
        numbers,
        ends,
        share,
        anchors,
        negatives,
        ordered_anchors,
        ordered_negatives,
        *anchors.stride(),
        *negatives.stride(),
        count,
        others,
        sizes.programs,
        D=dim,
        D_PAD=padded,
        TILE=sizes.tile,
        BLOCK=sizes.block,
        BITS=bits,
        CHUNK=_SEARCHES_AT_A_TIME,
        ROWS=_COPIED_ELEMENTS_PER_PROGRAM // padded,
        COPY_ANCHORS=copy_anchors,
    )
    order = tiles.LabelOrder(negative_order, anchor_order, excluded_from, excluded_to, *counts)
    plan = tiles.Plan(borders, ends, share, first_tile, last_tile)
    return tiles.Prepared(order, plan, ordered_negatives, ordered_anchors)
