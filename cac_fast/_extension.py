"""The compiled modules `cac_fast._C` and `_C_cuda`: what they are, or why they are not there."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cac_fast.checks import check_below

# As in csrc/module.cpp.
_INTERFACE = 2
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _load(name: str) -> str | None:
    try:
        module = import_module(f"cac_fast.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"cac_fast.{name}":
            return f"the extension cannot be loaded: {error}"
        # setup.py leaves the reason where the extension would have been.
        reason = Path(__file__).with_name(f"{name}.txt")
        said = reason.read_text(encoding="utf-8").strip() if reason.is_file() else "no build tried"
        return f"the extension is not built: {said}"
    # Anything can go wrong in a library that was built for another PyTorch.
    except Exception as error:
        return f"the extension cannot be loaded: {error}"
    if name == "_C" and getattr(module, "interface", 1) != _INTERFACE:
        return "the extension was built from other sources than these: install again"
    return None


# Found out at once, since torch.compile traces what asks for it.
_WHY_NOT = {name: _load(name) for name in ("_C", "_C_cuda")}


def why_not(name: str = "_C") -> str | None:
    """None if an extension is loaded, and with it its operators; else the reason why not.

    name: "_C" for the CPU's operators, "_C_cuda" for the GPU's.
    """
    return _WHY_NOT[name]


def cuda_archs() -> tuple[str, ...]:
    """What the GPU's operators were built for, as in TORCH_CUDA_ARCH_LIST; () without them."""
    if why_not("_C_cuda") is not None:
        return ()
    return tuple(import_module("cac_fast._C_cuda").archs.split(";"))


def bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, and MKL is there to make it."""
    return why_not() is None and import_module("cac_fast._C").bfloat16_units


def build_info() -> dict[str, Any]:
    """How the compiled extension was built; without one, {"built": False, "reason": why not}.

    With one: "built": True, "compiler", "standard" (of C++), "flags", "torch" (the version built
    against); "bfloat16_units", whether this CPU's are used; "cuda_archs", a tuple of the
    architectures the GPU's part was built for, as in TORCH_CUDA_ARCH_LIST, and "nvcc", the
    compiler's version; () and None without that part.
    """
    reason = why_not()
    if reason is not None:
        return {"built": False, "reason": reason}
    module = import_module("cac_fast._C")
    names = ("compiler", "standard", "flags", "torch", "bfloat16_units")
    info = {"built": True, **{name: getattr(module, name) for name in names}}
    info |= {"cuda_archs": cuda_archs(), "nvcc": None}
    if why_not("_C_cuda") is None:
        info["nvcc"] = import_module("cac_fast._C_cuda").nvcc
    return info


def refuses(anchors: Tensor) -> str | None:
    """Why the compiled operator cannot work on such anchors, or None."""
    if anchors.device.type != "cpu":
        return f"it works on the CPU, not on {anchors.device}"
    if anchors.dtype not in _DTYPES:
        return f"it works on {', '.join(map(str, _DTYPES))}, not on {anchors.dtype}"
    return None


def dc_loss_rows(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    active: Tensor,
    temperature: float,
    classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (A,) and its gradient by the anchors (A, D), Eq. 5, in C++ on the CPU.

    Arguments as `cac_fast.ops` hands them to a back end, if `refuses` has nothing against them.
    Sums in float32 (float64 for float64 features), and takes products of float32 values, or of
    bfloat16 ones where the CPU has units for them (Intel's AVX-512 BF16 and AMX). Beyond one
    ordered copy of the admitted negatives (with those units two, of bfloat16) it needs the memory
    of a tile or two per thread. The same bits on every run and for every number of threads.
    """
    anchor_labels, negative_labels = anchor_labels.long(), negative_labels.long()
    check_below(classes, anchor_labels, negative_labels)
    return torch.ops.cac_fast.dc_loss_rows_cpp(
        anchors,
        positives,
        negatives,
        anchor_labels,
        negative_labels,
        active,
        temperature,
        bfloat16_units(),
    )
