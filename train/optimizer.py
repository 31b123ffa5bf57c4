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
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,  # on a GPU one kernel a group, which reads fp16's overflow flag there too
    )
    start_momentum(optimizer)
    return optimizer


def base_rates(config: Config) -> tuple[float, float]:
    """The groups' learning rates before the schedule."""
    return config.learning_rate, config.learning_rate * config.head_learning_rate_factor


def start_momentum(optimizer: torch.optim.SGD) -> None:
    """Momentum 0, the same as none, for weights without: the projector has no gradient at first.

    A fused step takes a group whose weights either all have one or all have none.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if group["momentum"] and "momentum_buffer" not in optimizer.state[weight]:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def poly(iteration: int, total: int, power: float) -> float:
    """Factor of the poly schedule for the step after ``iteration`` ones (paper, Sec. 4.1)."""
    return (1 - iteration / total) ** power
