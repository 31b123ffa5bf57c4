"""Methods: what turns a batch into named losses, one file a method."""

from __future__ import annotations

import torch

from cac_fast import backends
from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods.cac import CAC
from cac_fast.train.methods.supervised import Supervised
from cac_fast.train.networks import Segmenter

__all__ = ["CAC", "Supervised", "build_method"]


def build_method(
    config: Config, network: Segmenter, world: World, bank_dtype: torch.dtype
) -> Supervised:
    """The method that ``config.method`` names, around ``network``."""
    missing = backends().get(config.dc_backend)
    if missing is not None:
        raise InputError(f"--dc-backend {config.dc_backend} cannot be used: {missing}; use auto")
    if config.method == "cac":
        return CAC(network, world, config, bank_dtype)
    return Supervised(network, world, config)
