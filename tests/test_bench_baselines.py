"""The baselines of the loss bench, and what it measures of their memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rows_contract import dense
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib import baselines, cases, measure, providers

CPU = torch.device("cpu")
SMALL = cases.Case("small", 90, 400, "voc", "float32", channels=16)
BASELINES = ("dense", "compiled", "chunked", "flex")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """A baseline with chunks of 150 negatives; compiled without a C++ compiler."""
    monkeypatch.setattr(baselines, "CHUNK", 150)
    quick = {"backend": "aot_eager", "dynamic": True}
    monkeypatch.setattr(baselines, "_compile", lambda function: torch.compile(function, **quick))
    return lambda name, operands: getattr(baselines, name)(*operands)


def exact(operands: cases.Operands) -> cases.Operands:
    features = ("anchors", "positives", "negatives")
    return operands._replace(**{name: getattr(operands, name).double() for name in features})


def assert_close(found: tuple[Tensor, Tensor], operands: cases.Operands, eps: float) -> None:
    """Relative to 80 eps; a loss is a difference of logits up to 10, so to 10 eps absolute."""
    expected = dense(*exact(operands))
    for mine, theirs, absolute in zip(found, expected, (10 * eps, 0), strict=True):
        assert not mine[~operands.active].any()
        rows = int(operands.active.sum())
        assert (mine - theirs).norm() <= 80 * eps * theirs.norm() + absolute * rows**0.5


@pytest.mark.parametrize("labels", cases.LABELS)
@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_baseline_equals_reference(run, name: str, labels: str) -> None:
    operands = cases.make_operands(replace(SMALL, labels=labels), CPU)
    operands.negative_labels[::7] = -1
    assert dense(*operands)[0].any()
    assert_close(run(name, exact(operands)), operands, 2.3e-16)
    found = run(name, operands)
    assert [values.dtype for values in found] == [torch.float32] * 2
    assert_close(found, operands, 1.2e-7)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_baseline_where_nothing_is_admitted(run, name: str) -> None:
    operands = exact(cases.make_operands(SMALL, CPU))
    nobody = operands._replace(negative_labels=torch.full((400,), -1))
    empty = operands._replace(
        negatives=operands.negatives[:0], negative_labels=operands.negative_labels[:0]
    )
    asleep = operands._replace(active=torch.zeros(90, dtype=torch.bool))
    for given in (nobody, empty, asleep):
        loss, gradient = run(name, given)
        assert loss.shape == (90,)
        assert gradient.shape == (90, 16)
        assert not loss.any()
        assert gradient.abs().max() < 1e-14


class Products(TorchDispatchMode):
    """Pairs of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.pairs.append(left.shape[0] * left.shape[1] * right.shape[1] // SMALL.channels)
        return func(*args, **(kwargs or {}))


def test_chunked_does_what_the_authors_do(run) -> None:
    operands = cases.make_operands(SMALL, CPU)
    with Products() as products:
        run("chunked", operands)
    # Forward, again in backward, and the gradient: all anchors, in chunks of 150, 150 and 100.
    assert sorted(products.pairs) == sorted(3 * [90 * 150, 90 * 150, 90 * 100])


def test_bare_products_have_the_admitted_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.PRODUCT_TILES, "cpu", [(8, 32), (200, 500)])
    operands = cases.make_operands(SMALL, CPU)
    active = operands.rows(operands.active)
    admitted = active.negative_labels != active.anchor_labels.unsqueeze(1)
    assert operands.admitted == int(admitted.sum()) > 0
    for bare in (providers.Products(operands, 8, 32), providers.fastest_products(operands)):
        with Products() as products:
            bare()
        assert abs(sum(products.pairs) - 2 * operands.admitted) <= int(operands.active.sum())


def test_peak_memory_is_seen() -> None:
    if not (measure.PROC / "self/clear_refs").exists():
        pytest.skip("not Linux")
    kept = torch.ones(2_000_000)
    for size in (30, 10):

        def call(size: int = size) -> float:
            return float((torch.ones(size * 250_000) + kept[0]).sum())

        result, peak = measure.peak_extra_bytes(call, CPU)
        assert result == size * 500_000
        # The kernel counts pages in batches.
        assert 2 * size * 1e6 - 1e6 <= peak <= 2 * size * 1e6 + 4e6
