"""The Gluon path without a GPU: its index arithmetic, its kernel emulated, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations_with_replacement, product
from pathlib import Path

import pytest
import torch

from cac_fast.backend import BACKENDS
from cac_fast.backend import triton as kernels
from cac_fast.backend import triton_gluon as gluon
from cac_fast.choice import choose_backend

HERE = Path(__file__).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True
    )


def test_emulated() -> None:
    """A process of its own, as Triton must be imported with its interpreter switched on."""
    pytest.importorskip("triton")
    options = "-q -p no:cacheprovider -p triton_interpreter".split()
    done = run("-m", "pytest", *options, "gluon_emulated.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_every_place_of_every_list_of_blocks() -> None:
    """Of all tiles that meet up to 6 blocks: what needs no mask in order, then the others."""
    pytest.importorskip("triton")
    from emulated_gluon import kernels

    block_of = kernels().block_of
    seen = 0
    for blocks in range(1, 7):
        for borders in combinations_with_replacement(range(blocks + 1), 4):
            low, skip, resume, high = borders
            # The last block may hold fewer negatives, and needs a mask then.
            for full in {max(high, blocks - 1), blocks}:
                plain = [*range(low), *range(high, full)]
                masked = [*range(low, skip), *range(resume, high), *range(full, blocks)]
                expected = plain + masked
                found = [block_of(place, *borders, full) for place in range(len(expected))]
                assert found == expected
                seen += len(plain) > 0 and len(masked) > 1
    assert seen > 100


def test_every_share_of_every_list_of_blocks() -> None:
    """Each block of each tile is exactly one program's, in order, between the tiles' borders."""
    pytest.importorskip("triton")
    from emulated_gluon import Pointer, kernels

    piece_of = kernels().piece_of
    borders = Pointer.to(torch.tensor([[1, 2, 3, 4]] * 3, dtype=torch.int32))
    for met in product((0, 1, 4), repeat=3):
        ends = torch.tensor(met).cumsum(0)
        for programs in (1, 2, 3, 5):
            share = (ends[-1] + programs - 1) // programs
            found = [
                (tile, place)
                for program in range(programs)
                for tile in range(3)
                for begin, end, *rest in [
                    piece_of(tile, program, share, 70, borders, Pointer.to(ends), 10)
                ]
                if rest == [1, 2, 3, 4, 7]
                for place in range(begin, end)
            ]
            assert found == [(tile, place) for tile in range(3) for place in range(met[tile])]


def test_package_imports_without_importing_triton() -> None:
    done = run("-c", "import cac_fast.backend.triton_gluon, sys; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_says_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in gluon.unavailable()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gluon.unavailable() == "needs a GPU of compute capability 9.0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(10, 0), (8, 0)].__getitem__)
    assert gluon.unavailable() == "needs a GPU of compute capability 9.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(10, 0), (9, 0)].__getitem__)
    monkeypatch.setattr(kernels, "unavailable", lambda: "is missing")
    assert gluon.unavailable() == "is missing"
    monkeypatch.setattr(kernels, "unavailable", lambda: None)
    monkeypatch.setattr(gluon, "_has_gluon", lambda: False)
    assert "Triton 3.6 or newer" in gluon.unavailable()
    monkeypatch.undo()
    pytest.importorskip("triton")
    assert gluon._has_gluon()


@pytest.mark.parametrize(
    ("dtype", "dim", "name"),
    [
        (torch.float32, 16, "not torch.float32: use 'triton'"),
        (torch.float64, 16, "float64"),
        (torch.bfloat16, 257, "257"),
        (torch.float16, 16, "cuda"),
    ],
)
def test_refuses_what_it_cannot_do(dtype: torch.dtype, dim: int, name: str) -> None:
    assert name in gluon.refuses(torch.zeros(4, dim, dtype=dtype, device="meta"))


def test_refuses_another_gpu_beside_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "refuses", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    anchors = torch.zeros(4, 16, dtype=torch.bfloat16)
    assert "it needs 9.0" in gluon.refuses(anchors)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert gluon.refuses(anchors) is None


def test_is_a_back_end() -> None:
    assert BACKENDS["triton:gluon"].load().rows is gluon.dc_loss_rows
    if gluon.unavailable():
        with pytest.raises(ValueError, match="'triton:gluon' cannot be used: "):
            choose_backend("triton:gluon", torch.zeros(4, 16, dtype=torch.bfloat16))
