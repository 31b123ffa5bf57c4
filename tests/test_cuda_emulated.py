"""The CUDA kernels on the CPU: csrc/cuda compiled for the emulated GPU of tests/emulated_gpu."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rows_contract import (
    DTYPES,
    HalfRowsContract,
    Rows,
    RowsContract,
    compare,
    error,
    exact,
    flat,
    operands,
)
from torch import Tensor

from cac_fast.backend import cuda

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
        "-DCAC_FAST_DEVICE=CPU",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{ROOT / 'tests' / 'emulated_gpu'}",
        f"-I{ROOT / 'csrc' / 'cuda'}",
        f"-isystem{package / 'include'}",
        f"-I{sysconfig.get_path('include')}",
    ]

    def compile(source: Path) -> Path:
        compiled = folder / f"{source.parent.name}_{source.stem}.o"
        done = subprocess.run(
            [COMPILER, *flags, "-c", source, "-o", compiled], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return compiled

    sources = [
        ROOT / "tests" / "emulated_gpu" / "kernels.cpp",
        ROOT / "tests" / "emulated_gpu" / "sm90" / "kernels.cpp",
        ROOT / "csrc" / "cuda" / "operator.cpp",
    ]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile, sources))
    path = folder / "emulated.so"
    libraries = [f"-L{package / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILER, "-shared", *objects, *libraries, "-o", path], check=True)
    torch.ops.load_library(path)


@pytest.fixture(autouse=True)
def setting(library: None, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation in the place of the GPU, three programs."""
    monkeypatch.setattr(cuda, "_operators", lambda: torch.ops.cac_fast_emulated)
    set_emulation(3, 0)


@pytest.fixture
def rows() -> Rows:
    return SM_80


def set_emulation(programs: int, seed: int) -> None:
    """So many programs at a time; the seed of the order of threads and copies."""
    torch.ops.cac_fast_emulated.set(programs, seed)
    cuda._sizes.cache_clear()


class TestEmulated(RowsContract):
    drawn = 15, 100, 200
    layout_sizes: ClassVar = [(400, 300, 64)]
    layout_temperatures = (0.1,)
    temperature_size = (60, 150, 48)


SM_80 = flat(cuda.dc_loss_rows)
SM_90A = flat(partial(cuda.dc_loss_rows, sm_90a=True))


class TestEmulatedSm90(HalfRowsContract):
    drawn = TestEmulated.drawn
    layout_sizes = TestEmulated.layout_sizes
    layout_temperatures = TestEmulated.layout_temperatures
    temperature_size = TestEmulated.temperature_size

    @pytest.fixture
    def rows(self) -> Rows:
        return SM_90A


@pytest.mark.parametrize("dim", [17, 100, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_channels(rows: Rows, dtype: torch.dtype, dim: int) -> None:
    for temperature in (0.1, 0.01):
        compare(rows, operands("voc", dtype, 200, 120, dim), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_high_temperature(rows: Rows, dtype: torch.dtype) -> None:
    compare(rows, operands("few", dtype, 60, 150, 48), 10.0)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_channels_of_sm_90a(dtype: torch.dtype, dim: int) -> None:
    for temperature in (0.1, 0.01):
        compare(SM_90A, operands("voc", dtype, 200, 1300, dim), temperature)


both = pytest.mark.parametrize("rows", [SM_80, SM_90A], ids=["sm_80", "sm_90a"])


@both
@pytest.mark.parametrize(("a", "m"), [(1, 1), (1, 300), (129, 64), (300, 1), (128, 128)])
def test_sizes_that_divide_nothing(rows: Rows, a: int, m: int) -> None:
    *features, y, z, _ = operands("few", torch.bfloat16, a, m, 64)
    compare(rows, (*features, y, z.fill_(2), torch.ones(a, dtype=torch.bool)), 0.1)


@both
@pytest.mark.parametrize("programs", [1, 2, 7, 40])
def test_any_number_of_programs(rows: Rows, programs: int) -> None:
    set_emulation(programs, 0)
    for temperature in (0.1, 0.01):
        compare(rows, operands("voc", torch.bfloat16, 700, 500, 64), temperature)


@both
def test_a_tile_between_others_that_meets_nothing(rows: Rows) -> None:
    *features, _, z, active = operands("voc", torch.bfloat16, 384, 192, 64)
    set_emulation(1, 0)
    labels = torch.arange(384) // 128
    compare(rows, (*features, labels, torch.ones_like(z), torch.ones_like(active)), 0.1)


def test_same_bits_in_any_order_on_sm_90a() -> None:
    check_same_bits(SM_90A, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_order_of_threads_and_copies(rows: Rows, dtype: torch.dtype) -> None:
    check_same_bits(rows, dtype)


def check_same_bits(rows: Rows, dtype: torch.dtype) -> None:
    given = operands("few", dtype, 300, 700, 64)
    for temperature in (0.1, 0.005):
        found = []
        for seed in range(3):
            set_emulation(3, seed)
            found.append(rows(*given, temperature))
        for loss, gradient in found[1:]:
            assert torch.equal(loss, found[0][0])
            assert torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tf32_where_pytorch_allows_it(rows: Rows, dim: int, tf32: Callable[[], None]) -> None:
    given = operands("voc", torch.float32, 300, 200, dim)
    _, true_gradient = exact(given, 0.1)
    _, plain = rows(*given, 0.1)
    tf32()
    _, gradient = rows(*given, 0.1)
    assert error(plain, true_gradient) < 1e-6 < error(gradient, true_gradient) < 2e-4


def test_the_path_for_sm_90a_takes_16_bits() -> None:
    with pytest.raises(ValueError, match="cuda:sm_90a takes bfloat16 or float16 anchors"):
        SM_90A(*operands("few", torch.float32, 130, 70, 16), 0.1)


def test_the_operator_checks_what_it_is_given(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    operators, caught = torch.ops.cac_fast_emulated, []

    def catch(*arguments: Any) -> tuple[Tensor, Tensor]:
        caught.extend(arguments)
        return operators.dc_loss_rows_cuda(*arguments)

    between = SimpleNamespace(
        dc_loss_sizes_cuda=operators.dc_loss_sizes_cuda, dc_loss_rows_cuda=catch
    )
    monkeypatch.setattr(cuda, "_operators", lambda: between)
    rows(*operands("few", torch.float32, 130, 70, 16), 0.1)
    for place, wrong, said in (
        (0, lambda anchors: anchors[:-1], "ordered anchors must be padded to whole groups"),
        (0, lambda anchors: anchors.repeat(2, 1), "not of the same size"),
        (1, lambda positives: positives.half(), "positives must be a matrix of the anchors' dtype"),
        (1, lambda positives: positives.repeat(1, 5), "not of the same size"),
        (2, lambda negatives: negatives[:, 1:], "ordered negatives must be padded"),
        (3, lambda order: order[1:], "of 130 elements, not of 129"),
        (5, lambda excluded_to: excluded_to.repeat(2)[::2], "must be contiguous"),
        (9, lambda ends: ends[:0], "must have tiles"),
    ):
        given = list(caught)
        given[place] = wrong(given[place])
        with pytest.raises(ValueError, match=said):
            operators.dc_loss_rows_cuda(*given)
