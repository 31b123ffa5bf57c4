"""Two processes of one group. They stay for the next test: PyTorch takes seconds to load."""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cac_fast.train.distributed import World
from cac_fast.train.methods import Method

Build = Callable[..., Method]
"""A function of a module, or a partial of one: makes the method for `world`."""


def run(function: Callable[..., None], *arguments: Any) -> None:
    """`function(world, *arguments)` in each, which must leave its process as it was."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "store", function, arguments
        try:
            calls = [processes().submit(in_group, rank, *given) for rank in (0, 1)]
        except BrokenProcessPool:  # another test has killed all that its process had started
            processes.cache_clear()
            calls = [processes().submit(in_group, rank, *given) for rank in (0, 1)]
        try:
            for call in wait(calls, return_when=FIRST_EXCEPTION).done:
                call.result()
        except BaseException:  # the other one may wait for ever
            processes.cache_clear()
            for process in multiprocessing.active_children():
                process.kill()
            raise


@functools.cache
def processes() -> ProcessPoolExecutor:
    # Not forked: autograd may have threads by now, which a fork does not have.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,))


def in_group(rank: int, store: Path, function: Callable[..., None], arguments: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        function(World(rank, 2, torch.device("cpu")), *arguments)
    finally:
        dist.destroy_process_group()


def as_rank(world: World, build: Build, batches: Any, folder: Path) -> None:
    model = build(world=world)
    halves = ({name: x.chunk(2)[world.rank] for name, x in batch.items()} for batch in batches)
    losses = model(*halves)
    losses["loss"].backward()
    gradients = [weight.grad for weight in model.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= 2
    found = {name: x.detach() for name, x in losses.items()}, gradients
    torch.save(found, folder / f"{world.rank}.pt")


def step(build: Build, batches: Any, folder: Path) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """A method's step, each rank with half of the batches, without a trainer: losses of each rank,
    and the gradients that DDP would give both."""
    run(as_rank, build, batches, folder)
    (losses1, gradients), (losses2, _) = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return [losses1, losses2], gradients
