"""Processes and devices: one process, or under torchrun one per GPU (NCCL) or on CPUs (gloo)."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cac_fast.train.errors import InputError, RankInputError, fitting, is_full

# Rank 0 may read every file of a large data set while the others wait for it; a training step that
# waits keeps PyTorch's own limit.
SETUP_LIMIT = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks in place and return it; a no-op for one process."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def new_group(self) -> dist.ProcessGroup | None:
        """A group of all ranks that waits for no other group of them; None for one process."""
        return dist.new_group() if self.size > 1 else None

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give every rank rank 0's buffers of `module`."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def all_gather_objects(self, item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Every rank's `item`, in rank order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=group)
        return items

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and hand its result, or its `InputError`, to every rank.

        The others wait for up to a day.
        """
        if self.size == 1:
            return work()
        with _patient_group() as group:
            outcome = _result_and_error(work) if self.is_main else [None, None]
            dist.broadcast_object_list(outcome, src=0, group=group)
        result, error = outcome
        if error is not None:
            raise InputError(error)
        return result

    def on_each_machine(self, work: Callable[[], None]) -> None:
        """Run `work` on one rank of every machine, and raise an `InputError` everywhere.

        All ranks return when the last machine is done, for which they wait for up to a day.
        """
        if self.size == 1:
            return work()
        with _patient_group() as group:
            mine = os.environ.get("LOCAL_RANK", "0") == "0"
            message = _result_and_error(work)[1] if mine else None
            messages = self.all_gather_objects(message, group)
        for text in messages:
            if text is not None:
                raise InputError(text)


def _result_and_error(work: Callable[[], Any]) -> list[Any]:
    try:
        return [work(), None]
    except InputError as error:
        return [None, str(error)]


@contextmanager
def _patient_group() -> Iterator[dist.ProcessGroup]:
    """All ranks, by gloo, and with time to wait for one of them."""
    group = dist.new_group(backend="gloo", timeout=SETUP_LIMIT)
    yield group
    dist.destroy_process_group(group)


def world_size() -> int:
    """Number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(name: str) -> torch.device:
    """The device of this process for `--device`: `auto` takes CUDA where it is available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > torch.cuda.device_count():
        raise InputError(
            f"{processes} processes on this machine but only {torch.cuda.device_count()} GPU(s): "
            "lower --nproc-per-node or use --device cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def world(device_name: str) -> Iterator[World]:
    """Join the process group that torchrun's environment describes, and leave it at the end."""
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = world_size()
    if size == 1:
        yield World(0, 1, device)
        return
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        place = {"store": unused(store, rank, size), "rank": rank, "world_size": size}
        gpu = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group("nccl" if gpu else "gloo", **gpu, **place)
    except (RuntimeError, ValueError) as error:  # a port in use, a host that is not there
        if is_full(error):  # of a GPU, where NCCL starts at once
            raise
        address = ":".join(os.environ.get(f"MASTER_{name}", "") for name in ("ADDR", "PORT"))
        reason = f"{error}".strip().partition("\n")[0]
        raise InputError(
            f"the {size} processes cannot meet at {address} ({reason}): start them with "
            "torchrun --standalone, or give another --master-port"
        ) from error
    yield World(dist.get_rank(), size, device)
    # Not after an error: leaving in order would wait for ranks that know nothing of it.
    dist.destroy_process_group()


def unused(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of `store`, the same on all ranks, in which no earlier try has left anything.

    After a failure torchrun hands the new processes the store of the former ones, with their
    addresses in it: ranks that find those wait for processes that have ended.
    """
    if rank:
        asked = uuid.uuid4().hex  # no other process waits for this answer
        store.set(f"asked/{rank}", asked)
        name = store.get(f"answer/{asked}").decode()
        store.add(f"heard/{name}", 1)
        return dist.PrefixStore(name, store)
    name = uuid.uuid4().hex
    deadline = time.monotonic() + store.timeout.total_seconds()
    answered: set[str] = set()  # former processes too: which ones wait cannot be told
    while store.add(f"heard/{name}", 0) < size - 1:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {size} processes have come within {store.timeout}")
        for other in range(1, size):
            if not store.check([f"asked/{other}"]):
                continue
            asked = store.get(f"asked/{other}").decode()
            if asked not in answered:
                store.set(f"answer/{asked}", name)
                answered.add(asked)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command's body; an `InputError` becomes one line (a machine) and exit code 2."""
    # A file name that is no UTF-8 must not end a run that prints it.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with fitting(
            "memory is full: end other programs that use it, or use --device cpu if it is a GPU's"
        ):
            return command() or 0
    except InputError as error:
        # A file may be missing on one machine alone.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankInputError):
            line = str(error).translate({10: "\\n", 13: "\\r"})  # a file's name may hold them
            print(f"error: {line}", file=sys.stderr, flush=True)
        return 2
