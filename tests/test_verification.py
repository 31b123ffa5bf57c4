"""The check of a back end on the machine it runs on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cac_fast import backends, verify
from cac_fast.dispatch import BACKENDS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference", "eager", "cpp"])
def test_back_ends_are_right(backend: str, dtype: torch.dtype) -> None:
    if missing := backends().get(backend):
        pytest.skip(missing)
    found = verify("cpu", dtype, backend, dim=48)
    assert backend in ("auto", found.backend)
    assert found.gradient_error <= 1.5 * found.plain_gradient_error + 1e-6
    assert found.loss_error <= 1.5 * found.plain_loss_error + 1e-6


def test_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    verify()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", ["loss", "gradient", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_tile_is_found(
    monkeypatch: pytest.MonkeyPatch, wrong: str, dtype: torch.dtype
) -> None:
    right = BACKENDS["eager"]

    def rows(*given):
        loss, gradient = right.rows(*given)
        if wrong == "loss":
            loss[:32] *= 0.9
        elif wrong == "gradient":  # as if one block of negatives were not met
            labels = given[4].clone()
            labels[labels == 0] = labels[labels == 0].index_fill(0, torch.arange(64), -1)
            gradient = right.rows(*given[:4], labels, *given[5:])[1]
        else:
            gradient[int(given[5].nonzero()[0]), 0] = torch.nan
        return loss, gradient

    monkeypatch.setitem(BACKENDS, "eager", replace(right, rows=rows))
    what = "loss" if wrong == "loss" else "gradient"
    with pytest.raises(RuntimeError, match=f"back end 'eager' is wrong on cpu: its {what} is"):
        verify(dtype=dtype, backend="eager")


def test_failure_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*_):
        raise MemoryError("out of shared memory\nrequired: 300 kB")

    monkeypatch.setitem(BACKENDS, "eager", replace(BACKENDS["eager"], rows=rows))
    with pytest.raises(RuntimeError, match="'eager' fails on cpu") as e:
        verify(backend="eager")
    assert str(e.value).endswith("(MemoryError: out of shared memory)")


def test_bad_choices() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        verify(backend="tritn")
    with pytest.raises(ValueError, match="temperature"):
        verify(temperature=0)
