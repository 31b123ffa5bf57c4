"""The trainer's step and the baseline's, ready to be run and timed part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import measure
import numpy as np
import torch
from torch import Tensor, nn
from train_step_baseline import BaselineStep
from train_step_case import Case, make_step, make_trainer, plain

from cac_fast.train.profiling import clocked

WARM_UPS = 2


@dataclass
class Contender:
    """One way to do the step, and what was measured of it."""

    name: str
    case: Case
    call: Callable[[], dict[str, Tensor]]
    held: Callable[[], Iterable[Tensor]]
    times: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)
    peak: int | None = None
    active: int | None = None
    syncs: int | None = None

    def warm_up(self) -> None:
        """Run a few times; take the peak memory of the last and, on CUDA, count what waits."""
        for _ in range(WARM_UPS):
            losses, extra = measure.peak_extra_bytes(self.call, self.case.device)
        if "active" in losses:
            self.active = int(losses["active"])
        if extra is not None:
            self.peak = extra + sum(tensor.nbytes for tensor in self.held())
        if self.case.device.type == "cuda":
            self.syncs = measure.host_syncs(self.call)

    def run(self) -> None:
        """Run once and keep its times."""
        begin = time.process_time()
        with clocked(self.case.device) as clock:
            self.times.append(measure.seconds(self.call, self.case.device))
        self.cpu_times.append(time.process_time() - begin)
        self.parts.append(clock.totals())

    def row(self) -> dict[str, Any]:
        """The columns of the table and of the JSON file."""
        median, low, high = (
            1e3 * float(np.percentile(self.times, share)) for share in (50, 20, 80)
        )
        parts = {
            name: 1e3 * float(np.median([parts[name] for parts in self.parts]))
            for name in self.parts[0]
        }
        case = {key: value for key, value in vars(self.case).items() if key != "device"}
        return {
            **case,
            "provider": self.name,
            "active": self.active,
            "runs": len(self.times),
            "median_ms": median,
            "p20_ms": low,
            "p80_ms": high,
            # Of all threads; steadier than the wall's where others use the machine.
            "cpu_ms": 1e3 * float(np.median(self.cpu_times)),
            "images_per_s": 2e3 * self.case.batch_size / median,
            "parts_ms": parts,
            "loss_share": parts["loss"] / median,
            "peak_mb": None if self.peak is None else self.peak / 1e6,
            "host_syncs": self.syncs,
        }


def trainer_contender(case: Case) -> Contender:
    """The trainer's step."""
    trainer = make_trainer(case)
    case = replace(case, precision=trainer.precision)
    step = make_step(case, trainer.stream.memory_format)

    def held() -> list[Tensor]:
        bank = trainer.method.bank
        return [*training_state(trainer.method, trainer.optimizer), bank.features, bank.labels]

    return Contender("trainer", case, lambda: trainer.optimize(step), held)


def baseline_contender(case: Case) -> Contender:
    """The authors' step, from the same weights."""
    case = plain(case)
    baseline = BaselineStep(make_trainer(case))
    step = make_step(case, torch.contiguous_format)

    def held() -> list[Tensor]:
        past = [tensor for pair in baseline.past for tensor in pair]
        return [*training_state(baseline.method, baseline.optimizer), *past]

    return Contender("baseline", case, lambda: baseline(step.labeled, step.unlabeled), held)


def training_state(method: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, buffers, gradients and momentum."""
    weights = list(method.parameters())
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    momentum = [value for value in states if isinstance(value, Tensor)]
    return [*weights, *method.buffers(), *gradients, *momentum]
