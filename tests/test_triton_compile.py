"""The Triton kernels compiled for GPUs that are not here: matrix units in use, nothing spilled."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rows_contract import flat

from cac_fast.backend import triton as kernels
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


def target(family: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return {
        "sm_90": GPUTarget("cuda", 90, 32),
        "sm_80": GPUTarget("cuda", 80, 32),
        "gfx": GPUTarget("hip", "gfx942", 64),
    }[family]


def compile_for(
    family: str, function: Any, types: dict[str, str], constants: dict[str, Any], warps: int
) -> Any:
    """A kernel as a launch on such a GPU would compile it; int32 where `types` names nothing."""
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i32") for name in names
    }
    aligned = [
        name for name, kind in signature.items() if kind.startswith("*") or name == "anchors_stride"
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target(family), options={"num_warps": warps})


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


@pytest.mark.parametrize("family", ["sm_90", "sm_80", "gfx"])
@pytest.mark.parametrize("by_rows", [True, False], ids=["by rows", "by columns"])
def test_no_number_of_anchors_or_negatives_compiles_anew(
    family: str, by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.compiler import make_backend
    from triton.runtime import jit

    backend = make_backend(target(family))
    variants: dict[str, set[str]] = {}

    def run(kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*given, **named)
        variants.setdefault(kernel.__name__, set()).add(str((specialization, options)))

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu(family, 132))
    for a, m in ((2, 2), (15, 1000), (16, 33), (1599, 1), (1600, 160), (2048, 4096), (2049, 4095)):
        anchors, positives, negatives = (torch.zeros(n, 128).bfloat16() for n in (a, a, m))
        if not by_rows:
            anchors, positives = (tensor.t().contiguous().t() for tensor in (anchors, positives))
        labels = torch.zeros(a, dtype=torch.int64), torch.zeros(m, dtype=torch.int64)
        active = torch.ones(a, dtype=torch.bool)
        flat(kernels.dc_loss_rows)(anchors, positives, negatives, *labels, active, 0.1)
    assert variants.keys() >= {"dc_loss_partial", "dc_loss_combine"}
    assert {name: len(found) for name, found in variants.items()} == dict.fromkeys(variants, 1)
