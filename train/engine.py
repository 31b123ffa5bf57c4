"""The training loop: from a `Config` to a run folder."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from cac_fast.train import checkpoint
from cac_fast.train.batch import Batch, Step
from cac_fast.train.config import Config
from cac_fast.train.data.workers import lost_workers, undisturbed
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError, fitting
from cac_fast.train.evaluation import evaluate
from cac_fast.train.log import RunLog, train_line
from cac_fast.train.networks import freeze_batch_norm
from cac_fast.train.optimizer import groups, has_gradients, poly
from cac_fast.train.pictures import SampleSheet
from cac_fast.train.profiling import StepProfile, phase
from cac_fast.train.run_state import RunState

# DDP's copying of rank 0's buffers before every step, as PyTorch calls it: the older name last.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)

_FULL_OUTSIDE_A_STEP = (
    "memory is full outside a step: end other programs that use it, or use --accumulate, a "
    "smaller --crop-size or --batch-size, or --device cpu"
)


def train(config: Config, world: World) -> dict[str, Any]:
    """Run a training; return `{"best": {"miou", "iteration"} | None, "last": result | None}`.

    Raises:
        InputError: something in the settings or the data cannot be used.
    """
    with fitting(_FULL_OUTSIDE_A_STEP):
        return Trainer(config, world).run()


class Trainer(RunState):
    """The loop over the state of a run."""

    def run(self) -> dict[str, Any]:
        """Train to the last iteration; return the best and the last validation result."""
        self.world.on_main(lambda: self.folder.prepare(new=self.iteration == 0))
        if self.world.is_main:
            self.log = RunLog(self.folder.path, self.iterations, self.iteration, self.evaluated)
        self.announce()
        self.meters.restart_clock()
        result = None
        try:
            with self.stop, lost_workers(), fitting(_FULL_OUTSIDE_A_STEP):
                if self.evaluated < self.iteration and self._evaluation_is_due():
                    result = self._evaluate()  # the former try was ended before it
                for step in self._profiled(self._steps()):
                    self._train_step(step)
                    result = self._finish_step() or result
                    if self.stopped_by is not None:
                        break
                if self.iteration == self.iterations and not self.data.splits["val"]:
                    self._write_best()
        except InputError:
            # A bad file costs nothing that was trained; under torchrun saving would need all ranks.
            sound = self.meters.first_bad < 0 and checkpoint.is_finite(self.method)
            if self.world.size == 1 and sound and not self.in_step:
                # The first error is the one to mend.
                with contextlib.suppress(InputError, RuntimeError, MemoryError):
                    self._save()
                    if self.meters.steps:
                        self._read_meters()
            raise
        finally:
            self.log.close()
        if self.stopped_by is not None and self.iteration < self.iterations:
            self.log.say(f"stopped at iteration {self.iteration}: the same command goes on there")
            raise SystemExit(128 + self.stopped_by)
        if self.best is not None:
            self.log.say(
                f"best val mIoU {self.best['miou']:.4f} at iteration {self.best['iteration']}, "
                f"run folder {self.folder.path}"
            )
        return {"best": self.best, "last": result}

    def _steps(self) -> Iterator[Step]:
        """All batches to come: warm-up without the unlabeled stream, then with both.

        DDP expects the same parameters to take part in every step: each phase has a wrapper.
        """
        begin = self.num_warmup if self.method.views else self.iterations
        for end in (min(begin, self.iterations), self.iterations):
            if self.iteration < end:
                both = self.iteration >= begin
                self.use_unlabeled(both)
                yield from self.stream.steps(self.iteration, end, both)

    def use_unlabeled(self, used: bool) -> None:
        """Make ready for steps with unlabeled images, or for steps without."""
        self.method.set_unlabeled(used)
        if self.world.size > 1:
            # Statistics of batch norm are equal with SyncBN and each rank's own without. Newer DDP
            # hands rank 0's to all at this point, whatever it is told.
            self.world.broadcast_buffers(self.method)
            self.model = DistributedDataParallel(
                self.method, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False}
            )

    def _profiled(self, steps: Iterator[Step]) -> Iterator[Step]:
        if self.config.run.profile is None or not self.world.is_main:
            return steps
        trace = self.folder.path / "trace.json"
        profile = StepProfile(self.config.run.profile, self.world.device, trace, self.log.say)
        return profile.watch(steps, with_unlabeled=bool(self.method.views))

    def _train_step(self, step: Step) -> None:
        with undisturbed():
            self.in_step = True
            with fitting(
                f"a step does not fit in the memory of {self.world.device}: go on with "
                "--checkpoint-activations, or start over with --accumulate, a smaller "
                "--crop-size or a smaller --batch-size"
            ):
                losses = self.optimize(step)
            self.iteration += 1
            self.in_step = False
            self.meters.add(self.iteration, losses, step)
            self.log.step()

    def optimize(self, step: Step) -> Batch:
        """One step of every optimizer on the batches of `step`; the method's named scalars."""
        config = self.config
        factor = poly(self.iteration, self.iterations, config.optim.poly_power)
        for group in groups(self.optimizers):
            group["lr"] = group["base_lr"] * factor
        self.model.train()
        if config.optim.freeze_bn:
            freeze_batch_norm(self.model)
        self.method.iteration = self.iteration
        amp = self.autocast_dtype is not None
        with torch.autocast(self.world.device.type, self.autocast_dtype, enabled=amp):
            losses = self.model(step.labeled, step.unlabeled)
        with phase("backward"):
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(losses["loss"]).backward()
        with phase("optimizer"):
            for optimizer in filter(has_gradients, self.optimizers):
                self.scaler.step(optimizer)
            self.scaler.update()
            self.method.after_step()
        return losses

    def _finish_step(self) -> dict[str, Any] | None:
        """Log, evaluate and save where due; return the evaluation's result if there was one."""
        config, iteration = self.config, self.iteration
        due_eval = self._evaluation_is_due()
        due_save = (
            due_eval or iteration == self.iterations or iteration % config.run.save_every == 0
        )
        stopping = self.stop.received is not None and self.world.size == 1
        if due_save or stopping or iteration % config.run.log_every == 0:
            self._read_meters()  # before saving: what is not finite must not be kept
        due_save = due_save or self.stopped_by is not None
        # Asked of all: without --sync-bn each rank has running statistics of its own.
        if due_save and not all(self.world.all_gather_objects(checkpoint.is_finite(self.method))):
            self._stop_not_finite(iteration)
        if due_save:
            self._save()  # before the evaluation, which may fail
        return self._evaluate() if due_eval else None

    def _evaluation_is_due(self) -> bool:
        last = self.iteration == self.iterations
        due = last or self.iteration % self.config.num_eval_every == 0
        return due and bool(self.data.splits["val"])

    def _read_meters(self) -> None:
        """Write a line of metrics; stop the run if a loss was not finite. Waits for the device."""
        mine = {"signal": self.stop.received, "skipped": self.stream.skipped}
        readings = self.world.all_gather_objects(self.meters.read() | mine)
        bad = [item["first_bad"] for item in readings if item["first_bad"] >= 0]
        if bad:
            self._stop_not_finite(min(bad))
        # Ranks must stop after the same step: the wish of one is that of all.
        signals = [item["signal"] for item in readings if item["signal"] is not None]
        self.stopped_by = signals[0] if signals else None
        line = train_line(readings, self.optimizer.param_groups[0]["lr"], self.method.reductions)
        self.log.train(self.iteration, line)

    def _stop_not_finite(self, iteration: int) -> None:
        parts = self.world.all_gather_objects(self.stream.names(iteration))
        names = [name for part in parts for name in part]
        kept = (
            f"the last good checkpoint is {self.folder.last}"
            if self.folder.last.is_file()
            else "no checkpoint was due before it"
        )
        raise InputError(
            f"loss or weights are not finite at iteration {iteration}, batch: {', '.join(names)}; "
            f"{kept}; try a lower --learning-rate or --precision fp32"
        )

    def _evaluate(self) -> dict[str, Any]:
        sheet = SampleSheet(self.data.palette)
        # Without SyncBN each rank has statistics of its own; a checkpoint holds those of rank 0.
        self.world.broadcast_buffers(self.network)
        # Images of many sizes: searching for the fastest algorithm would start anew for each.
        torch.backends.cudnn.benchmark = False
        result = evaluate(
            self.network,
            self.data.splits["val"],
            self.data,
            self.world,
            workers=self.config.data.workers,
            autocast_dtype=self.autocast_dtype,
            channels_last=self.stream.memory_format is torch.channels_last,
            on_prediction=sheet.add if self.world.is_main else None,
        )
        torch.backends.cudnn.benchmark = not self.config.run.deterministic
        self.log.val(self.iteration, result)
        pixels = sheet.write(self.folder.path / "samples" / f"{self.iteration:07d}.png")
        if pixels is not None:
            self.log.image("val/image_truth_prediction", pixels, self.iteration)
        if self.best is None or result["miou"] > self.best["miou"]:
            self.best = {"miou": result["miou"], "iteration": self.iteration}
            self._write_best()
        self.evaluated = self.iteration
        self._save()
        self.meters.restart_clock()
        return result
