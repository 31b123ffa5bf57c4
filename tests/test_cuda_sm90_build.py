"""The kernels for sm_90a as the compiler made them: their machine code, their descriptors."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from test_cuda_build import inspect

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


def innermost_loop(code: list[tuple[int, str, str]]) -> list[str]:
    """Operations of the shortest loop that has products."""
    loops = []
    for at, operation, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if operation.startswith("BRA") and target and int(target[1], 16) < at:
            inside = [op for place, op, _ in code if int(target[1], 16) <= place <= at]
            if any(op.startswith("HGMMA") for op in inside):
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
        loop = innermost_loop(code)
        products = [operation for operation in loop if operation.startswith("HGMMA")]
        expected = [f"HGMMA.{shape}{kind}" for shape in PRODUCTS[channels(name)]]
        assert sorted(products) == sorted(expected), name
        # More, and the compiler runs them one after the other.
        assert sum(operation.startswith("WARPGROUP") for operation in loop) <= 5, name
        assert sum(operation.startswith("BAR.SYNC") for operation in loop) == 1, name
        assert sum(operation.startswith("BAR.ARV") for operation in loop) == 1, name


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
