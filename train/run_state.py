"""All that a run holds, on one rank: made anew or from `last.pt`, and written there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cac_fast.train import checkpoint
from cac_fast.train.config import Config, unused
from cac_fast.train.data.opening import open_inputs
from cac_fast.train.data.stream import Stream, fill_cache
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.log import Meters, RunLog, SilentLog
from cac_fast.train.methods import method_class
from cac_fast.train.networks import (
    Segmenter,
    build_network,
    load_backbone_weights,
    synchronize_batch_norm,
)
from cac_fast.train.optimizer import build_optimizers, load_states, poly
from cac_fast.train.progress import warn
from cac_fast.train.pseudo_labels import KEY, check_sources, digest, open_labels
from cac_fast.train.run_folder import RunFolder
from cac_fast.train.signals import StopSignals

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By `--precision`: autocast's dtype, None for none."""


class RunState:
    """The state of one training run on one rank.

    A checkpoint holds the method, the optimizers, the scaler, where the run stands, and every
    rank's random state; everything else follows from the settings.

    Raises:
        InputError: something in the settings or the data cannot be used.
    """

    def __init__(self, config: Config, world: World) -> None:
        check_batch(config, world)
        set_determinism(config, world)
        self.config, self.world = config, world
        self.iterations = config.optim.iterations
        self.precision = pick_precision(config, world)
        self.autocast_dtype = AUTOCAST[self.precision]
        self.folder = RunFolder(config, world)
        kind = method_class(config)
        check_sources(kind, config)
        self.inputs = world.on_main(lambda: open_inputs(config, bool(kind.views)))
        self.data = self.inputs.data
        former = self.folder.former(self.inputs.digests())
        self.pseudo = open_labels(config, self.inputs, world, self.folder, former)

        # Where the run stands.
        self.iteration = 0
        self.evaluated = 0  # iteration of the last evaluation
        self.best: dict[str, float] | None = None
        self.num_warmup = config.num_warmup
        self.grew_from: int | None = None  # the former run's --iterations
        self.in_step = False
        self.stop = StopSignals()  # received by this rank
        self.stopped_by: int | None = None  # agreed on by all ranks

        # What is trained.
        torch.manual_seed(config.run.seed)  # equal initial weights for every rank and method
        self.weights_report = "random backbone weights (ImageNet's: --weights FILE)"
        if former is not None:
            self.weights_report = f"weights of {self.folder.last}"
        self.method = kind.build(
            lambda: self._new_network(load_weights=former is None),
            world,
            config,
            self.autocast_dtype or torch.float32,
        )
        self.network = self.method.evaluated  # what is scored, and saved for use
        lists = self.data, self.inputs.labeled, self.inputs.unlabeled
        pseudo = None if self.pseudo is None else self.pseudo.samples
        self.stream = Stream(config, world, *lists, self.method.views, pseudo)
        self._place()
        self.model: nn.Module = self.method  # or DDP around it
        self.optimizers = build_optimizers(self.method, config)
        self.optimizer = self.optimizers[0]
        fp16 = self.autocast_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=fp16)

        self.meters = Meters(world.device, self.method.reductions)
        self.log: RunLog | SilentLog = SilentLog()  # rank 0 opens its own when the run begins
        if former is None:
            torch.manual_seed(config.run.seed + world.rank)  # dropout differs between ranks
        else:
            self._restore(former)
        self.stream.prepare_for(self.network.preprocessing)
        if config.data.cache is not None:  # last, as it may take an hour
            unlabeled = self.inputs.unlabeled if self.method.views else []
            lists = self.data, self.inputs.labeled, unlabeled
            world.on_each_machine(lambda: fill_cache(config, *lists, pseudo))

    def _new_network(self, load_weights: bool) -> Segmenter:
        """A network of the settings; its random weights are those of this very call."""
        model = self.config.model
        network = build_network(
            model.network, model.backbone, len(self.data.classes), dropout=model.dropout
        )
        if load_weights and model.weights is not None:
            self.weights_report = str(load_backbone_weights(network, Path(model.weights)))
        return network

    def _place(self) -> None:
        """Make the method what the settings and the device ask for."""
        if syncs_batch_norm(self.config, self.world):
            synchronize_batch_norm(self.method, self.world.new_group())
        if self.config.model.checkpoint_activations:
            for network in self.method.segmenters():
                network.checkpoint_activations()
        if self.config.model.compile:
            self.method.compile_features()
        self.method.to(device=self.world.device, memory_format=self.stream.memory_format)

    def _restore(self, former: dict[str, Any]) -> None:
        for network in {*self.method.segmenters(), self.network}:
            network.backbone.adopt(former.get("backbone", {}))
        checkpoint.load_model(self.method, former["method"], self.folder.last)
        self.method.load_extra_state(former["extra"])
        load_states(self.optimizers, [former["optimizer"], *former.get("optimizers", [])])
        self.scaler.load_state_dict(former["scaler"])
        self.iteration, self.best = former["iteration"], former["best"]
        self.evaluated = former.get("evaluated", self.iteration)
        if (total := former["config"]["iterations"]) != self.iterations:
            self.grew_from = total
        # A longer run's warm-up would be longer, and might end a second time.
        self.num_warmup = former.get("warmup", self.config.changed(iterations=total).num_warmup)
        if self.world.is_main:
            self.stream.skipped = former["skipped"]
        if len(former["random"]) == self.world.size:
            checkpoint.set_random_state(former["random"][self.world.rank], self.world.device)
        else:  # other ranks than before: no stored state is theirs
            torch.manual_seed(self.config.run.seed + self.world.rank + self.iteration)

    def announce(self) -> None:
        """Say where the run stands, what it reads, what it trains, and warn of what looks wrong."""
        config, data, say = self.config, self.data, self.log.say
        if self.iteration == self.iterations:
            say(f"{self.folder.path} is finished already (--restart starts over)")
        elif self.iteration:
            say(f"resuming {self.folder.path} at iteration {self.iteration}")
        if self.grew_from is not None:
            before, now = (
                config.optim.learning_rate * poly(self.iteration, total, config.optim.poly_power)
                for total in (self.grew_from, self.iterations)
            )
            say(
                f"--iterations grew from {self.grew_from} to {self.iterations}: the learning "
                f"rate follows the longer schedule, here {now:.3g} in place of {before:.3g}, and "
                "so do ramps of the loss"
            )
        say(
            f"{config.data.dataset}: {len(self.inputs.labeled)} labeled, "
            f"{len(self.inputs.unlabeled)} unlabeled, {len(data.splits['val'])} validation "
            f"images, {len(data.classes)} classes"
        )
        say(self.inputs.found)
        if self.pseudo is not None:
            say(self.pseudo.found)
        for warning in self.inputs.warnings if self.world.is_main else ():
            warn(warning)
        size = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6
        say(
            f"{config.loss.method}: {config.model.network} on {config.model.backbone}, "
            f"{size:.1f} M parameters"
        )
        say(self.weights_report)
        if self.method.report is not None:
            say(self.method.report)
        if self.world.is_main and (flags := unused(config)):
            warn(f"{config.loss.method} with these settings does not use {', '.join(flags)}")
        say(
            f"{self.iterations} iterations on {self.world.size} x {self.world.device.type}, "
            f"{self.precision}, into {self.folder.path}"
        )
        if not data.splits["val"]:
            say("no validation images: best.pt will be the last state")

    def _save(self) -> None:
        """Write `last.pt`: all that a resumed run needs to go on as if it had never stopped."""
        mine = checkpoint.random_state(self.world.device), self.stream.skipped
        everyone = self.world.all_gather_objects(mine)
        if not self.world.is_main:
            return
        state = self._model_state() | {
            "method": self.method.state_dict(),
            "extra": self.method.extra_state(),
            "optimizer": self.optimizer.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers[1:]],
            "scaler": self.scaler.state_dict(),
            "warmup": self.num_warmup,
            "inputs": self.inputs.digests() | {KEY: digest(self.pseudo)},
            "evaluated": self.evaluated,
            "skipped": sum(skipped for _, skipped in everyone),
            "random": [random for random, _ in everyone],
        }
        checkpoint.write(self.folder.last, state)

    def _write_best(self) -> None:
        if self.world.is_main:
            checkpoint.write(self.folder.best, self._model_state())

    def _model_state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "backbone": self.network.backbone.description(),
            "config": self.config.flat(),
            "classes": list(self.data.classes),
            "palette": [list(color) for color in self.data.palette],
            "iteration": self.iteration,
            "best": self.best,
        }


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
