"""The contract of a back end: what it gets, what it returns, how it says that it cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cac_fast.operands import Operands


class Rows(Protocol):
    def __call__(self, operands: Operands, classes: int | None = None) -> tuple[Tensor, Tensor]: ...


def _always_available() -> None:
    return None


def _refuses_nothing(anchors: Tensor) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator: three functions.

    rows: from operands to the loss of each anchor (A,), without reduction, in
        float32 (float64 for float64 anchors), and its gradient by the anchors (A, D) in their dtype
        (Eq. 5). Both are 0 in rows that are not active or admit no negative. It may rely on
        checked operands (`cac_fast.checks.check_operands`) on one device, whose features have one
        dtype, and on anchors that it does not refuse. classes: None or a bound; all labels lie
        below it, and a back end that can tell without waiting for the device raises ValueError
        for one that does not.
    unavailable: why the back end cannot be used on this machine, in one line; None where it can.
    refuses: why it cannot work on anchors like these, in one line; None where it can. Their
        device, dtype and D alone decide.
    """

    rows: Rows
    unavailable: Callable[[], str | None] = _always_available
    refuses: Callable[[Tensor], str | None] = _refuses_nothing
