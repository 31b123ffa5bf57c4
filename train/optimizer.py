"""SGD with a learning rate for the backbone and one for the rest (paper, Sec. 4.1)."""

from __future__ import annotations

import torch

from cac_fast.train.config import Config
from cac_fast.train.methods import Supervised


def build_optimizer(method: Supervised, config: Config) -> torch.optim.SGD:
    """Two groups, backbone and rest; :func:`base_rates` are theirs."""
    backbone = list(method.network.backbone.parameters())
    inside = {id(parameter) for parameter in backbone}
    rest = [item for item in method.parameters() if id(item) not in inside]
    optimizer = torch.optim.SGD(
        [{"params": backbone}, {"params": rest}],
        lr=config.optim.learning_rate,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        fused=True,  # on a GPU one kernel a group, which reads fp16's overflow flag there too
    )
    start_momentum(optimizer)
    return optimizer


def base_rates(config: Config) -> tuple[float, float]:
    """The groups' learning rates before the schedule."""
    return (
        config.optim.learning_rate,
        config.optim.learning_rate * config.optim.head_learning_rate_factor,
    )


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
    """Factor of the poly schedule for the step after ``iteration`` ones (paper, Sec. 4.1)."""
    return (1 - iteration / total) ** power
