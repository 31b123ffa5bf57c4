"""The training loop: from a :class:`Config` to a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cac_fast.train import checkpoint
from cac_fast.train.config import Config
from cac_fast.train.data.layouts import Sample
from cac_fast.train.data.opening import look_at, open_lists
from cac_fast.train.data.stream import Step, Stream, fill_cache
from cac_fast.train.data.workers import lost_workers, undisturbed
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError, RankInputError
from cac_fast.train.evaluation import evaluate
from cac_fast.train.inference import out_of_memory
from cac_fast.train.log import Meters, RunLog, train_line
from cac_fast.train.methods import build_method
from cac_fast.train.networks import (
    build_network,
    load_backbone_weights,
    synchronize_batch_norm,
)
from cac_fast.train.optimizer import base_rates, build_optimizer, poly, start_momentum
from cac_fast.train.profiling import StepProfile, phase
from cac_fast.train.progress import warn
from cac_fast.train.run_folder import RunFolder
from cac_fast.train.samples import SampleSheet

# DDP's copying of rank 0's buffers before every step, as PyTorch calls it: the older name last.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: Config, world: World) -> dict[str, Any]:
    """Run a training; return ``{"best": {"miou", "iteration"} | None, "last": result | None}``.

    Raises:
        InputError: something in the settings or the data cannot be used.
    """
    return Trainer(config, world).run()


class Trainer:
    """One training run on one rank.

    The state that a checkpoint holds is the method (network, projector, bank), the optimizer, the
    scaler, the iteration, the best result and every rank's random state; everything else follows
    from the settings.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.folder = RunFolder(config, world)
        self.iteration = 0
        self.evaluated = 0  # iteration of the last evaluation
        self.num_warmup = config.num_warmup
        self.grew_from: int | None = None  # the former run's --iterations
        self.best: dict[str, float] | None = None
        self.in_step = False
        self.signal: int | None = None  # received by this rank
        self.signaled = 0.0  # when, by time.monotonic()
        self.stopped_by: int | None = None  # agreed on by all ranks
        self.precision = _precision(config, world)
        self.autocast_dtype = AUTOCAST[self.precision]

        if config.batch_size % world.size:
            raise InputError(
                f"--batch-size {config.batch_size} cannot be split over {world.size} processes: "
                "use a multiple of it"
            )
        images = config.batch_size // world.size
        if images % config.accumulate:
            raise InputError(
                f"--accumulate {config.accumulate} cannot slice the {images} images per process: "
                "use a divisor of them"
            )
        if images == config.accumulate and not config.freeze_bn and not self._syncs_bn():
            raise InputError(
                "batch statistics need two images per process and slice: use a larger "
                "--batch-size, a smaller --accumulate or --freeze-bn"
            )
        _set_determinism(config, world)

        def open_and_look() -> tuple[Any, ...]:
            data, labeled, unlabeled = open_lists(config)
            return data, labeled, unlabeled, look_at(config, data, labeled)

        self.data, labeled, unlabeled, self.found = world.on_main(open_and_look)
        self.inputs = {"labeled": _digest(labeled), "unlabeled": _digest(unlabeled)}
        former = self.folder.former(self.inputs)
        self.stream = Stream(config, world, self.data, labeled, unlabeled)
        self._build(load_weights=former is None)
        if former is None:
            torch.manual_seed(config.seed + world.rank)  # dropout differs between ranks
        else:
            self._restore(former)
        self.stream.prepare_for(self.network.preprocessing)
        if config.cache is not None:  # last, as it may take an hour
            world.on_each_machine(lambda: fill_cache(config, self.data, labeled, unlabeled))

    # ---- set-up

    def _build(self, load_weights: bool) -> None:
        config, device = self.config, self.world.device
        torch.manual_seed(config.seed)  # equal initial weights for every rank and method
        network = build_network(
            config.network, config.backbone, len(self.data.classes), dropout=config.dropout
        )
        self.weights_report = "random backbone weights (ImageNet's: --weights FILE)"
        if not load_weights:
            self.weights_report = f"weights of {self.folder.last}"
        elif config.weights is not None:
            self.weights_report = str(load_backbone_weights(network, Path(config.weights)))
        self.method = build_method(
            config, network, self.world, self.autocast_dtype or torch.float32
        )
        if self._syncs_bn():
            synchronize_batch_norm(self.method, self.world.new_group())
        self.network = self.method.network
        if config.checkpoint_activations:
            self.network.checkpoint_activations()
        if config.compile:
            self.method.compile_features()
        self.method.to(device=device, memory_format=self.stream.memory_format)
        self.optimizer = build_optimizer(self.method, config)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.autocast_dtype is torch.float16
        )

    def _syncs_bn(self) -> bool:
        return self.config.sync_bn and self.world.size > 1  # one process needs none

    def _restore(self, former: dict[str, Any]) -> None:
        self.network.backbone.adopt(former.get("backbone", {}))
        checkpoint.load_model(self.method, former["method"], self.folder.last)
        self.method.load_extra_state(former["extra"])
        self.optimizer.load_state_dict(former["optimizer"])
        start_momentum(self.optimizer)
        self.scaler.load_state_dict(former["scaler"])
        self.iteration, self.best = former["iteration"], former["best"]
        self.evaluated = former.get("evaluated", self.iteration)
        if (total := former["config"]["iterations"]) != self.config.iterations:
            self.grew_from = total
        # A longer run's warm-up would be longer, and might end a second time.
        self.num_warmup = former.get(
            "warmup", dataclasses.replace(self.config, iterations=total).num_warmup
        )
        if self.world.is_main:
            self.stream.skipped = former["skipped"]
        if len(former["random"]) == self.world.size:
            checkpoint.set_random_state(former["random"][self.world.rank], self.world.device)
        else:  # other ranks than before: no stored state is theirs
            torch.manual_seed(self.config.seed + self.world.rank + self.iteration)

    # ---- the loop

    def run(self) -> dict[str, Any]:
        """Train to the last iteration; return the best and the last validation result."""
        self.world.on_main(lambda: self.folder.prepare(new=self.iteration == 0))
        states = self.config.iterations, self.iteration, self.evaluated
        self.log = RunLog(self.folder.path, *states, self.world.is_main)
        self.meters = Meters(self.world.device)
        self._announce()
        result = None
        try:
            with self._stop_signals(), lost_workers():
                if self.evaluated < self.iteration and self._evaluation_is_due():
                    result = self._evaluate()  # the former try was ended before it
                for step in self._profiled(self._steps()):
                    self._train_step(step)
                    result = self._after_step() or result
                    if self.stopped_by is not None:
                        break
                if self.iteration == self.config.iterations and not self.data.splits["val"]:
                    self._write_best()
        except InputError:
            # A bad file costs nothing that was trained; under torchrun saving would need all ranks.
            sound = self.meters.first_bad < 0 and _is_finite(self.method)
            if self.world.size == 1 and sound and not self.in_step:
                with contextlib.suppress(InputError):  # the first error is the one to mend
                    self._save()
            raise
        finally:
            self.log.close()
        if self.stopped_by is not None and self.iteration < self.config.iterations:
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
        config = self.config
        contrastive_from = config.iterations if config.method == "supervised" else self.num_warmup
        for end in (min(contrastive_from, config.iterations), config.iterations):
            if self.iteration >= end:
                continue
            both = self.iteration >= contrastive_from
            self.use_unlabeled(both)
            yield from self.stream.steps(self.iteration, end, both)

    def use_unlabeled(self, used: bool) -> None:
        """Make ready for steps with unlabeled images, or for steps without."""
        self.method.set_unlabeled(used)
        self.model: nn.Module = self.method
        if self.world.size > 1:
            # Statistics of batch norm are equal with SyncBN and each rank's own without. Newer DDP
            # hands rank 0's to all at this point, whatever it is told.
            self.world.broadcast_buffers(self.method)
            self.model = DistributedDataParallel(
                self.method, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False}
            )

    def _profiled(self, steps: Iterator[Step]) -> Iterator[Step]:
        config = self.config
        if config.profile is None or not self.world.is_main:
            return steps
        trace = self.folder.path / "trace.json"
        profile = StepProfile(config.profile, self.world.device, trace, self.log.say)
        return profile.watch(steps, contrastive=config.method != "supervised")

    def _train_step(self, step: Step) -> None:
        with undisturbed():
            self.in_step = True
            try:
                losses = self.optimize(step)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise RankInputError(
                    f"a step does not fit in the memory of {self.world.device}: go on with "
                    "--checkpoint-activations, or start over with --accumulate, a smaller "
                    "--crop-size or a smaller --batch-size"
                ) from error
            self.iteration += 1
            self.in_step = False
            self.meters.add(self.iteration, losses, step.waited)
            self.log.step()

    def optimize(self, step: Step) -> dict[str, torch.Tensor]:
        """One optimizer step on the batches of ``step``; return the method's named scalars."""
        config = self.config
        factor = poly(self.iteration, config.iterations, config.poly_power)
        for group, rate in zip(self.optimizer.param_groups, base_rates(config), strict=True):
            group["lr"] = rate * factor
        self.model.train()
        if config.freeze_bn:
            _freeze_batch_norm(self.model)
        amp = self.autocast_dtype is not None
        with torch.autocast(self.world.device.type, self.autocast_dtype, enabled=amp):
            losses = self.model(step.labeled, step.unlabeled)
        with phase("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(losses["loss"]).backward()
        with phase("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return losses

    def _after_step(self) -> dict[str, Any] | None:
        """Log, evaluate and save where due; return the evaluation's result if there was one."""
        config, iteration = self.config, self.iteration
        final = iteration == config.iterations
        due_eval = self._evaluation_is_due()
        due_save = final or due_eval or iteration % config.save_every == 0
        stopping = self.signal is not None and self.world.size == 1
        if due_save or stopping or iteration % config.log_every == 0:
            self._read_meters()  # before saving: what is not finite must not be kept
        due_save = due_save or self.stopped_by is not None
        # Asked of all: without --sync-bn each rank has running statistics of its own.
        if due_save and not all(self.world.all_gather_objects(_is_finite(self.method))):
            self._stop_not_finite(iteration)
        if due_save:
            self._save()  # before the evaluation, which may fail
        return self._evaluate() if due_eval else None

    def _evaluation_is_due(self) -> bool:
        last = self.iteration == self.config.iterations
        due = last or self.iteration % self.config.num_eval_every == 0
        return due and bool(self.data.splits["val"])

    def _read_meters(self) -> None:
        """Write a line of metrics; stop the run if a loss was not finite. Waits for the device."""
        reading = self.meters.read() | {"signal": self.signal, "skipped": self.stream.skipped}
        readings = self.world.all_gather_objects(reading)
        bad = [item["first_bad"] for item in readings if item["first_bad"] >= 0]
        if bad:
            self._stop_not_finite(min(bad))
        signals = [item["signal"] for item in readings if item["signal"] is not None]
        self.stopped_by = signals[0] if signals else None
        line = train_line(readings, self.config.batch_size, self.optimizer.param_groups[0]["lr"])
        self.log.train(self.iteration, line)

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
            workers=self.config.workers,
            autocast_dtype=self.autocast_dtype,
            channels_last=self.stream.memory_format is torch.channels_last,
            on_prediction=sheet.add if self.world.is_main else None,
        )
        torch.backends.cudnn.benchmark = not self.config.deterministic
        self.log.val(self.iteration, result)
        if (picture := sheet.picture()) is not None:
            self.log.sample(self.iteration, picture)
        if self.best is None or result["miou"] > self.best["miou"]:
            self.best = {"miou": result["miou"], "iteration": self.iteration}
            self._write_best()
        self.evaluated = self.iteration
        self._save()
        self.meters.restart_clock()
        return result

    # ---- what is kept

    def _model_state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "backbone": self.network.backbone.description(),
            "config": dataclasses.asdict(self.config),
            "classes": list(self.data.classes),
            "palette": [list(color) for color in self.data.palette],
            "iteration": self.iteration,
            "best": self.best,
        }

    def _write_best(self) -> None:
        if self.world.is_main:
            checkpoint.write(self.folder.best, self._model_state())

    def _save(self) -> None:
        """Write ``last.pt``: all that a resumed run needs to go on as if it had never stopped."""
        mine = checkpoint.random_state(self.world.device), self.stream.skipped
        everyone = self.world.all_gather_objects(mine)
        if not self.world.is_main:
            return
        state = self._model_state() | {
            "method": self.method.state_dict(),
            "extra": self.method.extra_state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "warmup": self.num_warmup,
            "position": self.iteration * self.config.batch_size,
            "inputs": self.inputs,
            "evaluated": self.evaluated,
            "skipped": sum(skipped for _, skipped in everyone),
            "random": [random for random, _ in everyone],
        }
        checkpoint.write(self.folder.last, state)

    # ---- words and stops

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the run after the current step, with a checkpoint."""

        def stop(number: int, _: Any) -> None:
            # Ranks must stop after the same step: under torchrun the meters carry the wish.
            if self.signal is None:
                self.signal, self.signaled = number, time.monotonic()
            # A second one ends the run at once; not the first one's double, sent to the group.
            elif time.monotonic() - self.signaled > 1:
                signal.signal(number, former[number])
                signal.raise_signal(number)

        former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

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

    def _announce(self) -> None:
        config, say = self.config, self.log.say
        if self.iteration == config.iterations:
            say(f"{self.folder.path} is finished already (--restart starts over)")
        elif self.iteration:
            say(f"resuming {self.folder.path} at iteration {self.iteration}")
        if self.grew_from is not None:
            before, now = (
                config.learning_rate * poly(self.iteration, total, config.poly_power)
                for total in (self.grew_from, config.iterations)
            )
            say(
                f"--iterations grew from {self.grew_from} to {config.iterations}: the learning "
                f"rate follows the longer schedule, here {now:.3g} in place of {before:.3g}"
            )
        say(
            f"{config.dataset}: {len(self.stream.labeled)} labeled, "
            f"{len(self.stream.unlabeled)} unlabeled, {len(self.data.splits['val'])} validation "
            f"images, {len(self.data.classes)} classes"
        )
        table, warnings = self.found
        say(table)
        for warning in warnings if self.world.is_main else ():
            warn(warning)
        size = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6
        say(f"{config.method}: {config.network} on {config.backbone}, {size:.1f} M parameters")
        say(self.weights_report)
        if self.method.report is not None:
            say(self.method.report)
        say(
            f"{config.iterations} iterations on {self.world.size} x {self.world.device.type}, "
            f"{self.precision}, into {self.folder.path}"
        )
        if not self.data.splits["val"]:
            say("no validation images: best.pt will be the last state")


def _digest(samples: list[Sample]) -> str:
    """What tells one list of images from another."""
    names = "\n".join(sample.name for sample in samples)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def _is_finite(module: nn.Module) -> bool:
    tensors = [value for value in module.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in tensors]).all())


def _precision(config: Config, world: World) -> str:
    if config.precision != "auto":
        return config.precision
    if world.device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _set_determinism(config: Config, world: World) -> None:
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # On CUDA bilinear upsampling has no deterministic backward: warn, as nothing can replace it.
    warn_only = world.device.type == "cuda"
    torch.use_deterministic_algorithms(config.deterministic, warn_only=warn_only)
    torch.backends.cudnn.benchmark = not config.deterministic


def _freeze_batch_norm(model: nn.Module) -> None:
    """Let every batch norm of ``model`` use its running statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
