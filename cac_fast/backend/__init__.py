"""The back ends of the loss operator: one table of them, one file for each.

`base.py` states what a back end is. To add one, write its file and its line of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from cac_fast.backend.base import Backend


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    name: what users call the back end; one with a colon is a path for one architecture of the back
        end before the colon.
    help: one line.
    where: "package.module:attribute" of its `Backend`, imported on first use.
    """

    name: str
    help: str
    where: str

    def load(self) -> Backend:
        """The back end itself."""
        return _load(self.where)


@cache
def _load(where: str) -> Backend:
    module, _, attribute = where.partition(":")
    return getattr(import_module(module), attribute)


BACKENDS = {
    name: Entry(name, text, f"cac_fast.backend.{module}:BACKEND")
    for name, module, text in (
        ("reference", "reference", "the formula as the paper writes it: dense, any device"),
        ("eager", "eager", "plain PyTorch in tiles, any device"),
        ("cpp", "cpp", "C++ on the CPU"),
        ("triton", "triton", "Triton on NVIDIA GPUs from compute capability 8.0 and on AMD GPUs"),
        ("triton:gluon", "triton_gluon", "Gluon on compute capability 9.0, 16-bit features"),
        ("cuda", "cuda", "CUDA C++ from compute capability 8.0"),
        ("cuda:sm_90a", "cuda_sm_90a", "CUDA C++ on compute capability 9.0, 16-bit features"),
    )
}


def backends() -> dict[str, str | None]:
    """Every back end's name, with None where it can be used and else the reason why not.

    >>> backends()["eager"] is None
    True
    """
    return {name: entry.load().unavailable() for name, entry in BACKENDS.items()}


def check_backend(name: str) -> None:
    """Raise ValueError for a name that is neither "auto" nor a back end that can be used."""
    # torch.compile cannot trace an import; the operator checks the name when it runs.
    if name == "auto" or torch.compiler.is_compiling():
        return
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, not {name!r}")
    if reason := BACKENDS[name].load().unavailable():
        raise ValueError(f"backend {name!r} cannot be used: {reason}")
