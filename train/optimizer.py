"""SGD with a learning rate for the backbone and one for the rest (paper, Sec. 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cac_fast.train.config import Config
from cac_fast.train.methods import Method
from cac_fast.train.methods.teacher import Teacher


def build_optimizers(method: Method, config: Config) -> list[Optimizer]:
    """The SGD of the method's networks, and the further optimizers that it has.

    The SGD has two groups, the backbones and the rest. Every group of each has its learning rate
    before the schedule as `base_lr`.
    """
    more = method.more_optimizers()
    elsewhere = {
        id(weight) for item in more for group in item.param_groups for weight in group["params"]
    }
    teachers = [module for module in method.modules() if isinstance(module, Teacher)]
    elsewhere |= _ids(teachers)
    inside = _ids([network.backbone for network in method.segmenters()])
    mine = [weight for weight in method.parameters() if id(weight) not in elsewhere]
    rate = config.optim.learning_rate
    sgd = torch.optim.SGD(
        [
            {"params": [weight for weight in mine if id(weight) in inside]},
            {
                "params": [weight for weight in mine if id(weight) not in inside],
                "lr": rate * config.optim.head_learning_rate_factor,
            },
        ],
        lr=rate,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        fused=True,  # on a GPU one kernel a group, which reads fp16's overflow flag there too
    )
    start_momentum(sgd)
    optimizers = [sgd, *more]
    for group in groups(optimizers):
        group["base_lr"] = group["lr"]
    return optimizers


def groups(optimizers: list[Optimizer]) -> list[dict[str, Any]]:
    """The groups of all of them."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def load_states(optimizers: list[Optimizer], states: list[dict[str, Any]]) -> None:
    """Take back the optimizers' `state_dict`; the base rates stay those of the settings."""
    rates = [group["base_lr"] for group in groups(optimizers)]
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    for group, rate in zip(groups(optimizers), rates, strict=True):
        group["base_lr"] = rate
    start_momentum(optimizers[0])
    for optimizer in optimizers[1:]:  # a fused step takes memory as it lies
        for weight, state in optimizer.state.items():
            laid_out = {
                name: torch.empty_like(weight).copy_(value)
                for name, value in state.items()
                if value.shape == weight.shape and value.stride() != weight.stride()
            }
            state.update(laid_out)


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether a weight of it has a gradient: without any a scaler knows no step to take."""
    return any(w.grad is not None for group in optimizer.param_groups for w in group["params"])


def start_momentum(optimizer: torch.optim.SGD) -> None:
    """Give every weight what a fused step needs: a momentum, laid out in memory as the weight is.

    Momentum 0 is the same as none, which the projector has as long as it has no gradient. A
    checkpoint of another device has another memory format, and one may be of a step not fused.
    """
    for group in optimizer.param_groups:
        group["fused"] = True
        for weight in group["params"] if group["momentum"] else ():
            state = optimizer.state[weight]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                state["momentum_buffer"] = torch.zeros_like(weight)
            elif buffer.stride() != weight.stride():
                state["momentum_buffer"] = torch.empty_like(weight).copy_(buffer)


def poly(iteration: int, total: int, power: float) -> float:
    """Factor of the poly schedule for the step after `iteration` ones (paper, Sec. 4.1)."""
    return (1 - iteration / total) ** power


def _ids(modules: list[nn.Module]) -> set[int]:
    return {id(weight) for module in modules for weight in module.parameters()}
