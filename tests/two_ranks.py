"""A method's step on two ranks, each with half of the batches, without a trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cac_fast.train.distributed import World
from cac_fast.train.methods import Method

Build = Callable[..., Method]
"""A function of a module, or a partial of one: makes the method for `world`."""


def as_rank(rank: int, build: Build, batches: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build(world=World(rank, 2, torch.device("cpu")))
    halves = ({name: x.chunk(2)[rank] for name, x in batch.items()} for batch in batches)
    losses = model(*halves)
    losses["loss"].backward()
    gradients = [weight.grad for weight in model.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= 2
    torch.save(({name: x.detach() for name, x in losses.items()}, gradients), folder / f"{rank}.pt")
    dist.destroy_process_group()


def step(build: Build, batches: Any, folder: Path) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Losses of each rank, and the gradients that DDP would give both."""
    arguments = build, batches, folder
    torch.multiprocessing.start_processes(as_rank, arguments, nprocs=2, start_method="spawn")
    (losses1, gradients), (losses2, _) = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return [losses1, losses2], gradients
