"""The compiled modules `cac_fast._C` and `_C_cuda`: what they are, or why they are not there."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

# As in csrc/module.cpp.
_INTERFACE = 3


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


@cache
def unavailable(name: str = "_C") -> str | None:
    """None if an extension can be loaded, and with it its operators; else the reason why not.

    name: "_C" for the CPU's operators, "_C_cuda" for the GPU's.
    """
    return _load(name)


def cuda_archs() -> tuple[str, ...]:
    """What the GPU's operators were built for, as in TORCH_CUDA_ARCH_LIST; () without them."""
    if unavailable("_C_cuda") is not None:
        return ()
    return tuple(import_module("cac_fast._C_cuda").archs.split(";"))


def bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, and MKL is there to make it."""
    return unavailable() is None and import_module("cac_fast._C").bfloat16_units


def build_info() -> dict[str, Any]:
    """How the compiled extension was built; without one, {"built": False, "reason": why not}.

    With one: "built": True, "compiler", "standard" (of C++), "flags", "torch" (the version built
    against); "bfloat16_units", whether this CPU's are used; "cuda_archs", a tuple of the
    architectures the GPU's part was built for, as in TORCH_CUDA_ARCH_LIST, and "nvcc", the
    compiler's version; () and None without that part.

    >>> build_info()["built"] or "not built" in build_info()["reason"]
    True
    """
    if reason := unavailable():
        return {"built": False, "reason": reason}
    module = import_module("cac_fast._C")
    names = ("compiler", "standard", "flags", "torch", "bfloat16_units")
    info = {"built": True, **{name: getattr(module, name) for name in names}}
    info |= {"cuda_archs": cuda_archs(), "nvcc": None}
    if unavailable("_C_cuda") is None:
        info["nvcc"] = import_module("cac_fast._C_cuda").nvcc
    return info
