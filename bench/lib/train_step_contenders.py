"""The trainer's step and the baseline's, run and timed part by part."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cac_fast.train.engine import Trainer
from cac_fast.train.profiling import clocked
from lib import measure
from lib.train_step_baseline import HEADS, BaselineStep
from lib.train_step_case import Case, make_step, make_trainer, plain

WARM_UPS = 2
TIMES = ("median_ms", "p20_ms", "p80_ms", "cpu_ms", "images_per_s")

Call = Callable[[], dict[str, Tensor]]
Held = Callable[[], Iterable[Tensor]]


@dataclass
class Contender:
    """One way to do the step, and what was measured of it.

    make: from the case as asked for to the case as it is run, the step, and the tensors that live
        from step to step.
    """

    name: str
    case: Case
    make: Callable[[Case], tuple[Case, Call, Held]]
    call: Call | None = None
    held: Held | None = None
    times: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)
    host: float | None = None
    peak: int | None = None
    active: int | None = None
    syncs: int | None = None
    status: str = "ok"

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """What `action` returns; None if memory does not suffice for it, or did not before."""
        if self.status != "ok":
            return None
        try:
            return action(*arguments)
        except torch.cuda.OutOfMemoryError as error:
            self.status = f"failed: {str(error).splitlines()[0]}"
        measure.progress(f"{self.name}, M {self.case.negatives:,} {self.status}")
        # Only here, as the error held the tensors of the frames that it came through.
        self.call = self.held = None
        self.times.clear()
        gc.collect()
        torch.cuda.empty_cache()
        return None

    def prepare(self) -> None:
        """Make the step. Raises InputError or ValueError for a case that cannot be."""
        self.case, self.call, self.held = self.make(self.case)

    def warm_up(self) -> None:
        """Run a few times; take the peak memory of the last. On CUDA count what waits, and time the
        host."""
        for _ in range(WARM_UPS):
            losses, extra = measure.peak_extra_bytes(self.call, self.case.device)
        if "active" in losses:
            self.active = int(losses["active"])
        if extra is not None:
            self.peak = extra + sum(tensor.nbytes for tensor in self.held())
        if self.case.device.type == "cuda":
            self.syncs = measure.host_syncs(self.call)
            self.host, _ = measure.host_and_wall(self.call, self.case.device)

    def run(self) -> None:
        """Run once and keep its times."""
        begin = time.process_time()
        with clocked(self.case.device) as clock:
            took = measure.device_seconds(self.call, self.case.device, self.host or 0.0)
        self.times.append(took)
        self.cpu_times.append(time.process_time() - begin)
        self.parts.append(clock.totals())

    def row(self) -> dict[str, Any]:
        """The columns of the table and of the JSON file."""
        case = {key: value for key, value in vars(self.case).items() if key != "device"}
        return {
            **case,
            "provider": self.name,
            "status": self.status,
            "active": self.active,
            "runs": len(self.times),
            **self._time_columns(),
            "peak_mb": None if self.peak is None else self.peak / 1e6,
            "host_syncs": self.syncs,
            "host_ms": None if self.host is None else 1e3 * self.host,
        }

    def _time_columns(self) -> dict[str, Any]:
        if not self.times:
            return {**dict.fromkeys(TIMES), "parts_ms": {}, "loss_share": None}
        milliseconds = measure.percentiles(self.times)
        median = milliseconds["median_ms"]
        parts = {
            name: 1e3 * float(np.median([parts[name] for parts in self.parts]))
            for name in self.parts[0]
        }
        return {
            **milliseconds,
            # Of all threads; steadier than the wall's where others use the machine.
            "cpu_ms": 1e3 * float(np.median(self.cpu_times)),
            "images_per_s": 2e3 * self.case.batch_size / median,
            "parts_ms": parts,
            "loss_share": parts["loss"] / median,
        }


def trainer_step(case: Case) -> tuple[Case, Call, Held]:
    """The trainer's step."""
    return _step_of(make_trainer(case), case)


def plain_heads_step(case: Case) -> tuple[Case, Call, Held]:
    """The trainer's step with the baseline's heads: what is upsampled is convolved where it is
    large, with every tap of the dilated convolutions."""
    trainer = make_trainer(case)
    head = trainer.network.head
    head.forward = partial(HEADS[case.network], head)
    return _step_of(trainer, case)


def _step_of(trainer: Trainer, case: Case) -> tuple[Case, Call, Held]:
    case = replace(case, precision=trainer.precision)
    step = make_step(case, trainer.stream.memory_format)

    def held() -> list[Tensor]:
        bank = trainer.method.bank
        return [*training_state(trainer.method, trainer.optimizer), bank.features, bank.labels]

    return case, lambda: trainer.optimize(step), held


def baseline_step(case: Case) -> tuple[Case, Call, Held]:
    """The authors' step, from the same weights."""
    case = plain(case)
    baseline = BaselineStep(make_trainer(case))
    step = make_step(case, torch.contiguous_format)

    def held() -> list[Tensor]:
        past = [tensor for pair in baseline.past for tensor in pair]
        return [*training_state(baseline.method, baseline.optimizer), *past]

    return case, lambda: baseline(step.labeled, step.unlabeled), held


def training_state(method: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, buffers, gradients and momentum."""
    weights = list(method.parameters())
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    momentum = [value for value in states if isinstance(value, Tensor)]
    return [*weights, *method.buffers(), *gradients, *momentum]
