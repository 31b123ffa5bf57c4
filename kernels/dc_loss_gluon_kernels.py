"""dc_loss_partial for compute capability 9.0: one warp copies, two warpgroups compute in turns.

README.md beside this file says how they meet.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Columns of a row sum that stay apart until the end: those that one thread holds of a row anyway.
LANES = gl.constexpr(8)


@gluon.jit
def block_of(place, low, skip, resume, high, full):
    """The block at a place of a tile's list: first those without a mask, then the others."""
    unmasked = low + full - high
    first = place + gl.where(place >= low, high - low, 0)
    other = place - unmasked + low
    other += gl.where(other >= skip, resume - skip, 0)
    other += gl.where(other >= high, full - high, 0)
    return gl.where(place < unmasked, first, other)


@gluon.jit
def piece_of(tile, program, share, num_admissible, borders_ptr, ends_ptr, BLOCK: gl.constexpr):
    """What of a tile's list is this program's, as [begin, end), and the tile's borders."""
    tile_end = gl.load(ends_ptr + tile)
    tile_start = gl.load(ends_ptr + tile - 1, mask=tile > 0, other=0)
    start = program * share
    begin = (gl.maximum(start, tile_start) - tile_start).to(gl.int32)
    end = (gl.minimum(start + share, tile_end) - tile_start).to(gl.int32)
    low = gl.load(borders_ptr + tile * 4)
    skip = gl.load(borders_ptr + tile * 4 + 1)
    resume = gl.load(borders_ptr + tile * 4 + 2)
    high = gl.load(borders_ptr + tile * 4 + 3)
    full = gl.maximum(high, num_admissible // BLOCK)
    return begin, end, low, skip, resume, high, full


@gluon.jit
def _produce(
    tiles, work, buffers, negatives,
    BLOCK: gl.constexpr, D_PAD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the blocks that the program meets, in order, each to the next buffer that is empty."""
    last_tile, steps = tiles
    negatives_there, filled, emptied = buffers
    count = 0
    for step in range(steps):
        begin, end, low, skip, resume, high, full = piece_of(last_tile - step, *work, BLOCK)
        borders = low, skip, resume, high, full
        for place in range(begin, end):
            stage = count % STAGES
            row = block_of(place, *borders) * BLOCK
            mbarrier.wait(emptied.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(filled.index(stage), BLOCK * D_PAD * 2)
            tma.async_copy_global_to_shared(
                negatives, [row, 0], filled.index(stage), negatives_there.index(stage)
            )
            count += 1


@gluon.jit
def _multiply_block(zeros, memory, count, STAGES: gl.constexpr, HALF: gl.constexpr):
    """Issue the product of the anchors and the block, when that is there and it is the turn."""
    negatives_there, filled, _, anchors_there, my_turn, _ = memory
    stage = count % STAGES
    mbarrier.wait(filled.index(stage), (count // STAGES) & 1)
    mbarrier.wait(my_turn, (count & 1) ^ (1 - HALF))
    negatives = negatives_there.index(stage).permute((1, 0))
    return warpgroup_mma(anchors_there, negatives, zeros, use_acc=False, is_async=True)


@gluon.jit
def _weigh(
    logits, offset, place, borders, admission, scale,
    BLOCK: gl.constexpr, MASKED: gl.constexpr, OFFSET: gl.constexpr, HEADROOM: gl.constexpr,
):  # fmt: skip
    """Weights of a block's products, and the rows' offsets, raised where a logit asks for it."""
    if MASKED:
        excluded_from, excluded_to, num_admissible = admission
        layout: gl.constexpr = logits.type.layout
        columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
        column = (block_of(place, *borders) * BLOCK + columns)[None, :]
        admitted = (column < excluded_from[:, None]) | (column >= excluded_to[:, None])
        logits = gl.where(admitted & (column < num_admissible), logits, float("-inf"))
    logits *= scale
    if OFFSET:
        offset = gl.maximum(offset, gl.max(logits, 1) - HEADROOM)
        logits -= offset[:, None]
    return gl.exp2(logits), offset


@gluon.jit
def _add(weights, TILE: gl.constexpr, BLOCK: gl.constexpr):
    return gl.sum(gl.reshape(weights, (TILE, BLOCK // LANES, LANES)), 1)


@gluon.jit
def _consume(
    shared, memory, D: gl.constexpr, D_PAD: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr,
    OFFSET: gl.constexpr, HEADROOM: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Sums over the blocks that the program meets, for one half of each tile's anchors.

    While this warpgroup computes weights, the other one's products keep the matrix units busy: it
    issues the next block's first product and this block's second one in its turn, then passes it.
    """
    tiles, work, anchors, excluded, results, scale, lowest = shared
    last_tile, steps = tiles
    program, _, num_admissible, _, _ = work
    anchors_ptr, anchors_stride, anchors_stride_d, order_ptr, num_active = anchors
    excluded_from_ptr, excluded_to_ptr = excluded
    weighted_ptr, total_ptr, offset_ptr = results
    negatives_there, _, emptied, anchors_there, _, other_turn = memory
    dtype: gl.constexpr = negatives_there.dtype
    ROWS: gl.constexpr = TILE // 2
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_PAD, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, products)
    ACROSS: gl.constexpr = D_PAD // 8
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])

    count = 0
    for step in range(steps):
        tile = last_tile - step
        begin, end, low, skip, resume, high, full = piece_of(tile, *work, BLOCK)
        if begin < end:
            first = tile * TILE + HALF * ROWS
            place_of = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, copied))
            dims = gl.arange(0, D_PAD, layout=gl.SliceLayout(0, copied))
            used = place_of < num_active
            row = gl.load(order_ptr + place_of, mask=used, other=0)
            b_anchors = gl.load(
                anchors_ptr
                + row[:, None] * anchors_stride
                + dims.to(gl.int64)[None, :] * anchors_stride_d,
                mask=used[:, None] & (dims < D)[None, :],
                other=0.0,
            )
            anchors_there.store(b_anchors)
            fence_async_shared()

            place_of = first + gl.arange(0, ROWS, layout=by_row)
            used = place_of < num_active
            excluded_from = gl.load(excluded_from_ptr + place_of, mask=used, other=0)
            excluded_to = gl.load(excluded_to_ptr + place_of, mask=used, other=0)
            admission = excluded_from, excluded_to, num_admissible
            borders = low, skip, resume, high, full
            unmasked = low + full - high

            zeros = gl.zeros([ROWS, BLOCK], gl.float32, products)
            sums = gl.zeros([ROWS, D_PAD], gl.float32, sums_layout)
            offset = gl.full([ROWS], lowest, gl.float32, by_row)

            later = _multiply_block(zeros, memory, count, STAGES, HALF)
            mbarrier.arrive(other_turn)
            logits = warpgroup_mma_wait(0, deps=[later])
            weights, offset = _weigh(
                logits, offset, begin, borders, admission, scale,
                BLOCK, True, OFFSET, HEADROOM,
            )  # fmt: skip
            total = _add(weights, ROWS, BLOCK)
            packed = gl.convert_layout(weights.to(dtype), operand)

            state = packed, sums, total, offset, count
            state = _add_blocks(
                state, zeros, memory, begin + 1, gl.minimum(end, unmasked), borders, admission,
                scale, ROWS, BLOCK, False, OFFSET, HEADROOM, STAGES, HALF,
            )  # fmt: skip
            packed, sums, total, offset, count = _add_blocks(
                state, zeros, memory, gl.maximum(begin + 1, unmasked), end, borders, admission,
                scale, ROWS, BLOCK, True, OFFSET, HEADROOM, STAGES, HALF,
            )  # fmt: skip

            stage = count % STAGES
            later = warpgroup_mma(packed, negatives_there.index(stage), sums, is_async=True)
            sums = warpgroup_mma_wait(0, deps=[later])
            mbarrier.arrive(emptied.index(stage))
            count += 1

            # Along the list of blocks program or tile grows from one piece to the next.
            first_slot = (program + tile).to(gl.int64) * TILE + HALF * ROWS
            slot = first_slot + gl.arange(0, ROWS, layout=gl.SliceLayout(1, sums_layout))
            dims = gl.arange(0, D_PAD, layout=gl.SliceLayout(0, sums_layout))
            gl.store(weighted_ptr + slot[:, None] * D_PAD + dims[None, :], sums)
            row_sums = gl.sum(total, 1)
            slot = first_slot + gl.arange(0, ROWS, layout=row_sums.type.layout)
            gl.store(total_ptr + slot, row_sums)
            if OFFSET:
                slot = first_slot + gl.arange(0, ROWS, layout=by_row)
                gl.store(offset_ptr + slot, offset)


@gluon.jit
def _add_blocks(
    state,
    zeros,
    memory,
    begin,
    end,
    borders,
    admission,
    scale,
    ROWS: gl.constexpr,
    BLOCK: gl.constexpr,
    MASKED: gl.constexpr,
    OFFSET: gl.constexpr,
    HEADROOM: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
):
    """Add the blocks' weights to `total`, and of each the block before to `sums`.

    packed: the weights of the block before, which its buffer waits for.
    """
    packed, sums, total, offset, count = state
    negatives_there, filled, emptied, _, _, other_turn = memory
    for place in range(begin, end):
        held = count % STAGES
        count += 1
        stage = count % STAGES
        logits_later = _multiply_block(zeros, memory, count, STAGES, HALF)
        sums_later = warpgroup_mma(packed, negatives_there.index(held), sums, is_async=True)
        mbarrier.arrive(other_turn)
        logits = warpgroup_mma_wait(1, deps=[logits_later])
        before = offset
        weights, offset = _weigh(
            logits, offset, place, borders, admission, scale,
            BLOCK, MASKED, OFFSET, HEADROOM,
        )  # fmt: skip
        added = _add(weights, ROWS, BLOCK)
        # Known to be over. But no instruction is moved across it, and the compiler would move
        # these weights behind the next wait, so that nothing is computed during the products.
        mbarrier.wait(filled.index(stage), (count // STAGES) & 1)
        sums = warpgroup_mma_wait(0, deps=[sums_later])
        mbarrier.arrive(emptied.index(held))
        if OFFSET:
            shrink = gl.exp2(before - offset)
            sums_layout: gl.constexpr = sums.type.layout
            total_layout: gl.constexpr = total.type.layout
            sums *= gl.convert_layout(shrink, gl.SliceLayout(1, sums_layout))[:, None]
            total *= gl.convert_layout(shrink, gl.SliceLayout(1, total_layout))[:, None]
        total += added
        packed = gl.convert_layout(weights.to(packed.dtype), packed.type.layout)
    return packed, sums, total, offset, count


@gluon.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["anchors_stride_d"])
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
    D: gl.constexpr,
    D_PAD: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK: gl.constexpr,
    OFFSET: gl.constexpr,
    HEADROOM: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """One program's share of the blocks: per tile it touches, the sums over these blocks."""
    program = gl.program_id(0)
    share = gl.load(share_ptr)
    first_tile = gl.load(first_tile_ptr + program)
    last_tile = gl.load(last_tile_ptr + program)
    # The tiles of a program without a share mean nothing.
    has_share = program * share < gl.load(ends_ptr + tiles - 1)
    steps = gl.where(has_share, last_tile - first_tile + 1, 0)
    num_active = gl.load(num_active_ptr)
    num_admissible = gl.load(num_admissible_ptr)

    dtype: gl.constexpr = negatives.dtype
    ROWS: gl.constexpr = TILE // 2
    anchors_there = gl.allocate_shared_memory(dtype, [2, ROWS, D_PAD], negatives.layout)
    negatives_there = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D_PAD], negatives.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    turn1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(emptied.index(stage), count=2)
    mbarrier.init(turn0, count=1)
    mbarrier.init(turn1, count=1)
    fence_async_shared()

    buffers = negatives_there, filled, emptied
    memory0 = negatives_there, filled, emptied, anchors_there.index(0), turn0, turn1
    memory1 = negatives_there, filled, emptied, anchors_there.index(1), turn1, turn0
    tiles = last_tile, steps
    work = program, share, num_admissible, borders_ptr, ends_ptr
    anchors = anchors_ptr, anchors_stride, anchors_stride_d, order_ptr, num_active
    excluded = excluded_from_ptr, excluded_to_ptr
    results = weighted_ptr, total_ptr, offset_ptr
    shared = tiles, work, anchors, excluded, results, scale, lowest
    gl.warp_specialize(
        [
            (_consume, (shared, memory0, D, D_PAD, TILE, BLOCK, OFFSET, HEADROOM, STAGES, 0)),
            (_consume, (shared, memory1, D, D_PAD, TILE, BLOCK, OFFSET, HEADROOM, STAGES, 1)),
            (_produce, (tiles, work, buffers, negatives, BLOCK, D_PAD, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
