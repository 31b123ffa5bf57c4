"""The eager back end against the reference, and what it computes and keeps in memory."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from rows_contract import Rows, RowsContract, dense, flat, operands
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cac_fast import ops
from cac_fast.backend import eager

eager_rows = flat(eager.dc_loss_rows)


@pytest.fixture
def rows() -> Rows:
    return partial(ops.dc_loss_rows, backend="eager")


class TestEager(RowsContract):
    drawn = 100, 600, 1500
    layout_sizes: ClassVar = [(300, 1000, 16)]
    temperature_size = (300, 1000, 16)


@pytest.mark.parametrize("tile", [(16, 32), (512, 1024)], ids=["small tile", "large tile"])
@pytest.mark.parametrize("temperature", [0.1, 0.02, 0.0014, 0.0005])
@pytest.mark.parametrize("labels", ["voc", "ids", "few", "one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eager_equals_reference(
    dtype: torch.dtype,
    labels: str,
    temperature: float,
    tile: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eager, "_CPU_TILE", tile)
    given = operands(labels, dtype)
    expected = ops.dc_loss_rows(*given, temperature, "reference")
    found = ops.dc_loss_rows(*given, temperature, "eager")
    inactive = ~given[-1]
    # Rounding of a logit of size 1/tau is rounding of the weights.
    tolerance = max(10, 1 / temperature) * torch.finfo(dtype).eps
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert mine.isfinite().all()
        assert theirs.any()
        assert not mine[inactive].any()
        assert not theirs[inactive].any()
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_eager_takes_labels_of_any_integer_type_and_coarser_negatives() -> None:
    a, p, n, y, z, active = operands("voc", torch.float32)
    n = n.bfloat16()
    expected = ops.dc_loss_rows(a, p, n.float(), y, z, active, 0.1, "reference")
    for labels in (y.int(), y.to(torch.uint8)):
        for backend in ("reference", "eager"):
            found = ops.dc_loss_rows(a, p, n, labels, z.to(torch.int16), active, 0.1, backend)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs)


def test_eager_keeps_the_inputs() -> None:
    given = operands("voc", torch.float32)
    before = [tensor.clone() for tensor in given]
    ops.dc_loss_rows(*given, 0.1, "eager")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(given, before, strict=True))


class Watch(TorchDispatchMode):
    """Size of the largest tensor, and rows and pairs of the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.rows = 0
        self.pairs = 0
        self.weighted_pairs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        name = func.overloadpacket
        if name is torch.ops.aten.mm:
            self.rows = max(self.rows, args[0].shape[0])
            self.pairs += args[0].shape[0] * args[1].shape[1]
        elif name in (torch.ops.aten.addmm_, torch.ops.aten.addmm):
            self.weighted_pairs += args[1].numel()
        return out


def test_eager_memory_is_bounded_by_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_CPU_TILE", (32, 64))
    a, m, d = 400, 2000, 2
    *given, active = operands("few", torch.float32, a, m, d)
    for temperature in (0.1, 0.001):
        with Watch() as watch:
            eager_rows(*given, torch.ones_like(active), temperature)
        # The labels are the largest argument here, 8 bytes each.
        assert watch.largest <= 8 * m
        assert watch.pairs > 0
    with Watch() as watch:
        dense(*given, active, 0.1)
    assert watch.largest >= 4 * a * m, "the watch sees what a dense back end makes"


def admitted_pairs(labels: Tensor, negative_labels: Tensor, active: Tensor) -> int:
    admitted = (negative_labels >= 0) & (negative_labels != labels[active].unsqueeze(1))
    return int(admitted.sum())


def test_eager_never_computes_excluded_pairs_of_large_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eager, "_CPU_TILE", (32, 64))
    for labels in ("few", "one"):
        given = operands(labels, torch.float32, 400, 2000, 2)
        with Watch() as watch:
            eager_rows(*given, 0.1)
        assert watch.pairs == watch.weighted_pairs == admitted_pairs(*given[3:])
        assert watch.pairs > 0


def test_eager_gives_half_a_tile_of_one_label_a_tile_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two groups of 16 would fit one tile of 32, at the price of excluded pairs; 50 need two.
    monkeypatch.setattr(eager, "_CPU_TILE", (32, 64))
    *features, _, negative_labels, _ = operands("few", torch.float32, 82, 500, 2)
    labels = torch.tensor([0] * 16 + [1] * 16 + [2] * 50)
    active = torch.ones(82, dtype=torch.bool)
    with Watch() as watch:
        eager_rows(*features, labels, negative_labels, active, 0.1)
    assert watch.pairs == admitted_pairs(labels, negative_labels, active)
    assert watch.rows <= 32


def test_eager_skips_most_excluded_pairs_on_voc() -> None:
    *given, _ = operands("voc", torch.float32, 2000, 8000, 2)
    active = torch.arange(2000) % 3 == 0
    with Watch() as watch:
        eager_rows(*given, active, 0.1)
    admitted = admitted_pairs(*given[3:], active)
    assert admitted <= watch.pairs == watch.weighted_pairs <= 1.05 * admitted
    assert watch.pairs < 0.5 * int(active.sum()) * 8000


def test_nothing_is_computed_without_an_active_anchor() -> None:
    *given, active = operands("voc", torch.float32)
    with Watch() as watch:
        loss, gradient = eager_rows(*given, torch.zeros_like(active), 0.1)
    assert watch.pairs == 0
    assert not loss.any()
    assert not gradient.any()
