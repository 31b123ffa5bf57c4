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


def compile_for(
    family: str, function: Any, types: dict[str, str], constants: dict[str, Any], warps: int
) -> Any:
    """A kernel as a launch on such a GPU would compile it; int32 where `types` names nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
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
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": warps})


FLOAT32 = ("weighted_ptr", "total_ptr", "offset_ptr", "loss_ptr")
INT64 = ("order_ptr", "ends_ptr", "share_ptr")
SHARED_TYPES = dict.fromkeys(INT64, "*i64") | dict.fromkeys(FLOAT32, "*fp32")
SHARED_TYPES |= dict.fromkeys(("scale", "lowest", "inverse_temperature"), "fp32")
SHARED_TYPES |= dict.fromkeys(("anchors_stride", "positives_stride", "tiles", "count"), "i32")


def build_partial(
    family: str, kind: str, padded: int, offset: bool, half: str = "bf16", dim: int | None = None
) -> Any:
    from cac_fast.kernels.dc_loss_kernels import dc_loss_partial

    config = configs.find(family, kind, padded)
    dtype = half if kind == "half" else "fp32"
    tma = family == "sm_90"
    constants: dict[str, Any] = {
        "anchors_stride_d": 1,
        "D": dim or padded,
        "D_PAD": padded,
        "TILE": config.tile,
        "BLOCK": config.block,
        "TMA": tma,
        "OFFSET": offset,
        "HEADROOM": 15 if dtype == "fp16" else 0,
        "PRECISION": "ieee" if kind == "half" else kind,
        "STAGES": config.stages,
    }
    types = SHARED_TYPES | {
        "anchors_ptr": f"*{dtype}",
        "negatives": f"tensordesc<{dtype}[{config.block}, {padded}]>" if tma else f"*{dtype}",
    }
    return compile_for(family, dc_loss_partial, types, constants, config.warps)


def build_combine(family: str, dtype: str, dim: int, offset: bool) -> Any:
    from cac_fast.kernels.dc_loss_kernels import dc_loss_combine

    names = ("anchors_ptr", "positives_ptr", "gradient_ptr")
    types = SHARED_TYPES | dict.fromkeys(names, f"*{dtype}")
    constants = {
        "anchors_stride_d": 1,
        "positives_stride_d": 1,
        "D": dim,
        "D_PAD": triton.next_power_of_2(dim),
        "TILE": 128,
        "ROWS": 16,
        "OFFSET": offset,
    }
    return compile_for(family, dc_loss_combine, types, constants, 4)


def registers_and_stack(kernel: Any, folder: Path) -> tuple[int, int]:
    """(registers, bytes of the stack) of an NVIDIA kernel."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = re.search(r"Function \w+[\s\S]*?REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


@pytest.mark.parametrize(("family", "kind", "padded", "offset"), CASES)
def test_every_line_of_the_table_compiles(
    family: str, kind: str, padded: int, offset: bool, tmp_path: Path
) -> None:
    kernel = build_partial(family, kind, padded, offset)
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


@pytest.mark.parametrize("family", ["sm_90", "sm_80"])
def test_float16_and_padded_channels_compile(family: str, tmp_path: Path) -> None:
    kernel = build_partial(family, "half", 128, offset=True, half="fp16", dim=100)
    registers, stack = registers_and_stack(kernel, tmp_path)
    assert registers <= 255
    assert stack == 0


@pytest.mark.parametrize(("dtype", "dim"), [("bf16", 128), ("fp16", 100), ("fp32", 256)])
@pytest.mark.parametrize("family", ["sm_90", "sm_80", "gfx"])
def test_the_combining_kernel_compiles(family: str, dtype: str, dim: int, tmp_path: Path) -> None:
    for offset in (False, True):
        kernel = build_combine(family, dtype, dim, offset)
        if family != "gfx":
            registers, stack = registers_and_stack(kernel, tmp_path)
            assert registers <= 255
            assert stack == 0
