"""Methods: what turns a batch into named losses, one file a method."""

from __future__ import annotations

import torch

from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.methods.base import Method, Networks
from cac_fast.train.methods.cac import CAC
from cac_fast.train.methods.supervised import Supervised

__all__ = ["CAC", "Method", "Networks", "Supervised", "build_method", "method_class"]

METHODS: dict[str, type[Method]] = {"cac": CAC, "supervised": Supervised}


def method_class(config: Config) -> type[Method]:
    """The method that ``config.loss.method`` names."""
    return METHODS[config.loss.method]


def build_method(config: Config, networks: Networks, world: World, dtype: torch.dtype) -> Method:
    """The settings' method; arguments and errors as of `Method.build`."""
    return method_class(config).build(networks, world, config, dtype)
