"""The kernels for sm_90a as the compiler made them: their machine code, their descriptors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_cuda_build import READ_SETUP, inspect, needs_nvcc, run_setup

from cac_fast import _extension

ROOT = Path(__file__).parent.parent

built = pytest.mark.skipif(
    not any(arch.startswith("9.0a") for arch in _extension.cuda_archs()),
    reason="there is no code for sm_90a",
)

# Products of 64 x N for each number of channels: logits, sums; how many of each a block takes.
PRODUCTS = {
    64: ["64x128x16"] * 4 + ["64x64x16"] * 8,
    128: ["64x128x16"] * 8 + ["64x128x16"] * 8,
    256: ["64x64x16"] * 16 + ["64x256x16"] * 4,
}


@cache
def kernels() -> dict[str, list[tuple[int, str, str]]]:
    """Of each kernel for sm_90a its instructions: address, operation, operands."""
    instruction = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);"
    found = {}
    for kernel in inspect("-sass", "-arch", "sm_90a").split("Function : ")[1:]:
        name, code = kernel.split("\n", 1)
        if "dc_loss_partial_sm90" in name:
            found[name] = [(int(at, 16), *rest) for at, *rest in re.findall(instruction, code)]
    return found


def loop_over_blocks(code: list[tuple[int, str, str]], products: int) -> list[str]:
    """Operations of the shortest loop that has so many products; waits jump back too."""
    loops = []
    for at, operation, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if operation.startswith("BRA") and target and int(target[1], 16) < at:
            inside = [op for place, op, _ in code if int(target[1], 16) <= place <= at]
            if sum(op.startswith("HGMMA") for op in inside) == products:
                loops.append(inside)
    return min(loops, key=len)


def channels(name: str) -> int:
    return int(re.search(r"Li(\d+)E", name)[1])


@built
def test_there_is_a_kernel_for_each_case() -> None:
    assert len(kernels()) == 2 * 3 * 2  # two dtypes, three numbers of channels, offset or not


@built
def test_its_loop_has_the_products_and_waits_it_must_have() -> None:
    for name, code in kernels().items():
        kind = ".F32.BF16" if "BFloat16" in name else ".F32"
        expected = [f"HGMMA.{shape}{kind}" for shape in PRODUCTS[channels(name)]]
        loop = loop_over_blocks(code, len(expected))
        products = [operation for operation in loop if operation.startswith("HGMMA")]
        assert sorted(products) == sorted(expected), name
        # More, and the compiler runs them one after the other.
        assert sum(operation.startswith("WARPGROUP") for operation in loop) <= 5, name
        assert sum(operation.startswith("BAR.SYNC") for operation in loop) == 1, name
        assert sum(operation.startswith("BAR.ARV") for operation in loop) == 1, name


@built
def test_weights_overlap_with_the_sums_products() -> None:
    """They are computed between the wait for the logits and the wait for all."""
    for name, code in kernels().items():
        loop = loop_over_blocks(code, len(PRODUCTS[channels(name)]))
        waits = [place for place, op in enumerate(loop) if op.startswith("WARPGROUP.DEPBAR")]
        exponentials = [place for place, op in enumerate(loop) if op.startswith("MUFU.EX2")]
        assert len(waits) == 2, name
        between = [place for place in exponentials if waits[0] < place < waits[1]]
        assert len(between) > 0.9 * len(exponentials), name


@built
def test_it_copies_boxes_moves_registers_and_spills_none() -> None:
    for name, code in kernels().items():
        operations = [operation for _, operation, _ in code]
        assert "UTMALDG.2D" in operations, name
        assert sum(op.startswith("USETMAXREG") for op in operations) == 2, name
        assert not [op for op in operations if op.startswith(("LDL", "STL"))], name
        # Three warpgroups at the start; 64,512 registers after they have been moved.
        limits = {operands.split()[-1] for _, op, operands in code if op.startswith("USETMAXREG")}
        assert limits == {"0x18", "0xf0"}, name


@built
def test_its_registers_fit_three_warpgroups() -> None:
    usage = re.findall(
        r"Function \S+dc_loss_partial_sm90\S+:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        inspect("-res-usage", "-arch", "sm_90a"),
    )
    assert len(usage) == 2 * 3 * 2
    for registers, stack, local in usage:
        assert int(registers) * 3 * 128 <= 64 * 1024
        assert (stack, local) == ("0", "0")


@needs_nvcc
def test_layout_and_descriptors_are_those_of_cute(tmp_path: Path) -> None:
    package = find_spec("cutlass_library")
    if package is None:
        pytest.skip("there are no headers of CuTe: pip install --no-deps nvidia-cutlass")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    toolkit = Path(run_setup(READ_SETUP + "print(found['NVCC'].root)").stdout.strip())
    folders = [
        Path(package.submodule_search_locations[0], "source", "include"),
        ROOT / "csrc" / "cuda",
        toolkit / "include",
        toolkit / "include" / "cccl",
    ]
    program = tmp_path / "cute_descriptors"
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-w", *(f"-I{folder}" for folder in folders)),
            *(ROOT / "tests" / "cute_descriptors.cpp", "-o", program),
        ],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
