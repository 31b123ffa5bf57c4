"""The CUDA back end's build: what setup.py finds and says, and what the compiler made of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cac_fast
from cac_fast import _extension
from cac_fast.backend import BACKENDS, cuda

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc" / "cuda"

built = pytest.mark.skipif(
    _extension.unavailable("_C_cuda") is not None, reason=str(_extension.unavailable("_C_cuda"))
)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the path")


def find_cuobjdump() -> str | None:
    """Triton's, since the toolkit's pip packages and minimal installs have none."""
    triton = pytest.importorskip("triton")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump", path=f"{folder}{os.pathsep}{os.environ['PATH']}")


def inspect(*options: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump")
    module = sys.modules["cac_fast._C_cuda"].__file__
    return subprocess.run(
        [tool, *options, module], capture_output=True, text=True, check=True
    ).stdout


@needs_nvcc
def test_make_setup_builds_it() -> None:
    if Path(sys.prefix).parent != ROOT or not Path(sys.prefix, ".ready").exists():
        pytest.skip("this environment was not made by make")
    if torch.version.cuda is None or os.environ.get("CAC_FAST_CUDA") == "0":
        pytest.skip("not asked for, or not possible with this PyTorch")
    assert _extension.unavailable("_C_cuda") is None


@needs_nvcc
@pytest.mark.parametrize(
    "source", sorted(str(path.relative_to(CSRC)) for path in CSRC.glob("**/*.cu"))
)
def test_kernels_are_cpp17_too(source: str, tmp_path: Path) -> None:
    """Less lenient than the C++20 of the build: a template must be declared before its use."""
    options = ["-std=c++17", "-arch=sm_90a", "-fdevice-syntax-only", "--cuda"]
    folders = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{CSRC}"]
    done = subprocess.run(
        ["nvcc", *options, *folders, CSRC / source, "-o", tmp_path / "front_end.ii"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@built
def test_no_kernel_spills_a_register() -> None:
    usage = inspect("-res-usage")
    kernels = 0
    for image in usage.split("Fatbin elf code:")[1:]:
        for name, registers, stack, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", image
        ):
            assert (int(stack), int(local)) == (0, 0), name
            assert int(registers) <= 255
            kernels += "dc_loss_partialI" in name
    archs = [arch for arch in cac_fast.build_info()["cuda_archs"] if arch[0].isdigit()]
    # Four kinds of products, three numbers of channels, with an offset and without.
    assert kernels == 4 * 3 * 2 * len(archs)


@built
def test_products_run_on_the_matrix_unit_from_shared_memory() -> None:
    arch = re.search(r"arch = (sm_\w+)", inspect("-res-usage"))[1]
    seen = 0
    for kernel in inspect("-sass", "-arch", arch).split("Function : ")[1:]:
        name, code = kernel.split("\n", 1)
        if "dc_loss_partialI" not in name:
            continue
        seen += 1
        assert not re.search(r"\b(STL|LDL)\b", code), name
        assert "LDGSTS.E.BYPASS.128" in code, name
        if "Float32Shape" in name:
            assert "HMMA" not in code
            assert len(re.findall(r"\bFFMA\b", code)) > 500
        else:
            kind = {"BFloat16": "16816.F32.BF16", "Half": "16816.F32"}
            expected = next((code for key, code in kind.items() if key in name), "1688.F32.TF32")
            products = set(re.findall(r"HMMA\.(\S+)", code))
            assert products == {expected}, name
            assert "LDSM.16.M88.4" in code, name
            assert ("LDSM.16.MT88.4" in code) == (expected != "1688.F32.TF32"), name
    assert seen == 4 * 3 * 2


@built
def test_build_info_and_reason() -> None:
    info = cac_fast.build_info()
    assert info["cuda_archs"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
    if not torch.cuda.is_available():
        assert cac_fast.backends()["cuda"] == "needs a CUDA device"
        assert cac_fast.backends()["cuda:sm_90a"] == "needs a CUDA device"


def test_it_says_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(_extension, "cuda_archs", lambda: ("8.0", "12.0"))
    assert "on a CUDA device, not on cpu" in cuda.refuses(torch.empty(0, 8))
    for gpu, said in (
        (torch.empty(0, 8, dtype=torch.float64, device="meta"), "not on torch.float64"),
        (torch.empty(0, 257, device="meta"), "up to 256 channels, not 257"),
        (torch.empty(0, 256, device="meta"), "for 8.0, 12.0, and the GPU is 9.0: install again"),
    ):
        like = type("Anchors", (), {"device": torch.device("cuda"), "dtype": gpu.dtype})
        like.shape = gpu.shape
        assert said in cuda.refuses(like)


def test_the_path_for_sm_90a_says_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS["cuda:sm_90a"].load()
    like = type("Anchors", (), {"device": torch.device("cuda"), "shape": (0, 128)})
    monkeypatch.setattr(_extension, "unavailable", lambda _: None)
    monkeypatch.setattr(_extension, "cuda_archs", lambda: ("8.0+PTX", "9.0a"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability, missing, refusal in (
        ((9, 0), None, None),
        ((8, 0), "compute capability 9.0", "compute capability 9.0, not 8.0"),
        ((10, 0), "compute capability 9.0", "compute capability 9.0, not 10.0"),
    ):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _, capability=capability: capability
        )
        like.dtype = torch.bfloat16
        for said, expected in ((backend.unavailable(), missing), (backend.refuses(like), refusal)):
            assert said is None if expected is None else expected in said
        assert BACKENDS["cuda"].load().unavailable() is None
        like.dtype = torch.float32
        assert "torch.bfloat16, torch.float16, not on torch.float32" in backend.refuses(like)
        assert BACKENDS["cuda"].load().refuses(like) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(_extension, "cuda_archs", lambda: ("8.0", "9.0"))
    assert "built without code for sm_90a" in backend.unavailable()


def test_wherever_there_is_code_for_hopper_it_is_that_for_sm_90a() -> None:
    expected = {
        "9.0": "9.0a",
        "9.0a": "9.0a",
        "8.0 9.0 9.0a": "8.0;9.0a",
        "9.0+PTX": "8.0+PTX;9.0a",
        "8.0;8.6;9.0;12.0+PTX": "8.0;8.6;9.0a;12.0+PTX",
        "8.0 10.0": "8.0;10.0",
    }
    done = run_setup(READ_SETUP + f"print(*map(found['archs'], {list(expected)}), sep='\\n')")
    assert done.stdout.splitlines() == list(expected.values())


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        ("8.0", ["8.0", "8.9"], ["7.5", "9.0", "12.0"]),
        ("8.6", ["8.6", "8.9"], ["8.0"]),
        ("9.0a", ["9.0"], ["9.1", "10.0"]),
        ("10.0f", ["10.0", "10.3"], ["9.0", "11.0"]),
        ("8.0 9.0+PTX", ["8.6", "9.0", "12.0"], ["7.5"]),
        ("8.0 9.0a+PTX", ["8.6", "9.0"], ["10.0"]),
        ("8.0+PTX 9.0a", ["8.6", "9.0", "10.0", "12.0"], ["7.5"]),
        ("Hopper", ["9.0", "12.0"], []),
    ],
)
def test_knows_the_gpus_it_has_code_for(archs: str, runs: list[str], does_not: list[str]) -> None:
    for gpus, expected in ((runs, True), (does_not, False)):
        for gpu in gpus:
            capability = tuple(map(int, gpu.split(".")))
            assert cuda.runs_on(capability, tuple(archs.split())) is expected, gpu


def run_setup(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "CAC_FAST_CUDA"}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


READ_SETUP = """
import runpy, setuptools
setuptools.setup = lambda **_: None
found = runpy.run_path("setup.py")
"""


def test_the_build_chooses_the_cpp_standard() -> None:
    """PyTorch adds its own, which differs between versions, only where none is passed."""
    done = run_setup(
        f"import torch\ntorch.version.cuda = None\n{READ_SETUP}"
        "cpu, gpu = found['describe_extensions']()\n"
        "print(cpu.extra_compile_args, *gpu.extra_compile_args.values(), sep='\\n')"
    )
    flags = done.stdout.splitlines()
    assert len(flags) == 3
    for line in flags:
        assert re.findall(r"-std=[^']+", line) == ["-std=c++20"]


@needs_nvcc
def test_finds_the_toolkit_behind_a_wrapper(tmp_path: Path) -> None:
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec "{shutil.which("nvcc")}" "$@"\n')
    wrapper.chmod(0o755)
    done = run_setup(
        READ_SETUP + "print(found['NVCC'].root)",
        PATH=f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}",
        CAC_FAST_CUDA="1",
    )
    root = Path(done.stdout.strip())
    assert (root / "bin" / "nvcc").is_file()
    assert (root / "include" / "cuda_runtime.h").is_file()
    assert root != tmp_path


def test_chooses_the_toolkit_that_fits_and_says_what_is_missing(tmp_path: Path) -> None:
    for name, version in (("old", "1.0.0"), ("fitting", "13.0.88"), ("bare", "13.0.88")):
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path / name}' >&2\necho V{version}\n")
        nvcc.chmod(0o755)
        if name != "bare":
            (tmp_path / name / "include").mkdir()
            (tmp_path / name / "include" / "cuda_runtime.h").touch()
    # A PyTorch for another kind of GPU: its tools must not be asked to describe CUDA code.
    done = run_setup(
        f"import torch\ntorch.version.cuda = None\n{READ_SETUP}"
        "for other in ('bare', 'fitting'):\n"
        f"    found['os'].environ['CUDA_PATH'] = {str(tmp_path)!r} + '/' + other\n"
        "    print(found['find_nvcc']('13.2'))\n"
        "found['os'].environ['CUDA_HOME'] = '/nowhere'\n"
        f"found['os'].environ['CUDA_PATH'] = {str(tmp_path / 'bare')!r}\n"
        "print(found['find_nvcc']('13.2'))\n"
        "print(found['archs']('7.0 7.5'), found['archs']('6.1;7.5 8.6 Hopper 10.0a+PTX'))\n"
        "print(found['ARCHS'], found['NO_CUDA'], found['describe_extensions']()[1].include_dirs)",
        CUDA_HOME=str(tmp_path / "old"),
        TORCH_CUDA_ARCH_LIST="",
    )
    any_, fitting, none, *said, archs, last = done.stdout.splitlines()
    assert len(said) == 2 and "7.0, 7.5" in said[0] and "6.1, 7.5" in said[1]
    assert archs == "8.0+PTX;9.0a 8.6;8.0+PTX;9.0a;10.0a+PTX"
    assert "version='1.0.0'" in any_
    assert "version='13.0.88'" in fitting
    assert none.endswith(f"bin/nvcc has no include/cuda_runtime.h in {tmp_path / 'bare'}")
    assert last == "8.0+PTX;9.0a this PyTorch is built without CUDA []"


# Two extensions that build or fail at once, in the place of minutes of compiling.
BUILD = """
import runpy, sys
from pathlib import Path
from setuptools.command.build_ext import build_ext
def build(self, extension):
    if extension.name == "cac_fast._C_cuda":
        raise RuntimeError("broken by a test")
    path = Path(self.get_ext_fullpath(extension.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
build_ext.build_extension = build
sys.argv = ["setup.py", "--quiet", "build", "--build-base", FOLDER]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    "environment, said",
    [
        ({}, "broken by a test" if shutil.which("nvcc") else "no CUDA compiler"),
        ({"CAC_FAST_CUDA": "0"}, "CAC_FAST_CUDA=0"),
        ({"CUDA_HOME": "/nowhere"}, "no CUDA compiler"),
    ],
)
def test_a_missing_build_leaves_the_cpu_back_end_and_the_reason(
    environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = run_setup(f"FOLDER = {str(tmp_path)!r}\n{BUILD}", **environment)
    assert done.returncode == 0, done.stderr
    (reason,) = tmp_path.glob("lib*/cac_fast/_C_cuda.txt")
    assert said in reason.read_text(encoding="utf-8")
    assert list(reason.parent.glob("_C.*.so"))
    assert not list(reason.parent.glob("_C_cuda.*.so"))


@needs_nvcc
def test_a_host_compiler_that_does_not_suit_cuda_leaves_the_cpu_back_end(tmp_path: Path) -> None:
    done = run_setup(f"""
from torch.utils import cpp_extension
def refuse(*_):
    raise RuntimeError("refused by a test")
cpp_extension._check_cuda_version = refuse
FOLDER = {str(tmp_path)!r}
{BUILD}""")
    assert done.returncode == 0, done.stderr
    (reason,) = tmp_path.glob("lib*/cac_fast/_C*.txt")
    assert reason.name == "_C_cuda.txt"
    assert reason.read_text(encoding="utf-8") == "refused by a test\n"
    assert list(reason.parent.glob("_C.*.so"))


def test_a_build_that_is_asked_for_must_succeed(tmp_path: Path) -> None:
    done = run_setup(f"FOLDER = {str(tmp_path)!r}\n{BUILD}", CAC_FAST_CUDA="1")
    assert done.returncode != 0
    assert "cac_fast._C_cuda cannot be built: " in done.stderr
