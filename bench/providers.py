"""Who takes part in the loss bench: bare products, back ends, baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import baselines
import measure
import torch
from cases import Case, Operands
from torch import Tensor

from cac_fast.backend import BACKENDS
from cac_fast.choice import choose_backend

# Tiles of the bare products, anchors x negatives; the fastest in the row at hand stands for them.
PRODUCT_TILES = {
    "cpu": [(256, 1024), (512, 2048), (2048, 8192)],
    "cuda": [(2048, 8192), (4096, 8192), (16384, 8192), (16384, 131072)],
}
# Autograd takes 1 - w from a weight w of the positive, and loses digits where w is close to 1.
BASELINE_SLACK = 10.0


@dataclass(frozen=True)
class Provider:
    """A way to compute loss and gradient, or the products that it cannot do without.

    prepare: from a case's operands to the call that is timed.
    width: how many negatives it meets with all anchors at once, which makes its memory grow with A;
        0 for one that works in tiles, None for all of them.
    slack: its allowed error, relative to that of a back end; None for no check.
    refuses: why it cannot take a case, or None.
    """

    name: str
    prepare: Callable[[Operands], Callable[[], Any]]
    width: int | None = 0
    slack: float | None = 1.0
    refuses: Callable[[Case], str | None] = lambda case: None

    def pairs_held(self, case: Case) -> int:
        width = case.negatives if self.width is None else min(self.width, case.negatives)
        return case.anchors * width


def provider(
    name: str,
    rows: Callable[..., tuple[Tensor, Tensor]],
    width: int | None = 0,
    slack: float = 1.0,
) -> Provider:
    """One that takes the arguments of a back end."""
    return Provider(name, lambda operands: partial(rows, *operands), width, slack)


def backend_provider(name: str, device: torch.device) -> Provider:
    """A back end of the operator."""

    def prepare(operands: Operands) -> Callable[[], tuple[Tensor, Tensor]]:
        return partial(choose_backend(name, operands.anchors), operands)

    def refuses(case: Case) -> str | None:
        dtype = getattr(torch, case.dtype)
        if name == "reference" and dtype.itemsize == 2:
            return "it rounds every step to 16 bits, as dense does"
        anchors = torch.empty(0, case.channels, dtype=dtype, device=device)
        return BACKENDS[name].load().refuses(anchors)

    return Provider(name, prepare, None if name == "reference" else 0, refuses=refuses)


def works_on(name: str, device: torch.device) -> bool:
    """Whether a back end takes features of some dtype on a device."""
    dtypes = torch.float32, torch.bfloat16
    some = [torch.empty(0, Case.channels, dtype=dtype, device=device) for dtype in dtypes]
    return any(BACKENDS[name].load().refuses(anchors) is None for anchors in some)


def find_providers(device: torch.device) -> list[Provider]:
    """The bare products, all back ends that can be used on the device, then the baselines; what is
    to be fast comes first."""
    providers = [Provider("products", fastest_products, slack=None)]
    providers += [
        backend_provider(name, device)
        for name in sorted(BACKENDS, key=lambda name: name == "reference")
        if BACKENDS[name].load().unavailable() is None and works_on(name, device)
    ]
    providers += [
        provider("dense", baselines.dense, None, BASELINE_SLACK),
        provider("compiled", baselines.compiled, None, BASELINE_SLACK),
        provider("chunked", baselines.chunked, baselines.CHUNK, BASELINE_SLACK),
    ]
    if device.type == "cuda":
        providers.append(provider("flex", baselines.flex, 0, BASELINE_SLACK))
    return providers


class Products:
    """The two bare matrix products of as many pairs as are admitted.

    On a GPU a practical limit. On a CPU PyTorch splits each product over the threads, and `cpp`,
    which gives each thread tiles of its own, can be faster.
    """

    def __init__(self, operands: Operands, height: int, width: int) -> None:
        self.anchors = operands.anchors[operands.active]
        count = round(operands.admitted / max(1, len(self.anchors)))
        self.negatives = operands.negatives[:count]
        self.parts = -(-len(self.anchors) // height)
        self.width = width
        self.tile = self.anchors.new_empty(min(height, len(self.anchors)) * min(width, count))

    def __call__(self) -> None:
        for anchors in self.anchors.tensor_split(max(1, self.parts)):
            total = torch.zeros_like(anchors)
            for negatives in self.negatives.split(self.width):
                logits = self.tile[: len(anchors) * len(negatives)].view(len(anchors), -1)
                torch.mm(anchors, negatives.T, out=logits)
                total.addmm_(logits, negatives)


def fastest_products(operands: Operands) -> Products:
    """Those of the tile that is fastest in a second run."""
    device = operands.anchors.device
    candidates = [Products(operands, *tile) for tile in PRODUCT_TILES[device.type]]
    if len(candidates) == 1:
        return candidates[0]
    for products in candidates:
        products()
    return min(candidates, key=lambda products: measure.times(products, device).device)
