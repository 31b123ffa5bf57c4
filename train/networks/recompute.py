"""Less memory for more time: activations that are computed again when backward needs them.

`torch.utils.checkpoint` restores autocast and the random state, so dropout falls as before. It
knows nothing of batch norm, whose running statistics a second forward would move once more, and
nothing of dropout that was off in the first forward and is on since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recompute(function: Callable[..., Any], module: nn.Module, *tensors: Tensor) -> Any:
    """`function(*tensors)`, keeping the tensors alone for backward, which calls it once more.

    module: holds every batch norm and dropout that the function runs. The running statistics are
        moved by the first call only, and dropout is on in the second one where it was in the first.
        Gradients are those without recomputation; calls may be nested.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    off = [layer for layer in _dropouts(module) if not layer.training]

    @contextmanager
    def again() -> Iterator[None]:
        with _spare_statistics(module), _without(off):
            yield

    return checkpoint(
        function, *tensors, use_reentrant=False, context_fn=lambda: (nullcontext(), again())
    )


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Dropout of a module in training is off."""
    with _without(_dropouts(module)):
        yield


def recompute_blocks(blocks: Sequence[nn.Module]) -> None:
    """From now on every block keeps its input alone for backward. Weight names do not change."""
    for block in blocks:
        block.forward = partial(recompute, block.forward, block)


def in_slices(
    function: Callable[..., Any],
    count: int,
    module: nn.Module,
    *batch: Tensor,
    keep_last: bool = False,
) -> list[Any]:
    """`function` of every one of `count` equal slices of a batch, with one slice's activations.

    Backward goes through the slices from the last to the first and computes each again just before
    it is needed. The whole is one graph: what is made of the results may couple the slices, and DDP
    sees each gradient once, complete.

    keep_last: backward starts with the last slice, so that its activations may stay: no other
        slice's are there at the same time. Only for the last call of a forward pass.
    """
    slices = list(zip(*(tensor.chunk(count) for tensor in batch), strict=True))
    kept = count - 1 if keep_last or count == 1 else count
    results = [recompute(function, module, *part) for part in slices[:kept]]
    return results + [function(*part) for part in slices[kept:]]


def _dropouts(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, _DropoutNd)]


@contextmanager
def _without(layers: Sequence[nn.Module]) -> Iterator[None]:
    on = [layer for layer in layers if layer.training]
    for layer in on:
        layer.train(False)
    try:
        yield
    finally:
        for layer in on:
            layer.train()


@contextmanager
def _spare_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms in training mode write their running statistics where nobody reads them.

    Other buffers, not another mode: a compiled function must run the very graph that it ran before.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [{name: norm._buffers[name] for name in _STATISTICS} for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers.update({name: torch.empty_like(buffers[name]) for name in _STATISTICS})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
