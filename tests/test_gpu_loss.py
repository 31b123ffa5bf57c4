"""The Triton and CUDA back ends on a GPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from test_eager import operands
from torch import Tensor

import cac_fast
from cac_fast import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """NaN in every buffer that is not initialised."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


Run = Callable[[tuple[Tensor, ...], float], tuple[Tensor, Tensor]]


@pytest.fixture(params=["triton", "cuda"])
def run(request: pytest.FixtureRequest) -> Run:
    """A back end that is there."""
    if missing := cac_fast.backends()[request.param]:
        pytest.skip(f"{request.param}: {missing}")
    return lambda given, temperature: ops.dc_loss_rows(*given, temperature, backend=request.param)


@pytest.fixture
def tf32() -> Iterator[Callable[[], None]]:
    """Allows TF32 when called, until the test ends."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda: setattr(matmul, "fp32_precision", "tf32")
    matmul.fp32_precision = before


def on_gpu(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.cuda() for tensor in given)


def error(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs).norm() / theirs.norm())


def compare(run: Run, given: tuple[Tensor, ...], temperature: float) -> None:
    """Against float64, by the error of the reference in the same dtype."""
    dtype, active = given[0].dtype, given[-1]
    loss, gradient = run(given, temperature)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    true_loss, true_gradient = ops.dc_loss_rows(*wide, temperature, backend="reference")
    assert not loss[~active].any()
    assert not gradient[~active].any()
    if dtype == torch.float32:
        bound = max(1e-6, 1e-7 / temperature)
        assert (loss - true_loss).norm() <= bound * true_loss.norm() + 1e-6
        assert error(gradient, true_gradient) <= bound
    else:
        there = ops.dc_loss_rows(*given, temperature, backend="reference")
        assert error(loss, true_loss) <= 1.5 * error(there[0], true_loss)
        assert error(gradient, true_gradient) <= 1.5 * error(there[1], true_gradient)
        cosine = torch.cosine_similarity(gradient.double().flatten(), true_gradient.flatten(), 0)
        assert cosine > 0.9999


@pytest.mark.parametrize("dim", [16, 64, 100, 128, 256])
@pytest.mark.parametrize("labels", ["voc", "ids", "few", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_reference(run: Run, dtype: torch.dtype, labels: str, dim: int) -> None:
    for temperature in (0.1, 0.01):
        compare(run, on_gpu(operands(labels, dtype, 1500, 5000, dim)), temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.09, 0.016, 0.015, 0.0005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_temperature(run: Run, dtype: torch.dtype, temperature: float) -> None:
    compare(run, on_gpu(operands("voc", dtype, 700, 3000, 128)), temperature)


@pytest.mark.parametrize(("a", "m"), [(1, 1), (1, 70_000), (129, 64), (5000, 1), (0, 9), (9, 0)])
def test_sizes_that_divide_nothing(run: Run, a: int, m: int) -> None:
    *features, y, z, _ = operands("few", torch.bfloat16, a, m, 128)
    given = on_gpu((*features, y, z.fill_(2), torch.ones(a, dtype=torch.bool)))
    if a and m:
        compare(run, given, 0.1)
    else:
        assert not any(tensor.any() for tensor in run(given, 0.1))


def test_tf32_only_where_pytorch_allows_it(run: Run, tf32: Callable[[], None]) -> None:
    given = on_gpu(operands("voc", torch.float32, 700, 3000, 128))
    plain = run(given, 0.1)
    tf32()
    _, gradient = run(given, 0.1)
    assert 1e-6 < error(gradient, plain[1].double()) < 1e-2


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_same_bits_on_every_run(run: Run, temperature: float) -> None:
    given = on_gpu(operands("voc", torch.bfloat16, 3000, 20_000, 128))
    first = run(given, temperature)
    for _ in range(5):
        again = run(given, temperature)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, first, strict=True))


def test_never_asks_the_device(run: Run) -> None:
    given = on_gpu(operands("voc", torch.bfloat16, 3000, 5000, 100))
    run(given, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(given, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_follows_its_inputs(run: Run) -> None:
    """One CUDA graph serves any number of active anchors and any labels."""
    given = on_gpu(operands("voc", torch.bfloat16, 3000, 5000, 128))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(given, 0.1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(given, 0.1)
    *_, labels, negative_labels, active = given
    for change in (
        lambda: active.fill_(True),
        lambda: labels.fill_(3),
        lambda: negative_labels.fill_(-1),
        lambda: active.fill_(False),
    ):
        change()
        graph.replay()
        expected = run(given, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_on_a_stream_of_its_own(run: Run) -> None:
    given = on_gpu(operands("voc", torch.float32, 700, 3000, 64))
    expected = run(given, 0.1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = run(given, 0.1)
    stream.synchronize()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_more_features_than_32_bits_can_address(run: Run) -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    m, dim = 2**25 // 3, 256
    a, p, *_ = on_gpu(operands("few", torch.bfloat16, 64, 4, dim))
    y = torch.zeros(64, dtype=torch.int64, device="cuda")
    active = torch.ones_like(y, dtype=torch.bool)
    # Sorted by label, the three that are admitted come last.
    negatives = torch.zeros(m, dim, dtype=torch.bfloat16, device="cuda")
    z = torch.zeros(m, dtype=torch.int64, device="cuda")
    negatives[100:103], z[100:103] = a[:3], 5
    found = run((a, p, negatives, y, z, active), 0.1)
    few = run((a, p, negatives[100:103], y, z[100:103], active), 0.1)
    assert found[0].all()
    for mine, theirs in zip(found, few, strict=True):
        torch.testing.assert_close(mine, theirs)
