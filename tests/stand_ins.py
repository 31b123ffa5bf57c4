"""What stands in for back ends of "auto" (right, wrong, failing, slow, and counted), and for calls
that memory is too small for."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from cac_fast import choice
from cac_fast.backend import BACKENDS, eager
from cac_fast.backend.base import Backend
from cac_fast.operands import Operands


def failing(*given: Any) -> tuple[Tensor, Tensor]:
    raise MemoryError("out of shared memory\nrequired: 300 kB")


def out_of_memory(*_: Any, **__: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")


def wrong_loss(*given: Any) -> tuple[Tensor, Tensor]:
    loss, gradient = eager.dc_loss_rows(*given)
    return loss * 1.01, gradient


def wrong_gradient(*given: Any) -> tuple[Tensor, Tensor]:
    loss, gradient = eager.dc_loss_rows(*given)
    return loss, gradient * 1.01


def slow(*given: Any) -> tuple[Tensor, Tensor]:
    time.sleep(0.1)
    return eager.dc_loss_rows(*given)


def put_back_end(monkeypatch: pytest.MonkeyPatch, name: str, backend: Backend) -> None:
    """In the place of the one of that name."""
    monkeypatch.setitem(BACKENDS, name, SimpleNamespace(load=lambda: backend))


def change_back_end(monkeypatch: pytest.MonkeyPatch, name: str, **parts: Any) -> None:
    """Give the one of that name other functions."""
    put_back_end(monkeypatch, name, replace(BACKENDS[name].load(), **parts))


class Table:
    """Stands in for back ends, and counts what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.calls: Counter[str] = Counter()
        self.given: list[Operands] = []
        monkeypatch.setattr(choice, "_chosen", {})
        monkeypatch.delenv("CAC_FAST_CHECK", raising=False)

    def put(self, name: str, rows: Any = eager.dc_loss_rows) -> None:
        def counted(*given: Any) -> tuple[Tensor, Tensor]:
            self.calls[name] += 1
            self.given.append(given[0])
            return rows(*given)

        def asked(*_: Any) -> None:
            self.calls["questions"] += 1

        put_back_end(self.monkeypatch, name, Backend(counted, asked, asked))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    """Right ones in the places of what "auto" takes on a CPU; nothing is chosen yet."""
    table = Table(monkeypatch)
    table.put("cpp")
    table.put("eager")
    return table


def silently() -> warnings.catch_warnings:
    return warnings.catch_warnings(action="error")
