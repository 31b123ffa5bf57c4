"""The plan of `cac_fast.tiles` in two sorts and two launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cac_fast import tiles
from cac_fast.kernels.plan_kernels import label_keys, plan_and_copy

_KEYS = 1024  # of one program
_CHUNK = 128  # anchors that one program searches for, and tiles that are planned at a time
_COPIED = 4096  # elements of one program


def prepare(
    anchors: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    sizes: tiles.Sizes,
    classes: int | None = None,
    copy_anchors: bool = False,
) -> tiles.Prepared:
    """As `tiles.prepare`, to the last bit; on the current stream of the current device."""
    count, dim = anchors.shape
    others = len(negatives)
    tile, block, programs, padded = sizes
    count_tiles = triton.cdiv(count, tile)
    key_dtype = tiles.key_dtype(anchor_labels.dtype, negative_labels.dtype, classes)
    bits = key_dtype.itemsize * 8

    keys = active.new_empty(count + others, dtype=key_dtype)
    label_keys[(triton.cdiv(count + others, _KEYS),)](
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
        CHUNK=_KEYS,
    )
    anchor_keys, negative_keys = keys.split((count, others))
    anchor_keys, anchor_order = anchor_keys.sort(stable=True)
    negative_keys, negative_order = negative_keys.sort(stable=True)

    # Parts that begin at multiples of 16 bytes: where they begin elsewhere, Triton compiles again.
    parts = []
    for length in (4 * count_tiles, count, count, programs, programs):
        parts += [length, -length % 4]
    numbers = active.new_empty(sum(parts) + 2, dtype=torch.int32)
    borders, _, excluded_from, _, excluded_to, _, first_tile, _, last_tile, _, counts = (
        numbers.split((*parts, 2))
    )
    ends = active.new_empty(count_tiles, dtype=torch.int64)
    share = active.new_empty((), dtype=torch.int64)
    rows = triton.cdiv(others, block) * block
    ordered_negatives = negatives.new_empty((rows, padded))
    ordered_anchors = anchors.new_empty((count_tiles * tile, padded)) if copy_anchors else None
    per_program = _COPIED // padded
    copies = triton.cdiv(rows, per_program)
    if copy_anchors:
        copies += triton.cdiv(count_tiles * tile, per_program)
    plan_and_copy[(1 + triton.cdiv(count, _CHUNK) + copies,)](
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
        programs,
        D=dim,
        D_PAD=padded,
        TILE=tile,
        BLOCK=block,
        BITS=bits,
        CHUNK=_CHUNK,
        ROWS=per_program,
        COPY_ANCHORS=copy_anchors,
    )
    order = tiles.LabelOrder(
        anchor_order, negative_order, excluded_from, excluded_to, *counts.unbind()
    )
    plan = tiles.Plan(borders.view(count_tiles, 4), ends, share, first_tile, last_tile)
    return tiles.Prepared(order, plan, ordered_negatives, ordered_anchors)
