"""The Triton kernels on the CPU, under Triton's interpreter; test_triton.py runs this file."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from rows_contract import Rows, RowsContract, compare, flat, operands

from cac_fast import ops, verify
from cac_fast.backend import triton
from cac_fast.kernels import configs

# Small tiles, so that a few hundred rows make many of them.
SMALL = configs.Config(tile=16, block=32, warps=4, stages=2, programs=1)


@pytest.fixture(autouse=True)
def setting(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles."""
    monkeypatch.setattr(configs, "find", lambda *_: SMALL)


@pytest.fixture
def rows() -> Rows:
    return flat(triton.dc_loss_rows)


class TestInterpreted(RowsContract):
    drawn = 15, 60, 120
    layout_sizes: ClassVar = [(90, 200, 16)]
    temperature_size = (60, 90, 16)


@pytest.mark.parametrize("dim", [17, 32, 64, 100, 128, 256])
def test_any_number_of_channels(rows: Rows, dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compare(rows, operands("voc", dtype, 40, 70, dim), 0.1)


@pytest.mark.parametrize(("a", "m"), [(1, 1), (1, 300), (33, 16), (200, 1), (32, 32), (31, 47)])
def test_sizes_that_divide_nothing(rows: Rows, a: int, m: int) -> None:
    *features, y, z, _ = operands("few", torch.float32, a, m, 16)
    compare(rows, (*features, y, z.fill_(2), torch.ones(a, dtype=torch.bool)), 0.1)


@pytest.mark.parametrize("programs", [1, 2, 7, 64])
def test_any_number_of_programs(rows: Rows, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu("gfx", programs))
    for temperature in (0.1, 0.01):
        compare(rows, operands("voc", torch.float32, 90, 200, 16), temperature)


def test_loads_through_tensor_descriptors(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu("sm_90", 3))
    for dim in (16, 100):
        compare(rows, operands("voc", torch.bfloat16, 60, 90, dim), 0.1)


def test_label_that_breaks_the_bound_counts_as_none(rows: Rows) -> None:
    *features, y, z, active = operands("few", torch.float32, 60, 90, 16)
    far, none = z.masked_fill(z == 2, 300), z.masked_fill(z == 2, -1)
    found, expected = (rows(*features, y, labels, active, 0.1, classes=3) for labels in (far, none))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_same_bits_on_every_run(rows: Rows) -> None:
    given = operands("voc", torch.bfloat16, 90, 200, 16)
    for temperature in (0.1, 0.005):
        first, second = (rows(*given, temperature) for _ in range(2))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def test_verification() -> None:
    assert verify("cpu", torch.bfloat16, "triton", dim=16).backend == "triton"


def test_serves_the_operator_and_its_autograd() -> None:
    anchors, *given = operands("voc", torch.float32, 60, 90, 16)
    upstream = torch.rand(60, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad(
            ops.dc_loss_rows(leaf, *given, 0.1, backend=backend)[0], leaf, upstream
        )[0]
        for backend in ("triton", "reference")
        for leaf in [anchors.clone().requires_grad_()]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
