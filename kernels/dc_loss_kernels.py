"""The two kernels of the operator; README.md beside this file has the mathematics."""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of a row sum that stay apart until the end: those that one thread holds of a row anyway.
LANES = tl.constexpr(8)


@triton.jit
def _load_rows(features_ptr, stride, stride_d, row, dims, mask):
    place = row[:, None] * stride + dims[None, :] * stride_d
    return tl.load(features_ptr + place, mask=mask, other=0.0)


@triton.jit
def _add_blocks(
    sums,
    b_anchors,
    negatives,
    begin,
    end,
    jumps,
    admission,
    scale,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    D_PAD: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADROOM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the blocks at places [begin, end), which lie further on behind the jumps, to the sums."""
    weighted, total, offset = sums
    jump1_at, jump1_by, jump2_at, jump2_by = jumps
    excluded_from, excluded, num_admissible = admission
    columns = tl.arange(0, BLOCK)
    dims = tl.arange(0, D_PAD)
    for place in tl.range(begin, end, num_stages=STAGES):
        block = place
        block += tl.where(block >= jump1_at, jump1_by, 0)
        if MASKED:
            block += tl.where(block >= jump2_at, jump2_by, 0)
        if TMA:
            b_negatives = negatives.load([block * BLOCK, 0])
        else:
            p_block = negatives + block.to(tl.int64) * (BLOCK * D_PAD)
            b_negatives = tl.load(p_block + columns[:, None] * D_PAD + dims[None, :])
        logits = tl.dot(b_anchors, tl.trans(b_negatives), input_precision=PRECISION) * scale
        if MASKED:
            column = block * BLOCK + columns
            # Below `excluded_from` this wraps round to a large number.
            beyond = (column[None, :] - excluded_from[:, None]).to(tl.uint32, bitcast=True)
            admitted = (beyond >= excluded[:, None]) & (column < num_admissible)[None, :]
            logits = tl.where(admitted, logits, float("-inf"))
        if OFFSET:
            raised = tl.maximum(offset, tl.max(logits, 1) - HEADROOM)
            shrink = tl.exp2(offset - raised)
            total *= shrink[:, None]
            weighted *= shrink[:, None]
            logits -= raised[:, None]
            offset = raised
        weights = tl.exp2(logits)
        total += tl.sum(tl.reshape(weights, (TILE, BLOCK // LANES, LANES)), 1)
        weighted = tl.dot(
            weights.to(b_negatives.dtype), b_negatives, weighted, input_precision=PRECISION
        )
    return weighted, total, offset


# What follows from A must not make a variant: another A would be compiled for, in mid-training.
@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["anchors_stride_d"])
def dc_loss_partial(
    anchors_ptr,
    negatives,
    order_ptr,
    excluded_from_ptr,
    excluded_to_ptr,
    num_active_ptr,
    num_admissible_ptr,
    borders_ptr,
    ends_ptr,
    share_ptr,
    first_tile_ptr,
    last_tile_ptr,
    weighted_ptr,
    total_ptr,
    offset_ptr,
    anchors_stride,
    anchors_stride_d,
    tiles,
    scale,
    lowest,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADROOM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program's share of the blocks: per tile it touches, the sums over these blocks."""
    program = tl.program_id(0)
    share = tl.load(share_ptr)
    start = program * share
    stop = tl.minimum(start + share, tl.load(ends_ptr + tiles - 1))
    if start >= stop:
        return
    first_tile = tl.load(first_tile_ptr + program)
    last_tile = tl.load(last_tile_ptr + program)
    num_active = tl.load(num_active_ptr)
    num_admissible = tl.load(num_admissible_ptr)
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, D_PAD).to(tl.int64)
    # The last tile first: its share begins at the first negatives, as that of every other program
    # does, so that programs read the same negatives at about the same time.
    for step in tl.range(0, last_tile - first_tile + 1, num_stages=1):
        tile = last_tile - step
        tile_end = tl.load(ends_ptr + tile)
        tile_start = tl.load(ends_ptr + tile - 1, mask=tile > 0, other=0)
        begin = (tl.maximum(start, tile_start) - tile_start).to(tl.int32)
        end = (tl.minimum(stop, tile_end) - tile_start).to(tl.int32)

        place = tile * TILE + rows
        used = place < num_active
        row = tl.load(order_ptr + place, mask=used, other=0)
        mask = used[:, None] & (dims < D)[None, :]
        b_anchors = _load_rows(anchors_ptr, anchors_stride, anchors_stride_d, row, dims, mask)
        excluded_from = tl.load(excluded_from_ptr + place, mask=used, other=0)
        excluded_to = tl.load(excluded_to_ptr + place, mask=used, other=0)
        excluded = (excluded_to - excluded_from).to(tl.uint32, bitcast=True)
        low = tl.load(borders_ptr + tile * 4)
        skip = tl.load(borders_ptr + tile * 4 + 1)
        resume = tl.load(borders_ptr + tile * 4 + 2)
        high = tl.load(borders_ptr + tile * 4 + 3)
        full = tl.maximum(high, num_admissible // BLOCK)
        unmasked = low + full - high

        sums = (
            tl.zeros((TILE, D_PAD), tl.float32),
            tl.zeros((TILE, LANES), tl.float32),
            tl.full((TILE,), lowest, tl.float32),
        )
        admission = excluded_from, excluded, num_admissible
        sums = _add_blocks(
            sums, b_anchors, negatives, begin, tl.minimum(end, unmasked),
            (low, high - low, 0, 0), admission, scale,
            TILE, BLOCK, D_PAD, TMA, False, OFFSET, HEADROOM, PRECISION, STAGES,
        )  # fmt: skip
        weighted, total, offset = _add_blocks(
            sums, b_anchors, negatives,
            tl.maximum(begin, unmasked) - unmasked + low, end - unmasked + low,
            (skip, resume - skip, high, full - high), admission, scale,
            TILE, BLOCK, D_PAD, TMA, True, OFFSET, HEADROOM, PRECISION, STAGES,
        )  # fmt: skip

        # Along the list of blocks program or tile grows from one piece to the next.
        slot = (program + tile).to(tl.int64) * TILE + rows
        tl.store(weighted_ptr + slot[:, None] * D_PAD + dims[None, :], weighted)
        tl.store(total_ptr + slot, tl.sum(total, 1))
        if OFFSET:
            tl.store(offset_ptr + slot, offset)


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["anchors_stride_d", "positives_stride_d"],
)
def dc_loss_combine(
    anchors_ptr,
    positives_ptr,
    order_ptr,
    num_active_ptr,
    ends_ptr,
    share_ptr,
    weighted_ptr,
    total_ptr,
    offset_ptr,
    loss_ptr,
    gradient_ptr,
    anchors_stride,
    anchors_stride_d,
    positives_stride,
    positives_stride_d,
    count,
    scale,
    lowest,
    inverse_temperature,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Add a tile's sums in the order of the blocks; loss and gradient of ROWS of its anchors."""
    tile = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D_PAD).to(tl.int64)
    share = tl.load(share_ptr)
    end = tl.load(ends_ptr + tile)
    start = tl.load(ends_ptr + tile - 1, mask=tile > 0, other=0)

    weighted = tl.zeros((ROWS, D_PAD), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    offset = tl.full((ROWS,), lowest, tl.float32)
    if end > start:
        for program in tl.range(start // share, (end - 1) // share + 1):
            slot = (program + tile) * TILE + rows
            part = tl.load(total_ptr + slot)
            b_part = tl.load(weighted_ptr + slot[:, None] * D_PAD + dims[None, :])
            if OFFSET:
                part_offset = tl.load(offset_ptr + slot)
                raised = tl.maximum(offset, part_offset)
                shrink = tl.exp2(offset - raised)
                part_shrink = tl.exp2(part_offset - raised)
                total = total * shrink + part * part_shrink
                weighted = weighted * shrink[:, None] + b_part * part_shrink[:, None]
                offset = raised
            else:
                total += part
                weighted += b_part

    place = tile * TILE + rows
    inside = place < count
    row = tl.load(order_ptr + place, mask=inside, other=0)
    used = inside & (place < tl.load(num_active_ptr))
    mask = used[:, None] & (dims < D)[None, :]
    b_anchors = _load_rows(anchors_ptr, anchors_stride, anchors_stride_d, row, dims, mask)
    b_positives = _load_rows(positives_ptr, positives_stride, positives_stride_d, row, dims, mask)
    b_anchors, b_positives = b_anchors.to(tl.float32), b_positives.to(tl.float32)

    # Not > 0: what is not a number must not come out as 0.
    admitted = used & (total != 0)
    # Rows without a sum get one, so that nothing on the way to their zeros is undefined.
    total = tl.where(admitted, total, 1.0)
    x = tl.log2(total) - tl.sum(b_anchors * b_positives, 1) * scale
    if OFFSET:
        x += offset
    x *= 0.6931471805599453
    # log(1 + e) with the rounding of 1 + e taken back out, so that a small loss is exact.
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    log1p = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.maximum(rounded - 1.0, 1e-7)))
    loss = tl.where(admitted, tl.maximum(x, 0.0) + log1p, 0.0)
    pull = tl.where(x >= 0, 1.0, e) / rounded * inverse_temperature
    mean = weighted / total[:, None]
    gradient = tl.where(admitted[:, None], pull[:, None] * (mean - b_positives), 0.0)
    tl.store(loss_ptr + row, loss, mask=inside)
    p_gradient = gradient_ptr + row[:, None] * D + dims[None, :]
    tl.store(p_gradient, gradient, mask=inside[:, None] & (dims < D)[None, :])
