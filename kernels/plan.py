"""The plan of `cac_fast.tiles` in two sorts and two launches."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from cac_fast import tiles
from cac_fast.kernels.plan_kernels import dc_loss_keys, dc_loss_plan
from cac_fast.operands import Operands

_KEYS_PER_PROGRAM = 1024
_SEARCHES_AT_A_TIME = 128
_COPIED_ELEMENTS_PER_PROGRAM = 4096


class _Layout(NamedTuple):
    """What follows from shapes alone.

    tiles: of anchors.
    anchors, negatives: rows of the copies.
    numbers: lengths of the parts of the workspace.
    key_programs, programs: of the two launches.
    """

    tiles: int
    anchors: int
    negatives: int
    numbers: tuple[int, ...]
    key_programs: int
    programs: int


@lru_cache(maxsize=64)
def _lay_out(count: int, others: int, sizes: tiles.Sizes, copy_anchors: bool) -> _Layout:
    count_tiles = _cdiv(count, sizes.tile)
    rows = _cdiv(others, sizes.block) * sizes.block
    # Where a part does not begin at a multiple of 16 bytes, Triton compiles the kernels again: none
    # depends on the number of anchors.
    fixed = sizes.programs, sizes.programs, 1, 1
    numbers = (*fixed, -sum(fixed) % 4, 4 * count_tiles, count, -count % 4, count)
    copied = _COPIED_ELEMENTS_PER_PROGRAM // sizes.padded
    programs = 1 + _cdiv(count, _SEARCHES_AT_A_TIME) + _cdiv(rows, copied)
    if copy_anchors:
        programs += _cdiv(count_tiles * sizes.tile, copied)
    return _Layout(
        count_tiles,
        count_tiles * sizes.tile,
        rows,
        numbers,
        _cdiv(count + others, _KEYS_PER_PROGRAM),
        programs,
    )


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
    layout = _lay_out(count, others, sizes, copy_anchors)
    key_dtype = tiles.key_dtype(anchor_labels.dtype, negative_labels.dtype, classes)
    bits = key_dtype.itemsize * 8

    keys = active.new_empty(count + others, dtype=key_dtype)
    dc_loss_keys[(layout.key_programs,)](
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

    numbers = active.new_empty(sum(layout.numbers), dtype=torch.int32)
    first_tile, last_tile, *counts, _, borders, excluded_from, _, excluded_to = numbers.split(
        layout.numbers
    )
    ends = active.new_empty(layout.tiles, dtype=torch.int64)
    share = active.new_empty((), dtype=torch.int64)
    padded = sizes.padded
    ordered_negatives = negatives.new_empty((layout.negatives, padded))
    ordered_anchors = anchors.new_empty((layout.anchors, padded)) if copy_anchors else None
    dc_loss_plan[(layout.programs,)](
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
    order = tiles.LabelOrder(anchor_order, negative_order, excluded_from, excluded_to, *counts)
    plan = tiles.Plan(borders, ends, share, first_tile, last_tile)
    return tiles.Prepared(order, plan, ordered_negatives, ordered_anchors)


def _cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)
