"""The check of a back end on the machine it runs on."""

from __future__ import annotations

import re

import pytest
import torch
from stand_ins import change_back_end
from torch import Tensor

import cac_fast.backend.reference
from cac_fast import VerificationError, _extension, backends, tiles, verify
from cac_fast.backend import BACKENDS
from cac_fast.operands import Operands
from cac_fast.verification import QUICK, THOROUGH, make_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "reference", "eager", "cpp"])
@pytest.mark.parametrize("temperature", [1e-3, 0.1])
def test_right_back_ends(backend: str, dtype: torch.dtype, temperature: float) -> None:
    if missing := backends().get(backend):
        pytest.skip(missing)
    found = verify("cpu", dtype, backend, dim=48, temperature=temperature)
    assert backend in ("auto", found.backend)
    assert found.gradient_error <= 1.5 * found.plain_gradient_error + 1e-6 / temperature
    with torch.autocast("cpu"):
        assert verify("cpu", dtype, backend, dim=48, temperature=temperature) == found


def test_bfloat16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := backends()["cpp"]:
        pytest.skip(missing)
    monkeypatch.setattr(_extension, "bfloat16_units", lambda: True)
    for temperature in (1e-3, 0.1, 1.0):
        verify(dtype=torch.bfloat16, backend="cpp", temperature=temperature)


def test_lowest_temperature() -> None:
    for dtype in DTYPES[:3]:
        verify(dtype=dtype, temperature=1e-6)


def test_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    verify()
    assert torch.equal(torch.get_rng_state(), before)


def broken(rows: object, wrong: str) -> object:
    """A back end in which 32 active anchors go wrong, as if they had not met 64 negatives."""

    def broken_rows(given: Operands) -> tuple[Tensor, Tensor]:
        _, _, _, anchor_labels, negative_labels, active, _ = given
        loss, gradient = rows(given)
        tile = (active & (anchor_labels > 0)).nonzero().flatten()[:32]
        unmet = negative_labels.clone()
        unmet[(negative_labels == 0).nonzero().flatten()[:64]] = -1
        less_loss, less_gradient = rows(given._replace(negative_labels=unmet))
        if wrong == "loss":
            loss[tile] = less_loss[tile]
        elif wrong == "gradient":
            gradient[tile] = less_gradient[tile]
        elif wrong == "NaN":
            gradient[tile[0], 0] = torch.nan
        else:
            gradient[(~active).nonzero()[0]] = 1.0
        return loss, gradient

    return broken_rows


@pytest.mark.parametrize("wrong", ["loss", "gradient", "NaN", "inactive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_block_that_is_not_met(
    monkeypatch: pytest.MonkeyPatch, wrong: str, dtype: torch.dtype
) -> None:
    right = BACKENDS["eager"].load().rows
    change_back_end(monkeypatch, "eager", rows=broken(right, wrong))
    what = "loss" if wrong == "loss" else "gradient"
    with pytest.raises(VerificationError, match=f"'eager' is wrong on cpu: its {what} is"):
        verify(dtype=dtype, backend="eager")


@pytest.mark.parametrize(("sizes", "programs", "blocks"), [(THOROUGH, 3 * 132, 5), (QUICK, 132, 3)])
def test_gpus_meet_several_blocks_a_program(
    sizes: dict[str, tuple[int, int]], programs: int, blocks: int
) -> None:
    on_gpu = {"cpu": sizes["cuda"]}
    *_, labels, negative_labels, active, _ = make_case(
        on_gpu, torch.device("cpu"), torch.float32, dim=1, temperature=0.1
    )
    plan = tiles.plan(tiles.order_by_label(labels, negative_labels, active), 128, 64, programs)
    assert plan.share >= blocks
    assert (plan.last_tile > plan.first_tile).sum() > 10


def test_comparison_that_fails_does_not_blame_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(cac_fast.backend.reference, "dc_loss_rows", full)
    message = "'eager' cannot be compared with float64 on cpu (MemoryError: no room)"
    with pytest.raises(VerificationError, match=re.escape(message)):
        verify(backend="eager")


def test_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*_):
        raise MemoryError("out of shared memory\nrequired: 300 kB")

    change_back_end(monkeypatch, "eager", rows=rows)
    with pytest.raises(VerificationError, match="'eager' fails on cpu") as e:
        verify(backend="eager")
    assert str(e.value).endswith("(MemoryError: out of shared memory)")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"backend": "tritn"}, "backend must be one of"),
        ({"temperature": 0}, "temperature"),
        ({"dtype": torch.int32}, "floating point"),
        ({"dim": 0}, "dim must be at least 1"),
    ],
)
def test_bad_choices(choice: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(**choice)
