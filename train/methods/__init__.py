"""Methods: what turns a batch into named losses, one file a method."""

from __future__ import annotations

import torch

from cac_fast import verify
from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError, RankInputError
from cac_fast.train.methods.cac import CAC
from cac_fast.train.methods.supervised import Supervised
from cac_fast.train.networks import Segmenter

__all__ = ["CAC", "Supervised", "build_method"]


def build_method(
    config: Config, network: Segmenter, world: World, bank_dtype: torch.dtype
) -> Supervised:
    """The method that ``config.method`` names, around ``network``.

    Raises:
        InputError: its loss cannot be had here, or is not right on this device.
    """
    if config.method != "cac":
        return Supervised(network, world, config)
    try:
        method = CAC(network, world, config, bank_dtype)
        # Now, and not at the first step after the warm-up.
        found = verify(
            world.device, bank_dtype, config.dc_backend, method.bank.dim, config.temperature
        )
    except ValueError as error:
        raise InputError(f"--dc-backend {config.dc_backend}: {error}; use auto") from error
    except RuntimeError as error:
        raise RankInputError(f"{error}; use --dc-backend eager") from error
    method.report = (
        f"loss by back end {found.backend}: gradient {found.gradient_error:.0e} off float64, that "
        f"of plain PyTorch {found.plain_gradient_error:.0e}"
    )
    return method
