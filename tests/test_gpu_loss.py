"""The Triton and CUDA back ends on a GPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import pytest
import torch
from rows_contract import LAYOUTS, HalfRowsContract, Rows, RowsContract, compare, error, operands

import cac_fast
from cac_fast import ops, tiles
from cac_fast.backend import triton as kernels
from cac_fast.operands import Operands

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("poisoned"),
]


FLOAT32 = ["triton", "cuda"]
HALF_ONLY = ["triton:gluon", "cuda:sm_90a"]
TAKES_FLOAT32 = pytest.mark.parametrize("rows", FLOAT32, indirect=True)
TAKES_HALF_ONLY = pytest.mark.parametrize("rows", HALF_ONLY, indirect=True)


@pytest.fixture(params=[*FLOAT32, *HALF_ONLY])
def rows(request: pytest.FixtureRequest) -> Rows:
    """A back end that is there."""
    if missing := cac_fast.backends()[request.param]:
        pytest.skip(f"{request.param}: {missing}")
    return partial(ops.dc_loss_rows, backend=request.param)


class OnGpu:
    device = "cuda"
    drawn = 15, 2000, 5000  # Triton compiles its kernels for each D
    layout_sizes: ClassVar = [(1500, 5000, dim) for dim in (16, 64, 100, 128, 256)]
    temperature_size = (700, 3000, 128)


@TAKES_FLOAT32
class TestOnGpu(OnGpu, RowsContract):
    """In all three dtypes."""


@TAKES_HALF_ONLY
class TestHalfOnGpu(OnGpu, HalfRowsContract):
    """In bfloat16 and float16."""


@pytest.mark.parametrize("labels", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_plan_by_triton_is_that_of_pytorch(labels: str, dtype: torch.dtype) -> None:
    """All paths stand on it."""
    prepare = kernels.preparation(torch.device("cuda"))
    if prepare is tiles.prepare:
        pytest.skip(f"triton: {cac_fast.backends()['triton']}")
    for a, m in ((1, 2), (1500, 5000), (40_000, 700)):
        anchors, positives, negatives, y, z, active = operands(
            labels, torch.bfloat16, a, m, 100, device="cuda"
        )
        sizes = tiles.Sizes(128, 64, 132, 128)
        of_dtype = (each.clamp_max(100).to(dtype) for each in (y, z))
        given = Operands(anchors, positives, negatives, *of_dtype, active, 0.1)
        found, expected = (
            make(given, sizes, copy_anchors=True) for make in (prepare, tiles.prepare)
        )
        for mine, theirs in (
            (found.order, expected.order),
            (found.plan, expected.plan),
            (found[2:], expected[2:]),
        ):
            for one, other in zip(mine, theirs, strict=True):
                assert torch.equal(one, other.view(one.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [48, 128, 256])
def test_verification(rows: Rows, dtype: torch.dtype, dim: int) -> None:
    name = rows.keywords["backend"]
    if name in HALF_ONLY and dtype == torch.float32:
        with pytest.raises(ValueError, match="float32"):
            cac_fast.verify("cuda", dtype, name, dim)
        return
    assert cac_fast.verify("cuda", dtype, name, dim).backend == name


@pytest.mark.parametrize(("a", "m"), [(1, 1), (1, 70_000), (129, 64), (5000, 1), (0, 9), (9, 0)])
def test_sizes_that_divide_nothing(rows: Rows, a: int, m: int) -> None:
    *features, y, z, active = operands("few", torch.bfloat16, a, m, 128, device="cuda")
    given = (*features, y, z.fill_(2), torch.ones_like(active))
    if a and m:
        compare(rows, given, 0.1)
    else:
        assert not any(tensor.any() for tensor in rows(*given, 0.1))


@TAKES_FLOAT32
def test_tf32_only_where_pytorch_allows_it(rows: Rows, tf32: Callable[[], None]) -> None:
    given = operands("voc", torch.float32, 700, 3000, 128, device="cuda")
    plain = rows(*given, 0.1)
    tf32()
    _, gradient = rows(*given, 0.1)
    assert 1e-6 < error(gradient, plain[1].double()) < 1e-2


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_same_bits_on_every_run(rows: Rows, temperature: float) -> None:
    given = operands("voc", torch.bfloat16, 3000, 20_000, 128, device="cuda")
    first = rows(*given, temperature)
    for _ in range(5):
        again = rows(*given, temperature)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, first, strict=True))


def test_never_asks_the_device(rows: Rows) -> None:
    given = operands("voc", torch.bfloat16, 3000, 5000, 100, device="cuda")
    rows(*given, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows(*given, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("classes", [None, 21])
def test_a_captured_step_follows_its_inputs(rows: Rows, classes: int | None) -> None:
    """One CUDA graph serves any number of active anchors and any labels."""
    given = operands("voc", torch.bfloat16, 3000, 5000, 128, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rows(*given, 0.1, classes=classes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rows(*given, 0.1, classes=classes)
    *_, labels, negative_labels, active = given
    for change in (
        lambda: active.fill_(True),
        lambda: labels.fill_(3),
        lambda: negative_labels.fill_(-1),
        lambda: active.fill_(False),
    ):
        change()
        graph.replay()
        expected = rows(*given, 0.1, classes=classes)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_on_a_stream_of_its_own(rows: Rows) -> None:
    given = operands("voc", torch.bfloat16, 700, 3000, 64, device="cuda")
    expected = rows(*given, 0.1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = rows(*given, 0.1)
    stream.synchronize()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_more_features_than_32_bits_can_address(rows: Rows) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    m, dim = 2**25 // 3, 256
    a, p, *_ = operands("few", torch.bfloat16, 64, 4, dim, device="cuda")
    y = torch.zeros(64, dtype=torch.int64, device="cuda")
    active = torch.ones_like(y, dtype=torch.bool)
    # Sorted by label, the three that are admitted come last.
    negatives = torch.zeros(m, dim, dtype=torch.bfloat16, device="cuda")
    z = torch.zeros(m, dtype=torch.int64, device="cuda")
    negatives[100:103], z[100:103] = a[:3], 5
    found = rows(a, p, negatives, y, z, active, 0.1)
    few = rows(a, p, negatives[100:103], y, z[100:103], active, 0.1)
    assert found[0].all()
    for mine, theirs in zip(found, few, strict=True):
        torch.testing.assert_close(mine, theirs)
