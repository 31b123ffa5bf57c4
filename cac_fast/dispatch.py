"""Which back ends of the operator there are, and which one serves given tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from torch import Tensor

from cac_fast import _extension, cuda, eager, kernels, reference
from cac_fast.kernels import gluon

Rows = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int | None],
    tuple[Tensor, Tensor],
]


def _nothing_missing() -> None:
    return None


def _anything(anchors: Tensor) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator.

    rows: the function; see `cac_fast.ops` for what it may rely on. missing: why it cannot be used
    on this machine, or None. refuses: why it cannot work on anchors like these, or None.
    """

    rows: Rows
    missing: Callable[[], str | None] = _nothing_missing
    refuses: Callable[[Tensor], str | None] = _anything


BACKENDS = {
    "reference": Backend(reference.dc_loss_rows),
    "eager": Backend(eager.dc_loss_rows),
    "cpp": Backend(_extension.dc_loss_rows, _extension.why_not, _extension.refuses),
    "triton": Backend(kernels.dc_loss_rows, kernels.why_not, kernels.refuses),
    "triton:gluon": Backend(gluon.dc_loss_rows, gluon.why_not, gluon.refuses),
    "cuda": Backend(cuda.dc_loss_rows, cuda.why_not, cuda.refuses),
    # The same back end by its kernels for sm_90a.
    "cuda:sm_90a": Backend(
        *(partial(f, sm_90a=True) for f in (cuda.dc_loss_rows, cuda.why_not, cuda.refuses))
    ),
}

# The fastest first.
_PREFERRED = {"cpu": ("cpp", "eager"), "cuda": ("triton", "eager")}


def backends() -> dict[str, str | None]:
    """Every back end's name, with None where it can be used and else the reason why not."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def check_backend(name: str) -> None:
    """Raise ValueError for a name that is neither "auto" nor a back end that can be used."""
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, not {name!r}")
    if missing := BACKENDS[name].missing():
        raise ValueError(f"backend {name!r} cannot be used: {missing}")


@cache
def _say_what_is_missing(name: str, missing: str) -> None:
    """Cached, so said once a process."""
    warnings.warn(
        f"cac_fast does without its back end {name!r}: {missing}", RuntimeWarning, stacklevel=2
    )


def choose_backend(name: str, anchors: Tensor) -> Rows:
    """The function behind a name; for "auto" the fastest one that can work on such anchors.

    Raises ValueError for an unknown name, and for a back end that cannot be used here or on these.
    """
    if name == "auto":
        for candidate in _PREFERRED.get(anchors.device.type, ("eager",)):
            backend = BACKENDS[candidate]
            if missing := backend.missing():
                _say_what_is_missing(candidate, missing)
            elif not backend.refuses(anchors):
                return backend.rows
    check_backend(name)
    backend = BACKENDS[name]
    if refusal := backend.refuses(anchors):
        raise ValueError(f"backend {name!r} cannot be used: {refusal}")
    return backend.rows
