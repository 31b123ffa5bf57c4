"""The plan in two launches, without a GPU: interpreted, compiled for those that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rows_contract import Rows, flat, operands
from test_triton_compile import compile_for, registers_and_stack
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cac_fast import tiles
from cac_fast.backend import cuda
from cac_fast.backend import triton as kernels
from cac_fast.backend import triton_gluon as gluon
from cac_fast.kernels import configs

pytest.importorskip("triton")

HERE = Path(__file__).parent
# From the operator on, which is one call itself.
MOST_CALLS = 15 - 1
OPERATOR = Path(__file__).parent.parent / "csrc" / "cuda" / "operator.cpp"


def test_under_the_interpreter() -> None:
    """A process of its own, as Triton must be imported with the interpreter switched on."""
    options = "-q -p no:cacheprovider -p triton_interpreter plan_interpreted.py".split()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize(("dtype", "keys"), [("bf16", "i8"), ("fp32", "i64")])
@pytest.mark.parametrize("family", ["sm_90", "sm_80", "gfx"])
def test_both_kernels_compile(family: str, dtype: str, keys: str, tmp_path: Path) -> None:
    from cac_fast.kernels import plan
    from cac_fast.kernels.plan_kernels import dc_loss_keys, dc_loss_plan

    keys_of = {"BITS": int(keys[1:])}
    types = dict.fromkeys(("count", "negatives", "programs"), "i32")
    labels = dict.fromkeys(("anchor_labels_ptr", "negative_labels_ptr"), "*i64")
    strides = ("anchor_labels_stride", "negative_labels_stride", "active_stride")
    first = compile_for(
        family,
        dc_loss_keys,
        types | labels | {"active_ptr": "*i1", "keys_ptr": f"*{keys}"},
        dict.fromkeys(strides, 1) | keys_of | {"CHUNK": plan._KEYS_PER_PROGRAM},
        4,
    )
    names = ("anchors", "negatives", "ordered_anchors", "ordered_negatives")
    types |= {f"{name}_ptr": f"*{dtype}" for name in names}
    types |= dict.fromkeys(("anchor_keys_ptr", "negative_keys_ptr"), f"*{keys}")
    types |= dict.fromkeys(
        ("anchor_order_ptr", "negative_order_ptr", "ends_ptr", "share_ptr"), "*i64"
    )
    types |= dict.fromkeys(("anchors_stride", "negatives_stride"), "i32")
    constants = dict.fromkeys(("anchors_stride_d", "negatives_stride_d"), 1) | keys_of
    constants |= {
        "D": 128,
        "D_PAD": 128,
        "TILE": 128,
        "BLOCK": 128,
        "CHUNK": plan._SEARCHES_AT_A_TIME,
    }
    constants |= {"ROWS": plan._COPIED_ELEMENTS_PER_PROGRAM // 128, "COPY_ANCHORS": True}
    second = compile_for(family, dc_loss_plan, types, constants, 4)
    for kernel in (first, second):
        if family == "gfx":
            assert re.findall(r"vgpr_spill_count: +(\d+)", kernel.asm["amdgcn"]) == ["0"]
        else:
            registers, stack = registers_and_stack(kernel, tmp_path)
            # Of 65,536 a multiprocessor: eight programs of 128 threads at a time.
            assert registers <= 64
            assert stack == 0


class Calls(TorchDispatchMode):
    """Names of the ATen calls, and of the launches and operators in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.launches: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def kernel(self, name: str) -> dict[Any, Any]:
        """What a launch of it finds: any grid leads to what is called instead."""
        calls = self

        class Kernel(dict):
            def __missing__(self, grid: Any) -> Callable[..., None]:
                return lambda *_, **__: calls.launches.append(name)

        return Kernel()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts what it is entered for; the kernels are not launched."""
    from cac_fast.kernels import dc_loss, dc_loss_gluon, plan

    calls = Calls()
    for module, name in (
        (plan, "dc_loss_keys"),
        (plan, "dc_loss_plan"),
        (dc_loss, "dc_loss_partial"),
        (dc_loss_gluon, "dc_loss_partial"),
        (dc_loss, "dc_loss_combine"),
    ):
        monkeypatch.setattr(module, name, calls.kernel(name))
    return calls


def given(dim: int) -> tuple[Tensor, ...]:
    return operands("voc", torch.bfloat16, 300, 700, dim)


@pytest.mark.parametrize("family", ["sm_90", "sm_80", "gfx"])
@pytest.mark.parametrize("dim", [64, 100])
@pytest.mark.parametrize("rows", [kernels.dc_loss_rows, gluon.dc_loss_rows])
def test_aten_calls_of_the_triton_back_end(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, family: str, dim: int, rows: Rows
) -> None:
    monkeypatch.setattr(configs, "describe", lambda _: configs.Gpu(family, 132))
    for classes in (None, 21):
        calls.names.clear()
        calls.launches.clear()
        arguments = given(dim)
        with calls:
            flat(rows)(*arguments, 0.1, classes)
        assert calls.names
        assert len(calls.names) <= MOST_CALLS, calls.names
        plan = ["dc_loss_keys", "dc_loss_plan"]
        assert calls.launches == [*plan, "dc_loss_partial", "dc_loss_combine"]


def test_aten_calls_of_the_cuda_back_end(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    from cac_fast.kernels import plan

    allocations = re.findall(r"at::empty\(", OPERATOR.read_text())
    operators = SimpleNamespace(
        dc_loss_rows_cuda=lambda *_: calls.names.extend(["rows", *allocations])
    )
    monkeypatch.setattr(cuda, "_operators", lambda: operators)
    # Asked for once a device.
    monkeypatch.setattr(cuda, "_sizes", lambda *_: tiles.Sizes(128, 48, 132, 128))
    monkeypatch.setattr(kernels, "preparation", lambda _: plan.prepare)
    arguments = given(100)
    with calls:
        flat(cuda.dc_loss_rows)(*arguments, 0.1)
    assert calls.launches == ["dc_loss_keys", "dc_loss_plan"]
    assert len(allocations) == 3
    assert len(calls.names) <= MOST_CALLS, calls.names


def test_where_triton_does_not_run_the_plan_is_pytorchs() -> None:
    assert kernels.preparation(torch.device("cpu")) is tiles.prepare


@pytest.mark.parametrize(
    ("anchors", "negatives", "classes", "expected"),
    [
        (torch.int64, torch.int64, None, torch.int64),
        (torch.int64, torch.int64, 254, torch.int8),
        (torch.int64, torch.int64, 255, torch.int16),
        (torch.int64, torch.int64, 2**16 - 2, torch.int16),
        (torch.int64, torch.int64, 2**16 - 1, torch.int32),
        (torch.int64, torch.int64, 2**32, torch.int64),
        (torch.int8, torch.int8, None, torch.int8),
        (torch.uint8, torch.uint8, None, torch.int16),
        (torch.int8, torch.int16, None, torch.int16),
        (torch.int32, torch.uint8, None, torch.int32),
        (torch.uint8, torch.uint8, 1000, torch.int16),
        (torch.uint16, torch.uint16, None, torch.int32),
        (torch.uint64, torch.uint64, None, torch.int64),
    ],
)
def test_smallest_keys(
    anchors: torch.dtype, negatives: torch.dtype, classes: int | None, expected: torch.dtype
) -> None:
    assert tiles.key_dtype(anchors, negatives, classes) == expected
    assert tiles.key_dtype(negatives, anchors, classes) == expected
