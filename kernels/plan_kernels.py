"""The two kernels of the plan: keys to sort labels by, and all that follows from the order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "negatives"])
def dc_loss_keys(
    anchor_labels_ptr,
    negative_labels_ptr,
    active_ptr,
    keys_ptr,
    anchor_labels_stride,
    negative_labels_stride,
    active_stride,
    count,
    negatives,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The keys of `count` anchors and then of the negatives, as `tiles.label_keys`."""
    LARGEST: tl.constexpr = 2**63 - 1 if BITS == 64 else 2**BITS - 3
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    place = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    is_anchor = place < count
    is_negative = (place >= count) & (place < count + negatives)
    label = tl.load(anchor_labels_ptr + place * anchor_labels_stride, mask=is_anchor, other=0)
    active = tl.load(active_ptr + place * active_stride, mask=is_anchor, other=1)
    other = tl.load(
        negative_labels_ptr + (place - count) * negative_labels_stride, mask=is_negative, other=0
    )
    label = tl.where(is_anchor, label.to(tl.int64), other.to(tl.int64))
    admissible = (label >= 0) & (label <= LARGEST)
    key = tl.where(admissible, label + LOWEST, 2 ** (BITS - 1) - 2)
    key = tl.where(active != 0, key, 2 ** (BITS - 1) - 1)
    tl.store(keys_ptr + place, key.to(keys_ptr.dtype.element_ty), mask=is_anchor | is_negative)


@triton.jit
def _below(sorted_ptr, count, bound):
    """How many of `count` sorted numbers lie below each bound."""
    step = 1
    while step <= count // 2:
        step *= 2
    found = (bound * 0).to(tl.int32)
    while step > 0:
        further = found + step
        inside = further <= count
        number = tl.load(sorted_ptr + (further - 1), mask=inside, other=0).to(tl.int64)
        found = tl.where(inside & (number < bound), further, found)
        step = step // 2
    return found


@triton.jit
def _excluded(key, negative_keys_ptr, negatives, BITS: tl.constexpr):
    """The interval of sorted negatives that anchors of these keys exclude."""
    # Anchors that exclude nothing get an empty interval behind the admissible negatives.
    NONE: tl.constexpr = 2 ** (BITS - 1) - 2
    begin = _below(negative_keys_ptr, negatives, tl.minimum(key, NONE))
    end = _below(negative_keys_ptr, negatives, tl.minimum(key, NONE - 1) + 1)
    return begin, end


@triton.jit
def _plan(
    anchor_keys_ptr,
    negative_keys_ptr,
    made,
    count,
    negatives,
    programs,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    borders_ptr, ends_ptr, share_ptr, first_tile_ptr, last_tile_ptr, counts_ptr = made
    inactive = tl.full((), 2 ** (BITS - 1) - 1, tl.int64)
    num_active = _below(anchor_keys_ptr, count, inactive)
    num_admissible = _below(negative_keys_ptr, negatives, inactive - 1)
    tl.store(counts_ptr, num_active)
    tl.store(counts_ptr + 1, num_admissible)

    tiles = tl.cdiv(count, TILE)
    total = tl.full((), 0, tl.int64)
    for begin in range(0, tiles, CHUNK):
        tile = begin + tl.arange(0, CHUNK)
        inside = tile < tiles
        last = tl.minimum(tl.minimum(tile * TILE + TILE, count), tl.maximum(num_active, 1)) - 1
        first = tl.minimum(tile * TILE, last)
        key_first = tl.load(anchor_keys_ptr + first, mask=inside, other=0).to(tl.int64)
        key_last = tl.load(anchor_keys_ptr + last, mask=inside, other=0).to(tl.int64)
        from_first, to_first = _excluded(key_first, negative_keys_ptr, negatives, BITS)
        from_last, to_last = _excluded(key_last, negative_keys_ptr, negatives, BITS)
        skip = tl.cdiv(from_last, BLOCK)
        resume = tl.maximum(to_first // BLOCK, skip)
        tl.store(borders_ptr + tile * 4, from_first // BLOCK, mask=inside)
        tl.store(borders_ptr + tile * 4 + 1, skip, mask=inside)
        tl.store(borders_ptr + tile * 4 + 2, resume, mask=inside)
        tl.store(borders_ptr + tile * 4 + 3, tl.cdiv(to_last, BLOCK), mask=inside)
        met = tl.where(
            tile * TILE < num_active, tl.cdiv(num_admissible, BLOCK) - (resume - skip), 0
        )
        met = tl.where(inside, met, 0).to(tl.int64)
        tl.store(ends_ptr + tile, total + tl.cumsum(met, 0), mask=inside)
        total += tl.sum(met, 0)

    share = tl.cdiv(total, programs)
    tl.store(share_ptr, share)
    # Other threads than those that wrote them read the ends.
    tl.debug_barrier()
    for begin in range(0, programs, CHUNK):
        program = begin + tl.arange(0, CHUNK)
        start = program * share
        stop = tl.minimum(start + share, total)
        inside = program < programs
        tl.store(first_tile_ptr + program, _below(ends_ptr, tiles, start + 1), mask=inside)
        tl.store(last_tile_ptr + program, _below(ends_ptr, tiles, stop), mask=inside)


@triton.jit
def _copy(
    features_ptr,
    order_ptr,
    ordered_ptr,
    stride,
    stride_d,
    count,
    begin,
    padded_count,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows in order from `begin` on, with zeros behind row `count` and channel D."""
    place = begin + tl.arange(0, ROWS).to(tl.int64)
    dims = tl.arange(0, D_PAD).to(tl.int64)
    row = tl.load(order_ptr + place, mask=place < count, other=0)
    features = tl.load(
        features_ptr + row[:, None] * stride + dims[None, :] * stride_d,
        mask=(place < count)[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    ordered = ordered_ptr + place[:, None] * D_PAD + dims[None, :]
    tl.store(ordered, features, mask=(place < padded_count)[:, None])


# Features whose channels are not adjacent have the number of rows for a stride.
@triton.jit(
    do_not_specialize=["count", "negatives", "programs"],
    do_not_specialize_on_alignment=["anchors_stride_d", "negatives_stride_d"],
)
def dc_loss_plan(
    anchor_keys_ptr,
    negative_keys_ptr,
    anchor_order_ptr,
    negative_order_ptr,
    numbers_ptr,
    ends_ptr,
    share_ptr,
    anchors_ptr,
    negatives_ptr,
    ordered_anchors_ptr,
    ordered_negatives_ptr,
    anchors_stride,
    anchors_stride_d,
    negatives_stride,
    negatives_stride_d,
    count,
    negatives,
    programs,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COPY_ANCHORS: tl.constexpr,
):
    """From sorted keys all of `tiles.prepare`; `plan.py` lays out numbers_ptr and the grid.

    The first program makes the plan, as the longest chain of loads; the next ones find what each
    anchor excludes, the others copy features in order.
    """
    tiles = tl.cdiv(count, TILE)
    last_tile_ptr = numbers_ptr + programs
    counts_ptr = last_tile_ptr + programs
    borders_ptr = numbers_ptr + tl.cdiv(2 * programs + 2, 4) * 4
    excluded_from_ptr = borders_ptr + 4 * tiles
    excluded_to_ptr = excluded_from_ptr + tl.cdiv(count, 4) * 4

    program = tl.program_id(0)
    searches = tl.cdiv(count, CHUNK)
    copies = tl.cdiv(tl.cdiv(negatives, BLOCK) * BLOCK, ROWS)
    if program == 0:
        _plan(
            anchor_keys_ptr, negative_keys_ptr,
            (borders_ptr, ends_ptr, share_ptr, numbers_ptr, last_tile_ptr, counts_ptr),
            count, negatives, programs, TILE, BLOCK, BITS, CHUNK,
        )  # fmt: skip
    elif program <= searches:
        place = (program - 1) * CHUNK + tl.arange(0, CHUNK)
        inside = place < count
        key = tl.load(anchor_keys_ptr + place, mask=inside, other=0).to(tl.int64)
        begin, end = _excluded(key, negative_keys_ptr, negatives, BITS)
        tl.store(excluded_from_ptr + place, begin, mask=inside)
        tl.store(excluded_to_ptr + place, end, mask=inside)
    elif program <= searches + copies:
        _copy(
            negatives_ptr, negative_order_ptr, ordered_negatives_ptr,
            negatives_stride, negatives_stride_d, negatives,
            (program - 1 - searches) * ROWS, tl.cdiv(negatives, BLOCK) * BLOCK, D, D_PAD, ROWS,
        )  # fmt: skip
    elif COPY_ANCHORS:
        _copy(
            anchors_ptr, anchor_order_ptr, ordered_anchors_ptr,
            anchors_stride, anchors_stride_d, count,
            (program - 1 - searches - copies) * ROWS, tiles * TILE, D, D_PAD, ROWS,
        )  # fmt: skip
