"""Methods: what turns a batch into named losses, one file a method."""

from __future__ import annotations

import torch

from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods.base import Method, Networks
from cac_fast.train.registry import METHODS

__all__ = ["Method", "Networks", "build_method", "method_class"]


def method_class(config: Config) -> type[Method]:
    """The method that `config.loss.method` names; raises InputError if it is none."""
    found = METHODS.load(config.loss.method)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(
            f"--method {config.loss.method}: it is no subclass of cac_fast.train.methods.Method"
        )
    return found


def build_method(config: Config, networks: Networks, world: World, dtype: torch.dtype) -> Method:
    """The settings' method; arguments and errors as of `Method.build`."""
    return method_class(config).build(networks, world, config, dtype)
