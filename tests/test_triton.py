"""The Triton back end without a GPU: its kernels under the interpreter, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cac_fast.backend import triton as kernels

HERE = Path(__file__).parent


def run(*command: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "chosen",
    [["triton_interpreted.py"], ["test_engine.py", "-k", "golden_losses and triton"]],
    ids=["kernels", "golden losses of the trainer"],
)
def test_under_the_interpreter(chosen: list[str]) -> None:
    """A process of its own, as Triton must be imported with the interpreter switched on."""
    options = "-q -p no:cacheprovider -p triton_interpreter".split()
    done = run("-m", "pytest", *options, *chosen, interpret=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_package_imports_without_importing_triton() -> None:
    done = run("-c", "import cac_fast, sys; print('triton' in sys.modules)", interpret=False)
    assert done.stdout.strip() == "False", done.stderr


def test_says_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.unavailable() == "needs a CUDA or ROCm device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "8.0" in kernels.unavailable()
    # The first of two GPUs is too old: `refuses` says so of tensors that lie there.
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(7, 5), (9, 0)].__getitem__)
    monkeypatch.setattr(kernels, "_COMPILER", "gcc")
    assert kernels.unavailable() is None
    monkeypatch.setattr(kernels, "_COMPILER", None)
    assert "C compiler" in kernels.unavailable()
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    assert kernels.unavailable() == "triton is not installed"


def test_the_interpreter_makes_it_a_back_end() -> None:
    done = run("-c", "import cac_fast; print(cac_fast.backends()['triton'])", interpret=True)
    assert done.stdout.strip() == "None", done.stderr


@pytest.mark.parametrize(
    ("dtype", "dim", "name"), [(torch.float64, 16, "float64"), (torch.float32, 257, "257")]
)
def test_refuses_what_it_cannot_do(dtype: torch.dtype, dim: int, name: str) -> None:
    """The dispatch turns a refusal into a ValueError, or "auto" into another back end."""
    assert name in kernels.refuses(torch.zeros(4, dim, dtype=dtype, device="meta"))


def test_takes_tensors_of_the_device_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = torch.zeros(4, 256)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "cpu" in kernels.refuses(anchors)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.refuses(anchors) is None
