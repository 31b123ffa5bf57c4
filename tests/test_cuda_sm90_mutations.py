"""The emulated GPU notices faults of the kernel for sm_90a: one in each copy that is compiled here.

What is right is tests/test_cuda_emulated.py's; here the emulation itself is tested, a mechanism at
a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

# Name: file below csrc/cuda/sm90, what stands there, what is put there, what is said about it.
MUTATIONS = {
    "the wrong phase of a buffer that is full": (
        "partial.cuh",
        "barrier_wait(memory_.full(ring_.stage), ring_.parity);\n      await",
        "barrier_wait(memory_.full(ring_.stage), ring_.parity ^ 1);\n      await",
        "",
    ),
    "the wrong phase of one that is empty": (
        "partial.cuh",
        "barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);",
        "barrier_wait(memory.empty(ring.stage), ring.parity);",
        "threads wait for others that never come",
    ),
    "no wait for a full buffer": (
        "partial.cuh",
        "barrier_wait(memory_.full(ring_.stage), ring_.parity);\n      await",
        "await",
        "",
    ),
    "no wait for an empty buffer": (
        "partial.cuh",
        "barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);",
        "",
        "",
    ),
    "no wait for the anchors": (
        "partial.cuh",
        "barrier_wait(memory_.anchors_full(), tiles_.parity);",
        "",
        "",
    ),
    "no wait for the last tile's anchors to be used": (
        "partial.cuh",
        "barrier_wait(memory.anchors_empty(), tiles.parity ^ 1);",
        "",
        "",
    ),
    "fewer bytes announced than come": (
        "partial.cuh",
        "barrier_expect(barrier, kRows * kDim * 2);",
        "barrier_expect(barrier, kRows * kDim);",
        "bytes that nobody has announced",
    ),
    "more bytes announced than come": (
        "partial.cuh",
        "barrier_expect(barrier, kRows * kDim * 2);",
        "barrier_expect(barrier, kRows * kDim * 4);",
        "threads wait for others that never come",
    ),
    "fewer arrivals than warps": (
        "partial.cuh",
        "kConsumerWarps = kConsumers * kWarpgroup / kWarp;",
        "kConsumerWarps = kConsumers;",
        "",
    ),
    "barriers that TMA does not know": (
        "partial.cuh",
        "    barriers_ready();\n",
        "",
        "a barrier that is not ready",
    ),
    "a buffer given back before its sums are there": (
        "partial.cuh",
        "pass_turn();\n      products_wait<1>();",
        "pass_turn();\n      release(memory_.empty(held));\n      products_wait<1>();",
        "",
    ),
    "no wait for the logits": (
        "partial.cuh",
        "      products_wait<1>();\n",
        "",
        "results touched before the wait",
    ),
    "no wait for the sums": (
        "partial.cuh",
        "      products_wait<0>();\n      hold_in_place(sums);\n",
        "",
        "",
    ),
    "a wait that leaves one group": (
        "partial.cuh",
        "      products_wait<0>();\n      hold_in_place(sums);\n",
        "      products_wait<1>();\n      hold_in_place(sums);\n",
        "",
    ),
    "sums shrunk before they are there": (
        "partial.cuh",
        "      products_wait<0>();\n      hold_in_place(sums);\n"
        "      release(memory_.empty(held));\n      shrink_sums(sums, shrink);",
        "      shrink_sums(sums, shrink);\n      products_wait<0>();\n"
        "      release(memory_.empty(held));\n",
        "a sum is wrong",
    ),
    "weights overwritten while they are multiplied": (
        "partial.cuh",
        "      products_wait<0>();\n      hold_in_place(sums);",
        "      pack_weights(weights, logits);\n      products_wait<0>();\n",
        "",
    ),
    "no fence before products": (
        "partial.cuh",
        "      products_fence();\n      issue_logits",
        "      issue_logits",
        "a product before the fence",
    ),
    "a turn not waited for": (
        "partial.cuh",
        "await_turn();\n      hold",
        "hold",
        "a thread twice at a numbered barrier",
    ),
    "a turn not passed on": (
        "partial.cuh",
        "      pass_turn();\n      products_wait<1>",
        "      products_wait<1>",
        "threads wait for others that never come",
    ),
    "the last turn left over": (
        "partial.cuh",
        "if (number_ == 0) await_turn();",
        "",
        "a numbered barrier left half full",
    ),
    "more registers than there are": (
        "partial.cuh",
        "take_registers<240>()",
        "take_registers<248>()",
        "more registers than there are",
    ),
    "another swizzle": ("layout.h", "1ULL << 62", "2ULL << 62", "another swizzle"),
    "a wrong stride of groups of the logits": (
        "layout.h",
        "descriptor(slab, 16, kGroup);",
        "descriptor(slab, 16, 2 * kGroup);",
        "",
    ),
    "a slab put in the wrong place": (
        "partial.cuh",
        "slab * (kRows * kSlabRow), map",
        "slab * kGroup, map",
        "two copies on their way to one place",
    ),
    "a wrong stride of groups of the sums": (
        "layout.h",
        "kSlabRow, kGroup);",
        "kSlabRow, kGroup / 2);",
        "a sum is wrong",
    ),
    "a wrong stride of slabs": (
        "layout.h",
        "static_cast<uint32_t>(rows) * kSlabRow, kGroup",
        "kGroup, kGroup",
        "a sum is wrong",
    ),
    "a wrong step over channels": (
        "layout.h",
        "step % kSteps * (kDepth * 2)",
        "step % kSteps * kDepth",
        "a total is wrong",
    ),
    "a wrong step over rows": (
        "layout.h",
        "step * (kDepth * kSlabRow)",
        "step * (kDepth * kSlabRow / 2)",
        "a sum is wrong",
    ),
    "rows of the wrong pitch": (
        "layout.h",
        "static_cast<uint64_t>(padded) * 2,",
        "static_cast<uint64_t>(padded) * 2 + 16,",
        "",
    ),
    "a box too wide for the swizzle": (
        "layout.h",
        "      kSlabChannels,\n",
        "      2 * kSlabChannels,\n",
        "a box wider than the swizzle",
    ),
}


def run(sources: Path, folder: Path) -> tuple[int, str]:
    package = Path(torch.__file__).parent
    program = folder / "mutated"
    flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", f"-I{sources}"]
    flags += [f"-I{ROOT / 'tests' / 'emulated_gpu'}", f"-isystem{package / 'include'}"]
    libraries = [f"-L{package / 'lib'}", "-lc10", f"-Wl,-rpath,{package / 'lib'}"]
    source = ROOT / "tests" / "emulated_gpu" / "sm90" / "mutated.cpp"
    done = subprocess.run(
        [COMPILER, *flags, source, "-o", program, *libraries], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_the_kernel_as_it_is(tmp_path: Path) -> None:
    assert run(ROOT / "csrc" / "cuda", tmp_path) == (0, "")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_noticed(name: str, tmp_path: Path) -> None:
    file, right, wrong, said = MUTATIONS[name]
    sources = shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "cuda")
    path = sources / "sm90" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    code, output = run(sources, tmp_path)
    assert code == 1, output
    assert said in output
