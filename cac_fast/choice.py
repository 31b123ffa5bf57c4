"""Which back end serves given tensors: the one that is named, or what "auto" takes for them."""

from __future__ import annotations

import os
import warnings
from functools import cache
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cac_fast.backend import BACKENDS, check_backend
from cac_fast.backend.base import Rows
from cac_fast.proven import proven_paths
from cac_fast.tiles import needs_offset
from cac_fast.verification import (
    QUICK,
    THOROUGH,
    Verification,
    VerificationError,
    compare,
    make_case,
)

# What "auto" takes, by device, dtype, D, and whether the temperature takes other kernels.
Key = tuple[torch.device, torch.dtype, int, bool]
_chosen: dict[Key, str] = {}
_lock = Lock()


def choose_backend(name: str, anchors: Tensor, temperature: float = 0.1) -> Rows:
    """The function behind a name; for "auto" that of the fastest back end that is right here.

    The first use of "auto" on a device, a dtype and a D compares a small case with float64, and the
    first use at a temperature that needs other kernels once more. `settle_backend` says what it may
    take, and how all ranks take the same.
    CAC_FAST_CHECK=0 in the environment leaves the comparison out. It is also left out while a CUDA
    graph is captured and in tracing, where an earlier choice holds, or else the first candidate.

    Raises:
        ValueError: an unknown name, or a back end that cannot be used here or on these.
        VerificationError: all that "auto" may take fail or are wrong.
    """
    return BACKENDS[_choose(name, anchors, temperature)].load().rows


def verify(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    dim: int = 128,
    temperature: float = 0.1,
) -> Verification:
    """Compare a back end with the reference in float64, on random features.

    It takes a moment, and compiles what has to be compiled. Random states are left alone.

    device, dtype: of the features.
    backend: "auto" or a name from `cac_fast.backends()`.
    dim: D.
    temperature: tau.

    Raises:
        ValueError: bad choices, as by the loss.
        VerificationError: the back end, which it names, fails or is further off in some row than
            rounding explains.

    >>> verify(backend="eager", dim=16).gradient_error < 1e-5
    True
    """
    operands = make_case(THOROUGH, torch.device(device), dtype, dim, temperature)
    return compare(_choose(backend, operands.anchors, temperature), operands)


def settle_backend(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    dim: int = 128,
    temperature: float = 0.1,
    group: dist.ProcessGroup | None = None,
) -> Verification:
    """Settle what "auto" means for such features, from now on and for all ranks; return the proof.

    On a GPU "auto" may take the paths proven on its architecture (`cac_fast.proven`), then Triton,
    then plain PyTorch, and on a CPU C++, then plain PyTorch: the first that agrees with float64 on
    every rank, by the comparison that `verify` makes. A warning names those that do not.

    All ranks of `group` call this together, each with its own device. Without it each rank chooses
    for itself at its first loss, where nothing is exchanged.

    device, dtype: of the features.
    dim: D.
    temperature: tau.
    group: None for all ranks there are.

    Raises:
        ValueError: bad choices, as by the loss.
        VerificationError: there is no such back end; raised on all ranks.

    >>> settle_backend(dim=16).backend in ("cpp", "eager")
    True
    """
    operands = problem = None
    try:
        operands = make_case(THOROUGH, torch.device(device), dtype, dim, temperature)
    except Exception as error:  # told below, as the other ranks wait for this one
        problem = error
    everyones = _all_gather([] if problem else _candidates(operands.anchors), group)
    if problem:
        raise problem
    wrong = []
    for name in everyones[0]:
        if not all(name in candidates for candidates in everyones):
            continue
        found = error = None
        try:
            found = compare(name, operands)
        except VerificationError as problem:
            error = str(problem)
        errors = [text for text in _all_gather(error, group) if text is not None]
        if not errors:
            _chosen[_key(operands.anchors, temperature)] = name
            if wrong and (len(everyones) == 1 or dist.get_rank(group) == 0):
                _warn(name, wrong)
            return found
        wrong.append(errors[0])
    reasons = wrong or ["no back end can be used on all ranks"]
    raise VerificationError(f"no back end is right: {'; '.join(reasons)}")


def _choose(name: str, anchors: Tensor, temperature: float) -> str:
    """The name, checked; for "auto" what it takes."""
    if name == "auto":
        key = _key(anchors, temperature)
        return _chosen.get(key) or _first_choice(key, anchors, temperature)
    check_backend(name)
    if refusal := BACKENDS[name].load().refuses(anchors):
        raise ValueError(f"backend {name!r} cannot be used: {refusal}")
    return name


def _key(anchors: Tensor, temperature: float) -> Key:
    dtype = anchors.dtype
    return anchors.device, dtype, anchors.shape[1], needs_offset(dtype, temperature)


def _first_choice(key: Key, anchors: Tensor, temperature: float) -> str:
    """Find and remember what "auto" takes for such anchors, or what it takes this time."""
    candidates = _candidates(anchors)
    if _must_not_check(anchors):
        return candidates[0]
    wrong: list[str] = []
    with _lock:
        if (name := _chosen.get(key)) is not None:
            return name  # another thread's
        name = _first_right(candidates, anchors, temperature, wrong)
        _chosen[key] = name
    if wrong:
        _warn(name, wrong)
    return name


def _first_right(
    candidates: list[str], anchors: Tensor, temperature: float, wrong: list[str]
) -> str:
    """The first candidate that agrees with float64; why not the others goes into `wrong`."""
    if os.environ.get("CAC_FAST_CHECK") == "0" or anchors.device.type not in QUICK:
        return candidates[0]
    # With few channels, or at an extreme temperature, some gradients are too small to be compared
    # in 16 bits. The kernels are the same at these values.
    dim, temperature = max(anchors.shape[1], 16), min(max(temperature, 0.01), 10)
    operands = make_case(QUICK, anchors.device, anchors.dtype, dim, temperature)
    for name in candidates:
        try:
            return compare(name, operands).backend
        except VerificationError as error:
            wrong.append(str(error))
    raise VerificationError(
        f"no back end is right: {'; '.join(wrong)}; name one, or set CAC_FAST_CHECK=0"
    )


def _must_not_check(anchors: Tensor) -> bool:
    return (
        anchors.numel() == 0
        or torch.compiler.is_compiling()
        or isinstance(anchors, FakeTensor)
        # Asking about a capture needs a driver.
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _candidates(anchors: Tensor) -> list[str]:
    """What "auto" may take for such anchors, the best first. Says once what is unavailable."""
    names = ["cpp", "eager"] if anchors.device.type == "cpu" else ["eager"]
    if anchors.device.type == "cuda":
        names = list(dict.fromkeys([*proven_paths(anchors.device), "triton", "eager"]))
    found = []
    for name in names:
        backend = BACKENDS[name].load()
        if reason := backend.unavailable():
            _say_what_is_unavailable(name, reason)
        elif not backend.refuses(anchors):
            found.append(name)
    return found


@cache
def _say_what_is_unavailable(name: str, reason: str) -> None:
    """Cached, so said once a process."""
    warnings.warn(
        f"cac_fast does without its back end {name!r}: {reason}", RuntimeWarning, stacklevel=2
    )


def _warn(name: str, wrong: list[str]) -> None:
    warnings.warn(
        f"cac_fast falls back on its back end {name!r}: {'; '.join(wrong)}",
        RuntimeWarning,
        stacklevel=2,
    )


def _all_gather(item: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's item, in rank order; this process's alone without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return [item]
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items
