"""Methods: what turns a batch into named losses, one file a method."""

from __future__ import annotations

import torch

from cac_fast import Verification, VerificationError, settle_backend, verify
from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods.cac import CAC
from cac_fast.train.methods.supervised import Supervised
from cac_fast.train.networks import Segmenter
from cac_fast.train.registry import METHODS

__all__ = ["CAC", "Supervised", "build_method"]


def build_method(
    config: Config, network: Segmenter, world: World, bank_dtype: torch.dtype
) -> Supervised:
    """The method that ``config.loss.method`` names, around ``network``.

    Raises:
        InputError: its loss cannot be had here, or is not right on this device.
    """
    if config.loss.method != "cac":
        return METHODS.load(config.loss.method)(network, world, config)
    try:
        method = CAC(network, world, config, bank_dtype)
        if config.loss.contrastive:
            found = _verified(config, world, bank_dtype, method.bank.dim)
            method.dc_loss.backend = found.backend
            method.report = (
                f"loss by back end {found.backend}: gradient {found.gradient_error:.0e} off "
                f"float64, that of plain PyTorch {found.plain_gradient_error:.0e}"
            )
    except ValueError as error:
        raise InputError(f"--dc-backend {config.loss.dc_backend}: {error}; use auto") from error
    return method


def _verified(config: Config, world: World, dtype: torch.dtype, dim: int) -> Verification:
    """Compare the loss with float64 on every rank's device, now and not at the first step with it.

    Returns what was found of the back end that all ranks are to use. Raises ValueError for one that
    is not there, and InputError on all ranks where one of them finds it wrong.
    """
    if config.loss.dc_backend == "auto":
        try:
            return settle_backend(world.device, dtype, dim, config.loss.temperature)
        except VerificationError as error:
            raise InputError(f"the loss: {error}; use --device cpu") from error
    found, wrong = None, None
    try:
        found = verify(world.device, dtype, config.loss.dc_backend, dim, config.loss.temperature)
    except VerificationError as error:
        wrong = str(error)
    for line in world.all_gather_objects(wrong):
        if line is not None:
            remedy = "--device cpu" if "'eager'" in line else "--dc-backend eager"
            raise InputError(f"the loss by {line}; use {remedy}")
    return found
