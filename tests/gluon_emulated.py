"""The Gluon kernel on the CPU, emulated by emulated_gluon.py; test_gluon.py runs this file.

The kernel that combines its sums runs under Triton's interpreter.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any, ClassVar

import emulated_gluon
import pytest
import torch
from emulated_gluon import Deadlock, Misuse, Schedule
from rows_contract import HalfRowsContract, Rows, compare, flat, operands

from cac_fast import tiles
from cac_fast.kernels import configs, plan

# Small tiles, so that a few hundred rows make many of them.
SMALL = configs.Specialized(tile=32, block=16, stages=3, registers=240)
SCHEDULES = [*permutations(range(3)), *range(4)]
"""Who goes on before whom, or the seed of a draw."""


@pytest.fixture(autouse=True)
def setting(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles."""
    use(SMALL, monkeypatch)


def use(config: configs.Specialized, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "GLUON", dict.fromkeys((64, 128, 256), config))


def schedule(chosen: tuple[int, ...] | int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedule, "order", chosen if isinstance(chosen, tuple) else None)
    monkeypatch.setattr(Schedule, "seed", chosen if isinstance(chosen, int) else 0)


@pytest.fixture(scope="session")
def rows() -> Rows:
    return flat(emulated_gluon.launcher().dc_loss_rows)


class TestEmulated(HalfRowsContract):
    drawn = 10, 60, 120
    layout_sizes: ClassVar = [(90, 200, 16)]
    temperature_size = (60, 90, 16)


@pytest.mark.parametrize("dim", [17, 64, 100, 128, 256])
def test_any_number_of_channels(rows: Rows, dim: int) -> None:
    compare(rows, operands("voc", torch.bfloat16, 40, 70, dim), 0.1)


@pytest.mark.parametrize(("a", "m"), [(1, 1), (1, 300), (33, 16), (200, 1), (32, 32), (31, 47)])
def test_sizes_that_divide_nothing(rows: Rows, a: int, m: int) -> None:
    *features, y, z, _ = operands("few", torch.bfloat16, a, m, 16)
    compare(rows, (*features, y, z.fill_(2), torch.ones(a, dtype=torch.bool)), 0.1)


@pytest.mark.parametrize("programs", [1, 2, 7, 64])
def test_any_number_of_programs(rows: Rows, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """64: most of them have no share."""
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu("sm_90", programs))
    for temperature in (0.1, 0.01):
        compare(rows, operands("voc", torch.float16, 90, 200, 16), temperature)


def test_tiles_of_a_program_without_a_share_mean_nothing(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan.prepare

    def prepare(*given: Any) -> tiles.Prepared:
        made = found(*given)
        parts = made.plan
        idle = torch.arange(len(parts.last_tile)) * parts.share >= parts.ends[-1]
        assert idle.any()
        parts.first_tile[idle], parts.last_tile[idle] = 0, 2**30
        return made

    monkeypatch.setattr(plan, "prepare", prepare)
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu("sm_90", 64))
    compare(rows, operands("voc", torch.bfloat16, 90, 200, 16), 0.1)


@pytest.mark.parametrize("programs", [1, 2])
def test_tiles_that_meet_nothing(
    rows: Rows, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles of label 4, between others of the same share."""
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu("sm_90", programs))
    *features, _, z, active = operands("few", torch.bfloat16, 192, 100, 16)
    y = torch.tensor([3, 4, 5]).repeat_interleave(64)
    loss, _ = compare(rows, (*features, y, z.fill_(4), torch.ones_like(active)), 0.1)
    assert not loss[64:128].any()
    assert loss[:64].all()
    assert loss[128:].all()


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("chosen", SCHEDULES, ids=str)
def test_any_schedule(
    rows: Rows, chosen: tuple[int, ...] | int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule(chosen, monkeypatch)
    use(SMALL._replace(stages=stages), monkeypatch)
    compare(rows, operands("few", torch.float16, 90, 150, 16), 0.01)


@pytest.mark.parametrize("chosen", SCHEDULES, ids=str)
def test_consumers_take_turns(
    rows: Rows, chosen: tuple[int, ...] | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule(chosen, monkeypatch)
    rows(*operands("few", torch.bfloat16, 90, 150, 16), 0.1)
    assert sum(map(len, Schedule.issued)) > 20
    for issued in Schedule.issued:
        assert set(issued[::2]) <= {"consumer 0"}
        assert set(issued[1::2]) <= {"consumer 1"}
        assert len(issued) % 2 == 0


def test_same_bits_on_every_run(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands("voc", torch.bfloat16, 90, 200, 16)
    first = rows(*given, 0.005)
    schedule(1, monkeypatch)
    again = rows(*given, 0.005)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, first, strict=True))


FILLED = "mbarrier.wait(filled.index(stage), (count // STAGES) & 1)"
EMPTIED = "mbarrier.wait(emptied.index(stage), ((count // STAGES) & 1) ^ 1)"
MY_TURN = "mbarrier.wait(my_turn, (count & 1) ^ (1 - HALF))"
LAST = "sums = warpgroup_mma_wait(0, deps=[sums_later])"
RELEASE = "mbarrier.arrive(emptied.index(held))"
INIT_EMPTIED = "init(emptied.index(stage), count=2"
TO_ANCHORS = "anchors_there.store(b_anchors)"
LAST_INIT = "mbarrier.init(turn1, count=1)"
FAULTS = {
    "a wrong parity of what is filled": (FILLED, FILLED.replace("& 1)", "& 1 ^ 1)")),
    "no wait for what is filled": (FILLED, "pass"),
    "no wait for what is emptied": (EMPTIED, "pass"),
    "a wrong parity of what is emptied": (EMPTIED, EMPTIED.replace(" ^ 1)", ")")),
    "too few bytes": ("BLOCK * D_PAD * 2", "BLOCK * D_PAD"),
    "too many bytes": ("BLOCK * D_PAD * 2", "BLOCK * D_PAD * 4"),
    "no wait for the first product": ("warpgroup_mma_wait(1, ", "warpgroup_mma_wait(2, "),
    "no wait for the second product": (LAST, LAST.replace("(0", "(1")),
    "a release before the wait": (f"{LAST}\n        {RELEASE}", f"{RELEASE}\n        {LAST}"),
    "no release": (RELEASE, "pass"),
    "the buffer of another block": ("there.index(held)", "there.index(stage)"),
    "an arrival too few": (INIT_EMPTIED, INIT_EMPTIED.replace("2", "1")),
    "a turn that is never passed": ("mbarrier.arrive(other_turn)", "pass"),
    "the first turn is nobody's": (MY_TURN, MY_TURN.replace("(1 - HALF)", "0")),
    "no fence after the anchors": (f"{TO_ANCHORS}\n            fence_async_shared()", TO_ANCHORS),
    "no fence after the init": (f"{LAST_INIT}\n    fence_async_shared()", LAST_INIT),
    "a mask too few": ("ROWS, BLOCK, True, OFFSET", "ROWS, BLOCK, False, OFFSET"),
    "no mask at the first block": ("  BLOCK, True, OFFSET", "  BLOCK, False, OFFSET"),
    "sums that do not shrink": ("sums *= gl", "_ = sums * gl"),
    "totals that do not shrink": ("total *= gl", "_ = total * gl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some schedule of the faulty kernel gives a wrong result or an error, and never hangs."""
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu("sm_90", 2))
    wrong = flat(emulated_gluon.launcher(*FAULTS[fault]).dc_loss_rows)

    def run() -> None:
        for chosen in SCHEDULES:
            schedule(chosen, monkeypatch)
            for m in (150, 10):
                compare(wrong, operands("few", torch.float16, 90, m, 16), 0.01)

    with pytest.raises((Deadlock, Misuse, AssertionError, IndexError)):
        run()
