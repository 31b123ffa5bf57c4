"""Networks that learn by no gradient: an averaged copy, and a view of a module as it is."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cac_fast.train.distributed import World
from cac_fast.train.networks import Segmenter


class Teacher(nn.Module):
    """A copy of a network that follows it as an exponential moving average (EMA).

    Always in eval mode; its parameters require no gradient and belong to no optimizer. To be made
    in a method's constructor, before the network is compiled or its blocks are recomputed.

    decay: share of the old value that a step keeps, at most; the t-th step keeps 1 - 1 / t, so that
        the first ones are forgotten.
    world: the processes that train together. All have the same teacher, rank 0's batch statistics
        included: a checkpoint holds no others.
    """

    def __init__(self, network: Segmenter, decay: float, world: World) -> None:
        super().__init__()
        self.copy = deepcopy(network).requires_grad_(False)
        self.decay, self.world = decay, world
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images (B, 3, H, W), without gradient."""
        with torch.no_grad():
            return self.copy(images)

    @torch.no_grad()
    def update(self, network: Segmenter, iteration: int) -> None:
        """Move parameters and float buffers toward those of `network`, whose copy this is.

        iteration: steps before the one that was just done.
        """
        keep = min(1 - 1 / (iteration + 1), self.decay)
        torch._foreach_lerp_(_averaged(self.copy), _averaged(network), 1 - keep)
        if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            self.world.broadcast_buffers(self.copy)  # each rank's student has statistics of its own


def frozen(module: nn.Module) -> Callable[..., Any]:
    """`module` as a function through which its parameters get no gradient, but its inputs do."""

    def call(*inputs: Any) -> Any:
        fixed = {name: value.detach() for name, value in module.named_parameters()}
        return functional_call(module, fixed, inputs)

    return call


def _averaged(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]
