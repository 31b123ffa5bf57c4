"""The Gluon kernel compiled for a GPU that is not here: what its machine code must show."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rows_contract import flat, operands

from cac_fast import tiles
from cac_fast.kernels import configs

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = 232_448
CASES = [
    (dtype, padded, offset)
    for dtype, offset in (("bf16", False), ("fp16", True))
    for padded in configs.GLUON
]
TYPES = dict.fromkeys(("order_ptr", "ends_ptr", "share_ptr"), "*i64")
TYPES |= dict.fromkeys(("weighted_ptr", "total_ptr", "offset_ptr"), "*fp32")
TYPES |= dict.fromkeys(("scale", "lowest"), "fp32")
TYPES |= dict.fromkeys(("anchors_stride", "tiles"), "i32")


def compiled(dtype: str, padded: int, offset: bool, dim: int, module: ModuleType) -> Any:
    """The kernel as a launch on an H100 would compile it."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from cac_fast.kernels.dc_loss_gluon import _SWIZZLED

    config = configs.GLUON[padded]
    constants = {
        "anchors_stride_d": 1,
        "D": dim,
        "D_PAD": padded,
        "TILE": config.tile,
        "BLOCK": config.block,
        "OFFSET": offset,
        "HEADROOM": 15 if dtype == "fp16" else 0,
        "STAGES": config.stages,
        "REGISTERS": config.registers,
    }
    types = TYPES | {
        "anchors_ptr": f"*{dtype}",
        "negatives": f"tensordesc<{dtype}[{config.block}, {padded}],{_SWIZZLED!r}>",
    }
    function = module.dc_loss_partial
    names = function.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i32") for name in names
    }
    aligned = [
        name for name, kind in signature.items() if kind.startswith("*") or name == "anchors_stride"
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def machine_code(kernel: Any, folder: Path) -> tuple[int, list[str]]:
    """(bytes of the stack, instructions and labels) of a kernel."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage, text = (
        subprocess.run([TOOLS / tool, *options, binary], capture_output=True, text=True, check=True)
        for tool, *options in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    lines = [line.strip() for line in text.stdout.splitlines()]
    found = [re.match(r"(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line) for line in lines]
    stack = re.search(r"dc_loss_partial[\s\S]*?STACK:(\d+)", usage.stdout)[1]
    return int(stack), [match[1] or match[2] for match in found if match]


def inner_loops(code: list[str]) -> list[list[str]]:
    """The loops that multiply matrices and hold no other loop; waits spin outside of them."""
    places = {line: place for place, line in enumerate(code)}
    spans = set()
    for place, line in enumerate(code):
        target = re.search(r"BRA.*?(\.L_x_\d+)", line)
        if target and places[target[1]] < place:
            spans.add((places[target[1]], place))
    inner = [
        span
        for span in sorted(spans)
        if not any(span[0] <= a and b <= span[1] for a, b in spans - {span})
    ]
    loops = [code[start : end + 1] for start, end in inner]
    return [loop for loop in loops if any("HGMMA" in line for line in loop)]


def operations(loop: list[str]) -> list[str]:
    """Without predicates, operands and labels."""
    bare = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in loop if not line.startswith(".L")]
    return [
        " ".join(re.findall(r"^\S+|gsb0, 0x\d", line)) if "DEPBAR" in line else line.split()[0]
        for line in bare
    ]


def check(kernel: Any, padded: int, folder: Path) -> None:
    config = configs.GLUON[padded]
    assert kernel.metadata.shared <= SHARED_MEMORY
    stack, code = machine_code(kernel, folder)
    assert stack == 0
    assert not [line for line in code if re.search(r"\b(LDL|STL)\b", line)]
    registers = set(re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", kernel.asm["ptx"]))
    assert {"24", str(config.registers)} <= registers
    # A copy for each 128 bytes of the rows.
    assert sum("UTMALDG" in line for line in code) == padded // 64

    loops = [operations(loop) for loop in inner_loops(code)]
    # Of each consumer one without masks and one with.
    assert len(loops) == 4
    for loop in loops:
        count = Counter(operation.split(".")[0] for operation in loop)
        assert count["HGMMA"] == padded // 16 + config.block // 16
        # Beside the two waits, each product has one ARRIVE: with more the compiler serializes.
        assert count["WARPGROUP"] == 4
        waits = [line for line in loop if "DEPBAR" in line]
        assert waits == [f"WARPGROUP.DEPBAR.LE gsb0, 0x{left}" for left in (1, 0)]
        first, last = map(loop.index, waits)
        # Waits for the copy, the turn, and again the copy; arrivals at the turn and the buffer.
        synchronized = Counter(line for line in loop if line.startswith("SYNCS"))
        assert synchronized["SYNCS.PHASECHK.TRANS64.TRYWAIT"] == 3
        assert sum(synchronized.values()) == 5
        # The turn is passed before the first wait, and weights are made before the last one.
        arrived = [place for place, line in enumerate(loop) if line.startswith("SYNCS.ARRIVE")]
        assert arrived[0] < first < last < arrived[1]
        weights = [place for place, line in enumerate(loop) if line == "MUFU.EX2"]
        assert len(weights) >= config.block // 2
        assert sum(first < place < last for place in weights) >= 0.9 * len(weights)
    unmasked = sorted(loops, key=len)[:2]
    for loop in unmasked:
        assert sum(line.startswith(("FSEL", "ISETP", "FSETP")) for line in loop) <= 4


@pytest.mark.parametrize(("dtype", "padded", "offset"), CASES)
def test_machine_code(dtype: str, padded: int, offset: bool, tmp_path: Path) -> None:
    from cac_fast.kernels import dc_loss_gluon_kernels

    dim = 100 if (dtype, padded) == ("fp16", 128) else padded
    kernel = compiled(dtype, padded, offset, dim, dc_loss_gluon_kernels)
    check(kernel, padded, tmp_path)


class Compiled:
    """Takes the place of a kernel, and compiles where that would launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.made = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.made.append(self.kernel.warmup(*arguments, grid=grid, **named))

        return launch


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton asks of the GPU it compiles for."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu("sm_90", 132))
    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
    monkeypatch.setattr(driver, "_active", stand_in)


@pytest.mark.usefixtures("h100")
def test_a_launch_compiles_what_is_checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from cac_fast.kernels import dc_loss, dc_loss_gluon, dc_loss_gluon_kernels, plan

    partial = Compiled(dc_loss_gluon.dc_loss_partial)
    monkeypatch.setattr(dc_loss_gluon, "dc_loss_partial", partial)
    monkeypatch.setattr(dc_loss, "dc_loss_combine", Compiled(dc_loss.dc_loss_combine))
    monkeypatch.setattr(plan, "prepare", tiles.prepare)
    for anchors in (300, 100):
        given = operands("voc", torch.bfloat16, anchors, 1000, 64)
        flat(dc_loss_gluon.dc_loss_rows)(*given, 0.1)
    first, again = partial.made
    assert first.asm["ptx"] == compiled("bf16", 64, False, 64, dc_loss_gluon_kernels).asm["ptx"]
    # One tile or many: no reason to compile again.
    assert again is first


FAULTS = {
    "no turns": ("mbarrier.wait(my_turn, (count & 1) ^ (1 - HALF))", "pass"),
    "turns passed too late": (
        """        mbarrier.arrive(other_turn)
        logits = warpgroup_mma_wait(1, deps=[logits_later])
""",
        """        logits = warpgroup_mma_wait(1, deps=[logits_later])
        mbarrier.arrive(other_turn)
""",
    ),
    "no wait between weights and the last wait": (
        """        mbarrier.wait(filled.index(stage), (count // STAGES) & 1)
        sums =""",
        "        sums =",
    ),
    "waits for all only": ("warpgroup_mma_wait(1, ", "warpgroup_mma_wait(0, "),
    "masks everywhere": ("ROWS, BLOCK, False, OFFSET", "ROWS, BLOCK, True, OFFSET"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_notices(fault: str, tmp_path: Path) -> None:
    old, new = FAULTS[fault]
    source = (Path(configs.__file__).parent / "dc_loss_gluon_kernels.py").read_text()
    assert old in source
    file = tmp_path / "faulty.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = compiled("bf16", 64, False, 64, module)
    with pytest.raises(AssertionError):
        check(kernel, 64, tmp_path)
