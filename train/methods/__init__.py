"""Methods: what turns a batch into named losses, one file a method."""

from __future__ import annotations

import torch

from cac_fast.dispatch import choose_backend
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
    if config.method != "cac":
        return Supervised(network, world, config)
    try:
        method = CAC(network, world, config, bank_dtype)
        # Now, and not at the first step after the warm-up.
        anchors = torch.empty(0, method.bank.dim, dtype=bank_dtype, device=world.device)
        choose_backend(config.dc_backend, anchors)
    except ValueError as error:
        raise InputError(f"--dc-backend {config.dc_backend}: {error}; use auto") from error
    return method
