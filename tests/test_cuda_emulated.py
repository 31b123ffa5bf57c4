"""The CUDA kernels on the CPU: csrc/cuda compiled for the emulated GPU of tests/emulated_gpu."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_eager import operands
from torch import Tensor

from cac_fast import cuda, reference

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Registers the operators of csrc/cuda/operator.cpp as torch.ops.cac_fast_emulated."""
    folder = tmp_path_factory.mktemp("emulated_gpu")
    package = Path(torch.__file__).parent
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-Wno-unknown-pragmas",
        "-DCAC_FAST_LIBRARY=cac_fast_emulated",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{ROOT / 'tests' / 'emulated_gpu'}",
        f"-I{ROOT / 'csrc' / 'cuda'}",
        f"-isystem{package / 'include'}",
        f"-I{sysconfig.get_path('include')}",
    ]

    def compile(source: Path) -> Path:
        compiled = folder / (source.stem + ".o")
        done = subprocess.run(
            [COMPILER, *flags, "-c", source, "-o", compiled], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return compiled

    sources = [
        ROOT / "tests" / "emulated_gpu" / "kernels.cpp",
        ROOT / "csrc" / "cuda" / "operator.cpp",
    ]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile, sources))
    path = folder / "emulated.so"
    libraries = [f"-L{package / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILER, "-shared", *objects, *libraries, "-o", path], check=True)
    torch.ops.load_library(path)


@pytest.fixture(autouse=True)
def setting(library: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulation in the place of the GPU, three programs, NaN in uninitialised buffers."""
    monkeypatch.setattr(cuda, "_operators", lambda: torch.ops.cac_fast_emulated)
    torch.ops.cac_fast_emulated.set(3, 0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def exact(given: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, Tensor]:
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    return reference.dc_loss_rows(*wide, temperature)


def error(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs).norm() / theirs.norm())


def compare(given: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient against float64, by the error of the reference in the same dtype."""
    dtype, active = given[0].dtype, given[-1]
    loss, gradient = cuda.dc_loss_rows(*given, temperature)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert not loss[~active].any()
    assert not gradient[~active].any()
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    true_loss, true_gradient = exact(given, temperature)
    assert true_loss.any()
    if dtype == torch.float32:
        bound = max(1e-6, 1e-7 / temperature)
        assert (loss - true_loss).norm() <= bound * true_loss.norm() + 1e-6
        assert error(gradient, true_gradient) <= bound
    else:
        loss_there, gradient_there = reference.dc_loss_rows(*given, temperature)
        assert error(loss, true_loss) <= 1.5 * error(loss_there, true_loss)
        assert error(gradient, true_gradient) <= 1.5 * error(gradient_there, true_gradient)
    return loss, gradient


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("labels", ["voc", "ids", "few", "one"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_label_layout(dtype: torch.dtype, labels: str) -> None:
    compare(operands(labels, dtype, 400, 300, 64), 0.1)


@pytest.mark.parametrize("dim", [17, 100, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_channels(dtype: torch.dtype, dim: int) -> None:
    for temperature in (0.1, 0.01):
        compare(operands("voc", dtype, 200, 120, dim), temperature)


def test_one_channel() -> None:
    compare(operands("voc", torch.float32, 40, 70, 1), 0.1)


# The largest logit that needs no offset lies between 1/0.1 and 1/0.09 in float16, else between
# 1/0.016 and 1/0.015.
@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.1, 0.09, 0.016, 0.015, 0.0005])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_temperature(dtype: torch.dtype, temperature: float) -> None:
    compare(operands("few", dtype, 60, 150, 48), temperature)


@pytest.mark.parametrize(("a", "m"), [(1, 1), (1, 300), (129, 64), (300, 1), (128, 128)])
def test_sizes_that_divide_nothing(a: int, m: int) -> None:
    *features, y, z, _ = operands("few", torch.bfloat16, a, m, 64)
    compare((*features, y, z.fill_(2), torch.ones(a, dtype=torch.bool)), 0.1)


def test_empty_sides() -> None:
    for a, m in ((0, 5), (5, 0), (0, 0)):
        loss, gradient = cuda.dc_loss_rows(*operands("voc", torch.float32, a, m, 16), 0.1)
        assert loss.shape == (a,)
        assert gradient.shape == (a, 16)
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_nothing_active_or_admitted(temperature: float) -> None:
    *features, y, z, active = operands("few", torch.bfloat16, 50, 60, 16)
    every = torch.ones_like(active)
    for labels, negative_labels, rows in (
        (y, z, torch.zeros_like(active)),
        (y, torch.full_like(z, -1), every),
        (torch.full_like(y, 7), torch.full_like(z, 7), every),
    ):
        loss, gradient = cuda.dc_loss_rows(*features, labels, negative_labels, rows, temperature)
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize("programs", [1, 2, 7, 40])
def test_any_number_of_programs(programs: int) -> None:
    torch.ops.cac_fast_emulated.set(programs, 0)
    for temperature in (0.1, 0.01):
        compare(operands("voc", torch.bfloat16, 700, 500, 64), temperature)


def test_a_tile_between_others_that_meets_nothing() -> None:
    *features, _, z, active = operands("voc", torch.bfloat16, 384, 192, 64)
    torch.ops.cac_fast_emulated.set(1, 0)
    labels = torch.arange(384) // 128
    compare((*features, labels, torch.ones_like(z), torch.ones_like(active)), 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_order_of_threads_and_copies(dtype: torch.dtype) -> None:
    given = operands("few", dtype, 300, 700, 64)
    for temperature in (0.1, 0.005):
        found = []
        for seed in range(3):
            torch.ops.cac_fast_emulated.set(3, seed)
            found.append(cuda.dc_loss_rows(*given, temperature))
        for loss, gradient in found[1:]:
            assert torch.equal(loss, found[0][0])
            assert torch.equal(gradient, found[0][1])


@pytest.fixture
def tf32() -> Iterator[Callable[[], None]]:
    """Allows TF32 when called, until the test ends."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda: setattr(matmul, "fp32_precision", "tf32")
    matmul.fp32_precision = before


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tf32_where_pytorch_allows_it(dim: int, tf32: Callable[[], None]) -> None:
    given = operands("voc", torch.float32, 300, 200, dim)
    _, true_gradient = exact(given, 0.1)
    _, plain = cuda.dc_loss_rows(*given, 0.1)
    tf32()
    _, gradient = cuda.dc_loss_rows(*given, 0.1)
    assert error(plain, true_gradient) < 1e-6 < error(gradient, true_gradient) < 2e-4


def test_extreme_labels_stay_apart() -> None:
    far = [-(2**63), -1, 0, 1, 2**60, 2**60 + 1, 2**62, 2**63 - 1]
    *features, _, _, _ = operands("few", torch.float32, 80, 160, 16)
    y, z = torch.tensor(far * 10), torch.tensor(far * 20)
    compare((*features, y, z, torch.arange(80) % 3 > 0), 0.1)


def test_views_of_any_layout() -> None:
    a, p, n, y, z, active = operands("voc", torch.float32, 90, 120, 16)
    plain = cuda.dc_loss_rows(a, p, n, y, z, active, 0.1)
    wide = torch.stack((p, p), dim=1).flatten(0, 1)
    turned = [features.T.contiguous().T for features in (a, p, n)]
    for a_view, p_view, n_view in ((turned[0], wide[::2], turned[2]), turned):
        views = cuda.dc_loss_rows(a_view, p_view, n_view, y, z, active, 0.1)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(views, plain, strict=True))


def test_a_small_loss_is_exact() -> None:
    *features, y, z, active = operands("voc", torch.float32, 40, 50, 16)
    anchors = features[0]
    given = (anchors, anchors, -anchors[:1].expand(50, 16).contiguous(), y, z + 30, active)
    rows = active & ((anchors @ anchors[0]) > 0.5)
    true_loss, _ = exact(given, 0.05)
    loss, _ = cuda.dc_loss_rows(*given, 0.05)
    assert rows.any()
    assert true_loss[rows].max() < 1e-7
    torch.testing.assert_close(loss[rows].double(), true_loss[rows], rtol=2e-5, atol=0)


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_nan_is_not_hidden(temperature: float) -> None:
    *features, labels, negative_labels, active = operands("few", torch.float32, 50, 200, 16)
    features[2][negative_labels == 2] = torch.nan
    assert (negative_labels == 2).any()
    for mine in cuda.dc_loss_rows(*features, labels, negative_labels, active, temperature):
        assert mine[active].isnan().all()
