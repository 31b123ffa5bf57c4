"""The Triton kernels compiled for GPUs that are not here: matrix units in use, nothing spilled."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cac_fast.kernels import configs

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The running maximum needs more registers: without it only the lines that must be fast.
CASES = [
    pytest.param(family, kind, padded, offset, id=f"{family}-{kind}-{padded}-{offset}")
    for family, kinds in configs.TABLE.items()
    for kind, lines in kinds.items()
    for padded in lines
    for offset in ((False, True) if kind == "half" and family != "gfx" else (True,))
]
# Bytes of the stack, where not 0: three parts of each anchor do not fit the registers.
SPILLED = {
    ("sm_90", "bf16x6", 128): 16,
    ("sm_90", "bf16x6", 256): 256,
    ("sm_80", "bf16x6", 256): 256,
}
SHARED_MEMORY = {"sm_90": 232_448, "sm_80": 101_376, "gfx": 65_536}


def build(family: str, kind: str, padded: int, offset: bool) -> Any:
    """dc_loss_partial as a launch on such a GPU would compile it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cac_fast.kernels.dc_loss_kernels import dc_loss_partial

    config = configs.find(family, kind, padded)
    dtype = "bf16" if kind == "half" else "fp32"
    names = dc_loss_partial.arg_names
    tma = family == "sm_90"
    constants: dict[str, Any] = {
        "anchors_stride_d": 1,
        "D": padded,
        "D_PAD": padded,
        "TILE": config.tile,
        "BLOCK": config.block,
        "TMA": tma,
        "OFFSET": offset,
        "HEADROOM": 0,
        "PRECISION": "ieee" if kind == "half" else kind,
        "STAGES": config.stages,
    }
    types = {
        "anchors_ptr": f"*{dtype}",
        "negatives": f"tensordesc<{dtype}[{config.block}, {padded}]>" if tma else f"*{dtype}",
        "anchors_stride": "i32",
        "tiles": "i32",
        "scale": "fp32",
        "lowest": "fp32",
    }
    types |= dict.fromkeys(("order_ptr", "ends_ptr", "share_ptr"), "*i64")
    types |= dict.fromkeys(("weighted_ptr", "total_ptr", "offset_ptr"), "*fp32")
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i32") for name in names
    }
    aligned = [
        name for name, kind in signature.items() if kind.startswith("*") or name == "anchors_stride"
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    target = {
        "sm_90": GPUTarget("cuda", 90, 32),
        "sm_80": GPUTarget("cuda", 80, 32),
        "gfx": GPUTarget("hip", "gfx942", 64),
    }[family]
    return triton.compile(
        ASTSource(dc_loss_partial, signature, constants, attributes),
        target=target,
        options={"num_warps": config.warps},
    )


def registers_and_stack(kernel: Any, folder: Path) -> tuple[int, int]:
    """(registers, bytes of the stack) of an NVIDIA kernel."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = re.search(r"dc_loss_partial[\s\S]*?REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


@pytest.mark.parametrize(("family", "kind", "padded", "offset"), CASES)
def test_every_line_of_the_table_compiles(
    family: str, kind: str, padded: int, offset: bool, tmp_path: Path
) -> None:
    kernel = build(family, kind, padded, offset)
    assert kernel.metadata.shared <= SHARED_MEMORY[family]
    if family == "gfx":
        assert "v_mfma" in kernel.asm["amdgcn"]
        assert re.findall(r"vgpr_spill_count: +(\d+)", kernel.asm["amdgcn"]) == ["0"]
        return
    ptx = kernel.asm["ptx"]
    registers, stack = registers_and_stack(kernel, tmp_path)
    assert registers <= 255
    assert stack <= SPILLED.get((family, kind, padded), 0)
    if family == "sm_90" and kind == "half":
        assert "wgmma.mma_async" in ptx
        assert "mma.sync" not in ptx
        assert "cp.async.bulk.tensor" in ptx
    elif family == "sm_80":
        assert "mma.sync" in ptx
        assert "cp.async" in ptx or kind != "half"
