"""Which anchors meet which negatives, in tiles: computed on the device, without asking it anything.

The plan of a GPU back end, in plain PyTorch; `kernels/plan.py` makes the same in two launches.
Both sides are ordered by label, so that what an anchor excludes is one interval of the negatives,
and a tile of anchors excludes whole blocks of them, meets most others without a mask, and needs one
for the few blocks that are left. All blocks that are met, of all tiles, form one list that is dealt
out in equal shares: how many anchors are active and how labels are distributed changes the shares,
never the launch.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cac_fast.operands import Operands


class Sizes(NamedTuple):
    """What a plan is made for.

    tile: anchors of a tile.
    block: negatives of a block.
    programs: how many share the blocks.
    padded: channels of copies of features, a power of two.
    """

    tile: int
    block: int
    programs: int
    padded: int


class LabelOrder(NamedTuple):
    """Both sides ordered by label; the anchors that are not active come last.

    The kernels take all fields but the first, in this order.

    negatives: (M,) int64, rows in order.
    anchors: (A,) int64, rows in order.
    excluded_from, excluded_to: (A,) int32, what the anchor at each place excludes: negatives at
        places [from, to).
    num_active: 0-d int32, how many anchors are active.
    num_admissible: 0-d int32, how many negatives have a label of at least 0; they come first.
    """

    negatives: Tensor
    anchors: Tensor
    excluded_from: Tensor
    excluded_to: Tensor
    num_active: Tensor
    num_admissible: Tensor


class Plan(NamedTuple):
    """Tiles of anchors, the blocks of negatives they meet, and who computes what.

    borders: (T, 4) int32, per tile the blocks low <= skip <= resume <= high: those in [0, low) and
        [high, full), with full = max(high, num_admissible // block size), hold no excluded
        negative; those in [skip, resume) hold nothing else; [low, skip), [resume, high) and the
        last block, if it is not full, need a mask. A tile meets its blocks in this order: first
        all that need no mask, then the others.
    ends: (T,) int64, running sum of the blocks each tile meets: all tiles' blocks in one list.
    share: 0-d int64, how much of that list a program computes: program p the blocks in
        [p * share, (p + 1) * share).
    first_tile, last_tile: (programs,) int32, the first and the last tile, itself included, that
        these lie in; meaningless without a share.
    """

    borders: Tensor
    ends: Tensor
    share: Tensor
    first_tile: Tensor
    last_tile: Tensor


class Prepared(NamedTuple):
    """All that a kernel needs before it starts.

    order, plan: of the two sides' rows.
    negatives: (whole blocks of rows, padded), a copy in order, with zeros behind the last one.
    anchors: the same of whole tiles; None where the kernel reads the anchors as they are.
    """

    order: LabelOrder
    plan: Plan
    negatives: Tensor
    anchors: Tensor | None


class Numbers(NamedTuple):
    """What the kernels compute with, so that weights e^{logit} stay within the numbers there are.

    scale: log2(e) / tau, since weights are powers of 2.
    inverse_temperature: 1 / tau.
    offset_needed: whether each row takes an offset from its logits.
    lowest: the offset of a row that has met nothing yet, times log2(e).
    headroom: with offsets, the largest weight of a row is 2^headroom.
    """

    scale: float
    inverse_temperature: float
    offset_needed: bool
    lowest: float
    headroom: int


# Without an offset e^{logit}, and sums of it over any number of negatives, must stay normal
# numbers: of float32, and of the dtype the weights are rounded to for the second product.
_LARGEST_LOGIT = {torch.float32: 64.0, torch.bfloat16: 64.0, torch.float16: 10.5}
# float16 ends at 2^16 and 2^-24.
_HEADROOM = {torch.float32: 0, torch.bfloat16: 0, torch.float16: 15}


def needs_offset(dtype: torch.dtype, temperature: float) -> bool:
    """Whether rows take an offset from their logits, for which there are kernels of their own."""
    return 1 / temperature > _LARGEST_LOGIT.get(dtype, math.inf)


@cache
def numbers(dtype: torch.dtype, temperature: float) -> Numbers:
    """For features of unit norm, of one of the dtypes that the GPU back ends take."""
    scale = math.log2(math.e) / temperature
    return Numbers(
        scale,
        1 / temperature,
        needs_offset(dtype, temperature),
        # Below every logit, but finite: the kernels take the difference of two offsets.
        -4 * scale,
        _HEADROOM[dtype],
    )


@cache
def key_dtype(
    anchor_labels: torch.dtype, negative_labels: torch.dtype, classes: int | None = None
) -> torch.dtype:
    """The smallest dtype in which `label_keys` of such labels fit.

    classes: if given, labels lie below it. int64 for labels of more than 32 bits without it.
    """
    bound = max(torch.iinfo(dtype).max for dtype in (anchor_labels, negative_labels)) + 1
    bound = bound if classes is None else min(bound, classes)
    for dtype in (torch.int8, torch.int16, torch.int32):
        # Two keys are none of a label.
        if bound <= 2 ** (8 * dtype.itemsize) - 2:
            return dtype
    return torch.int64


def label_keys(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers of `dtype` that order labels (N,): those of at least 0, then all others as one.

    The largest integer of `dtype` is left for anchors that are not active. A label of at least 0
    that does not fit counts as one below 0.
    """
    info = torch.iinfo(dtype)
    labels = labels.long()
    none = labels < 0
    if dtype != torch.int64:
        none |= labels > info.max - info.min - 2
    return torch.where(none, info.max - 1, labels + info.min).to(dtype)


def order_by_label(
    anchor_labels: Tensor, negative_labels: Tensor, active: Tensor, classes: int | None = None
) -> LabelOrder:
    """Order anchors (A,) and negatives (M,) by their labels, integers; M is at least 1.

    classes: if given, labels lie below it; one that does not may count as one below 0.
    """
    dtype = key_dtype(anchor_labels.dtype, negative_labels.dtype, classes)
    largest = torch.iinfo(dtype).max
    # Anchors that exclude nothing: an empty interval, behind the admissible negatives.
    keys = label_keys(anchor_labels, dtype).masked_fill(~active, largest)
    keys, anchors = keys.sort(stable=True)
    negative_keys, negatives = label_keys(negative_labels, dtype).sort(stable=True)
    num_admissible = (negative_keys < largest - 1).sum(dtype=torch.int32)
    excluded_from, excluded_to = (
        torch.searchsorted(negative_keys, keys, right=right, out_int32=True).minimum(num_admissible)
        for right in (False, True)
    )
    num_active = active.sum(dtype=torch.int32)
    return LabelOrder(negatives, anchors, excluded_from, excluded_to, num_active, num_admissible)


def plan(order: LabelOrder, tile: int, block: int, programs: int) -> Plan:
    """Cut ordered anchors into tiles and deal the blocks they meet out to `programs`.

    tile: anchors of a tile. block: negatives of a block. A is at least 1.
    """
    count = len(order.anchors)
    first = torch.arange(0, count, tile, device=order.anchors.device)
    last = (first + (tile - 1)).clamp_max(count - 1).minimum((order.num_active - 1).clamp_min(0))
    first = first.minimum(last)
    from_first, from_last = order.excluded_from[first], order.excluded_from[last]
    to_first, to_last = order.excluded_to[first], order.excluded_to[last]

    low = from_first // block
    skip = _blocks(from_last, block)
    resume = (to_first // block).maximum(skip)
    high = _blocks(to_last, block)
    met = _blocks(order.num_admissible, block) - (resume - skip)
    used = torch.arange(0, count, tile, device=first.device) < order.num_active
    ends = (met * used).cumsum(0)

    share = (ends[-1] + (programs - 1)) // programs
    starts = torch.arange(programs, device=first.device) * share
    stops = (starts + share).minimum(ends[-1])
    first_tile = torch.searchsorted(ends, starts, right=True, out_int32=True)
    last_tile = torch.searchsorted(ends, stops, out_int32=True)
    borders = torch.stack((low, skip, resume, high), dim=1).int()
    return Plan(borders, ends, share, first_tile, last_tile)


def gather(features: Tensor, order: Tensor, block: int, padded: int) -> Tensor:
    """Features (N, D) in order, with zeros up to whole blocks of rows and `padded` channels."""
    count, dim = features.shape
    rows = -(-count // block) * block
    gathered = features.new_empty((rows, padded))
    gathered[count:] = 0
    if dim == padded:
        torch.index_select(features, 0, order, out=gathered[:count])
    else:
        gathered[:count, dim:] = 0
        gathered[:count, :dim] = features.index_select(0, order)
    return gathered


def prepare(
    operands: Operands,
    sizes: Sizes,
    classes: int | None = None,
    copy_anchors: bool = False,
) -> Prepared:
    """Order, plan and copies of the features, for A and M of at least 1.

    classes: if given, labels lie below it, so that smaller keys are sorted; one that does not may
        count as one below 0.
    copy_anchors: whether the kernel wants the anchors in order as well.
    """
    anchors, _, negatives, *labels_and_active, _ = operands
    order = order_by_label(*labels_and_active, classes)
    return Prepared(
        order,
        plan(order, sizes.tile, sizes.block, sizes.programs),
        gather(negatives, order.negatives, sizes.block, sizes.padded),
        gather(anchors, order.anchors, sizes.tile, sizes.padded) if copy_anchors else None,
    )


def _blocks(negatives: Tensor, block: int) -> Tensor:
    return (negatives + (block - 1)) // block
