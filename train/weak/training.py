"""The training of a classification network, in a run folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cac_fast.train import checkpoint
from cac_fast.train.batch import Step
from cac_fast.train.config import Config
from cac_fast.train.data.augment import UnlabeledTransform
from cac_fast.train.data.images import read_image
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.loaders import batches, unlabeled_loader
from cac_fast.train.data.stream import on_image
from cac_fast.train.data.views import View
from cac_fast.train.data.workers import lost_workers
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.inference import STRIDE
from cac_fast.train.log import Meters, RunLog
from cac_fast.train.networks import freeze_batch_norm, load_backbone_weights
from cac_fast.train.networks.backbones import build_backbone
from cac_fast.train.optimizer import load_states, poly, start_momentum
from cac_fast.train.run_folder import RunFolder
from cac_fast.train.signals import StopSignals
from cac_fast.train.weak.cam import scaled
from cac_fast.train.weak.classifier import Classifier, image_tensor
from cac_fast.train.weak.labels import ImageLabels, Labels, classes_in_masks, foreground_of
from cac_fast.train.weak.scores import classification_scores


class ClassifierLog(RunLog):
    """The log of a classification network's training."""

    def val(self, iteration: int, result: dict[str, Any]) -> None:
        """Write one `"kind": "val"` line."""
        self._write("val", iteration, result)
        score = "-" if result["map"] is None else f"{result['map']:.4f}"
        self.say(f"[{iteration}/{self.total}] val mAP {score}  F1 {result['f1']:.4f}")


class ClassifierRun:
    """The training of a classification network in a run folder, in one process.

    Raises:
        InputError: the folder holds another run, or weights or images cannot be used.
    """

    def __init__(
        self, config: Config, world: World, data: SegmentationData, labels: ImageLabels
    ) -> None:
        self.config, self.device, self.data, self.labels = config, world.device, data, labels
        self.foreground = foreground_of(data)
        self.targets = {
            sample.name: self._target(ids)
            for sample, ids in zip(labels.samples, labels.labels, strict=True)
        }
        self.scored = [sample for sample in data.splits["val"] if sample.mask is not None]
        self.inputs = {"or otherwise labeled": labels.digest()}
        self.folder = RunFolder(config, world)
        former = self.folder.former(self.inputs)
        torch.manual_seed(config.run.seed)
        backbone = build_backbone(config.model.backbone, output_stride=STRIDE, low_stride=4)
        self.network = Classifier(backbone, len(self.foreground))
        self.report = "random backbone weights (ImageNet's: --weights FILE)"
        if former is not None:
            self.report = f"weights of {self.folder.last}"
        elif config.model.weights is not None:
            self.report = str(load_backbone_weights(self.network, Path(config.model.weights)))
        self.network.to(self.device)
        self.optimizer = self._build_optimizer()
        self.iteration = self.evaluated = 0
        if former is not None:
            backbone.adopt(former["backbone"])
            checkpoint.load_model(self.network, former["method"], self.folder.last)
            load_states([self.optimizer], [former["optimizer"]])
            self.iteration, self.evaluated = former["iteration"], former["evaluated"]
            checkpoint.set_random_state(former["random"], self.device)
        backbone.preprocessing.check_crop(config.data.crop_size)

    def digest(self) -> str:
        """The SHA-256 of the network's weights."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def train(self) -> Classifier:
        """Train to the last iteration, from where a former run stopped; in eval mode at the end.

        Raises:
            InputError: an image or a mask cannot be used, or the loss is not finite.
            SystemExit: a signal to stop came; the run is saved.
        """
        total, run = self.config.optim.iterations, self.config.run
        self.folder.prepare(new=self.iteration == 0)
        log = ClassifierLog(self.folder.path, total, self.iteration, self.evaluated)
        self._announce(log)
        meters, stop = Meters(self.device), StopSignals()
        truth = classes_in_masks(self.scored, self.data)
        try:
            with stop, lost_workers():
                if self.evaluated < self.iteration and self._is_due():
                    self._evaluate(log, truth)
                for step in self._steps():
                    self.iteration += 1
                    meters.add(self.iteration, {"loss": self._optimize(step)}, step)
                    log.step()
                    due = self._is_due() or self.iteration % run.save_every == 0
                    due = due or stop.received is not None
                    if due or self.iteration % run.log_every == 0:
                        self._write_line(log, meters.read())
                    if due:
                        self._save()
                    if self._is_due():
                        self._evaluate(log, truth)
                        meters.restart_clock()
                    if stop.received is not None:
                        break
        finally:
            log.close()
        if stop.received is not None and self.iteration < total:
            log.say(f"stopped at iteration {self.iteration}: the same command goes on there")
            raise SystemExit(128 + stop.received)
        return self.network.eval()

    def _announce(self, log: RunLog) -> None:
        folder = self.folder.path
        if self.iteration == self.config.optim.iterations:
            log.say(f"the network in {folder} is trained already (--restart starts over)")
        elif self.iteration:
            log.say(f"resuming {folder} at iteration {self.iteration}")
        log.say(self.labels.found)
        log.say(
            f"classification network on {self.config.model.backbone} for {len(self.foreground)} "
            f"classes; {len(self.scored)} validation images"
        )
        log.say(self.report)

    def _target(self, ids: Labels) -> Tensor:
        return torch.tensor([float(index in ids) for index in self.foreground])

    def _build_optimizer(self) -> torch.optim.SGD:
        optim, network = self.config.optim, self.network
        optimizer = torch.optim.SGD(
            [
                {"params": list(network.backbone.parameters())},
                {
                    "params": list(network.convolution.parameters()),
                    "lr": optim.learning_rate * optim.head_learning_rate_factor,
                },
            ],
            lr=optim.learning_rate,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
        start_momentum(optimizer)
        return optimizer

    def _steps(self) -> Iterator[Step]:
        """The batches to come: `image` (B, 3, c, c) uint8, `shown` bool and `target`."""
        config, crop = self.config, self.config.data.crop_size
        scales = config.data.labeled_scale, config.data.base_size
        transform = UnlabeledTransform(crop, *scales, (1.0, 1.0), False, {"1": View()})
        loader = unlabeled_loader(
            self.labels.samples,
            self.data,
            transform,
            seed=config.run.seed,
            batch_size=config.optim.batch_size,
            start_iteration=self.iteration,
            workers=config.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        stream = batches(loader)
        for _ in range(self.iteration, config.optim.iterations):
            before = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - before
            target = torch.stack([self.targets[name] for name in batch["name"]])
            image, flip, valid, target = (
                value.to(self.device, non_blocking=True)
                for value in (batch["image1"], batch["flip1"], batch["valid1"], target)
            )
            shown = on_image(flip, valid, crop)
            yield Step({"image": image, "shown": shown, "target": target}, None, waited)

    def _optimize(self, step: Step) -> Tensor:
        factor = poly(
            self.iteration - 1, self.config.optim.iterations, self.config.optim.poly_power
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.network.train()
        if self.config.optim.freeze_bn:
            freeze_batch_norm(self.network)
        logits = self.network(step.labeled["image"], step.labeled["shown"])
        loss = F.multilabel_soft_margin_loss(logits, step.labeled["target"])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss

    def _write_line(self, log: RunLog, reading: dict[str, Any]) -> None:
        if reading["first_bad"] >= 0 or not checkpoint.is_finite(self.network):
            raise InputError(
                f"loss or weights are not finite at iteration {self.iteration}: start over with "
                "--restart and a lower --learning-rate"
            )
        line = {
            "loss": reading["means"]["loss"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": reading["images"] * reading["steps_per_s"],
            "data_s": reading["data_s"],
            "peak_memory_mb": reading["peak_memory_mb"],
        }
        log.train(self.iteration, line)

    def _is_due(self) -> bool:
        last = self.iteration == self.config.optim.iterations
        return last or self.iteration % self.config.num_eval_every == 0

    def _evaluate(self, log: RunLog, truth: Sequence[Labels]) -> None:
        if self.scored:
            self.network.eval()
            found = np.stack([self._probabilities(sample) for sample in self.scored])
            truth = np.array([[index in ids for index in self.foreground] for ids in truth])
            log.val(self.iteration, classification_scores(found, truth))
        self.evaluated = self.iteration
        self._save()

    @torch.no_grad()
    def _probabilities(self, sample: Sample) -> np.ndarray:
        image = image_tensor(read_image(sample.image), self.device)
        return self.network(scaled(image[None], 1.0))[0].sigmoid().cpu().numpy()

    def _save(self) -> None:
        state = {
            "method": self.network.state_dict(),
            "backbone": self.network.backbone.description(),
            "config": self.config.flat(),
            "classes": [self.data.classes[index] for index in self.foreground],
            "optimizer": self.optimizer.state_dict(),
            "inputs": self.inputs,
            "iteration": self.iteration,
            "evaluated": self.evaluated,
            "random": checkpoint.random_state(self.device),
        }
        checkpoint.write(self.folder.last, state)
