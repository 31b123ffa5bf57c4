"""What a run settles before it builds anything: precision, batches, determinism."""

from __future__ import annotations

import os

import torch

from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By `--precision`: autocast's dtype, None for none."""


def pick_precision(config: Config, world: World) -> str:
    """A key of `AUTOCAST`: what `--precision` means on this device."""
    if config.optim.precision != "auto":
        return config.optim.precision
    if world.device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def syncs_batch_norm(config: Config, world: World) -> bool:
    """Whether batch statistics are those of all processes; one process needs no help for that."""
    return config.optim.sync_bn and world.size > 1


def check_batch(config: Config, world: World) -> None:
    """Raise InputError for a batch that the processes and slices cannot share."""
    batch, slices = config.optim.batch_size, config.optim.accumulate
    if batch % world.size:
        raise InputError(
            f"--batch-size {batch} cannot be split over {world.size} processes: use a multiple of "
            "it"
        )
    images = batch // world.size
    if images % slices:
        raise InputError(
            f"--accumulate {slices} cannot slice the {images} images per process: use a divisor of "
            "them"
        )
    if images == slices and not config.optim.freeze_bn and not syncs_batch_norm(config, world):
        raise InputError(
            "batch statistics need two images per process and slice: use a larger --batch-size, a "
            "smaller --accumulate or --freeze-bn"
        )


def set_determinism(config: Config, world: World) -> None:
    """Choose PyTorch's algorithms as `--deterministic` says."""
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # On CUDA bilinear upsampling has no deterministic backward: warn, as nothing can replace it.
    warn_only = world.device.type == "cuda"
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=warn_only)
    torch.backends.cudnn.benchmark = not config.run.deterministic
