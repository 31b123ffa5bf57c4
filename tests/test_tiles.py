"""The plan of a GPU back end: every admitted pair is met once, and no block without need."""

from __future__ import annotations

import pytest
import torch
from rows_contract import LAYOUTS, operands
from torch import Tensor

from cac_fast import tiles

TILE, BLOCK = 16, 8


def met_blocks(plan: tiles.Plan, order: tiles.LabelOrder, tile: int) -> list[tuple[int, bool]]:
    """(block, whether it needs a mask) in the order in which a tile meets them."""
    low, skip, resume, high = plan.borders[tile].tolist()
    blocks = -(-int(order.num_admissible) // BLOCK)
    full = max(high, int(order.num_admissible) // BLOCK)
    unmasked = [*range(low), *range(high, full)]
    masked = [*range(low, skip), *range(resume, high), *range(full, blocks)]
    return [(block, False) for block in unmasked] + [(block, True) for block in masked]


def admitted(order: tiles.LabelOrder, labels: Tensor, negative_labels: Tensor) -> Tensor:
    """(active anchors, M) in the plan's order."""
    rows = labels[order.anchors[: int(order.num_active)]]
    columns = negative_labels[order.negatives]
    return (columns >= 0) & (columns != rows.unsqueeze(1))


@pytest.mark.parametrize("labels", LAYOUTS)
def test_excluded_intervals_are_those_of_the_labels(labels: str) -> None:
    *_, y, z, active = operands(labels, torch.float32, 150, 170)
    order = tiles.order_by_label(y, z, active)
    assert order.anchors.sort().values.tolist() == list(range(150))
    assert order.negatives.sort().values.tolist() == list(range(170))
    count = int(order.num_active)
    assert active[order.anchors[:count]].all()
    assert not active[order.anchors[count:]].any()
    columns = torch.arange(170)
    excluded = (columns >= order.excluded_from[:count, None]) & (
        columns < order.excluded_to[:count, None]
    )
    assert torch.equal(~excluded & (columns < order.num_admissible), admitted(order, y, z))


@pytest.mark.parametrize("labels", LAYOUTS)
def test_tiles_meet_what_they_admit_and_mask_what_they_must(labels: str) -> None:
    *_, y, z, active = operands(labels, torch.float32, 150, 170)
    order = tiles.order_by_label(y, z, active)
    plan = tiles.plan(order, TILE, BLOCK, 5)
    pairs = admitted(order, y, z)
    assert len(plan.ends) == -(-150 // TILE)
    before = 0
    for tile, end in enumerate(plan.ends.tolist()):
        part = pairs[tile * TILE : (tile + 1) * TILE]
        if len(part) == 0:
            assert end == before
            continue
        met = met_blocks(plan, order, tile)
        assert end - before == len(met) == len({block for block, _ in met})
        for block, columns in enumerate(part.split(BLOCK, dim=1)):
            kinds = [masked for found, masked in met if found == block]
            if columns.any():
                assert kinds == [True] or (kinds == [False] and columns.all())
                assert columns.shape[1] == BLOCK or kinds == [True]
        before = end


def test_a_tile_of_one_label_meets_no_block_of_that_label() -> None:
    y, z = torch.full((TILE,), 1), torch.tensor([0, 1, 2]).repeat_interleave(4 * BLOCK)
    order = tiles.order_by_label(y, z, torch.ones(TILE, dtype=torch.bool))
    plan = tiles.plan(order, TILE, BLOCK, 5)
    assert [block for block, _ in met_blocks(plan, order, 0)] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert not any(masked for _, masked in met_blocks(plan, order, 0))


@pytest.mark.parametrize("programs", [1, 3, 40, 1000])
@pytest.mark.parametrize("labels", LAYOUTS)
def test_shares_cover_the_list_and_name_their_tiles(labels: str, programs: int) -> None:
    *_, y, z, active = operands(labels, torch.float32, 150, 170)
    plan = tiles.plan(tiles.order_by_label(y, z, active), TILE, BLOCK, programs)
    ends, share = plan.ends.tolist(), int(plan.share)
    owner = [tile for tile, end in enumerate(ends) for _ in range(end - ([0, *ends][tile]))]
    assert (programs - 1) * share <= len(owner) + programs
    assert programs * share >= len(owner)
    for program in range(programs):
        mine = owner[program * share : (program + 1) * share]
        if mine:
            assert int(plan.first_tile[program]) == mine[0]
            assert int(plan.last_tile[program]) == mine[-1]


def test_nothing_to_meet() -> None:
    *_, y, z, active = operands("voc", torch.float32, 50, 60)
    for negative_labels, rows in ((z, active & False), (z.clone().fill_(-1), active)):
        plan = tiles.plan(tiles.order_by_label(y, negative_labels, rows), TILE, BLOCK, 3)
        assert not plan.ends.any()
        assert int(plan.share) == 0


def test_numbers_stay_finite() -> None:
    assert not tiles.numbers(torch.float16, 0.1).offset_needed
    assert tiles.numbers(torch.float16, 0.09).offset_needed
    for temperature in (10.0, 0.1, 1e-6):
        numbers = tiles.numbers(torch.bfloat16, temperature)
        offsets = torch.tensor([numbers.lowest, numbers.scale, -numbers.scale])
        assert offsets.isfinite().all()
        assert (offsets[1:] - numbers.lowest > 0).all()
