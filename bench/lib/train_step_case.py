"""What the bench of the step measures: a trainer, a synthetic batch, negatives, and a check."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast.train import config
from cac_fast.train.data.crops import CELL
from cac_fast.train.data.stream import Step
from cac_fast.train.distributed import World
from cac_fast.train.engine import Trainer
from cac_fast.train.methods import Method
from cac_fast.train.networks import Segmenter
from lib.made_up import write_folder
from lib.train_step_baseline import BaselineStep

CLASSES = 19
# Of a loss; of a parameter's gradient, relative to its norm: a rounding may turn a direction round.
LOSS_ERROR, GRADIENT_ERROR = 1e-4, 2e-2


@dataclass(frozen=True)
class Case:
    """One step: `batch_size` labeled and as many unlabeled images, M negatives in all."""

    network: str
    backbone: str
    batch_size: int
    crop_size: int
    negatives: int
    precision: str
    device: torch.device
    more: tuple[str, ...] = ()  # further options of train/main.py

    @property
    def cells(self) -> int:
        """Locations of one view of the batch."""
        return self.batch_size * (self.crop_size // CELL) ** 2

    @property
    def per_view_and_steps(self) -> tuple[int, int]:
        """Negatives of each view, and over how many steps, that make M; as few steps as can be.

        Raises:
            ValueError: an odd M.
        """
        if self.negatives % 2 or self.negatives < 2:
            raise ValueError(f"two views cannot share {self.negatives} negatives: make it even")
        half = self.negatives // 2
        steps = next(n for n in range(-(-half // self.cells), half + 1) if half % n == 0)
        return half // steps, steps


def make_trainer(case: Case, *more: str) -> Trainer:
    """A trainer that is ready for `optimize`, its bank full, its pseudo labels of all classes.

    more: options of train/main.py that go over those of the case. Always the same weights.

    Raises:
        InputError: options that no trainer takes.
    """
    per_view, steps = case.per_view_and_steps
    options = {
        "network": case.network,
        "backbone": case.backbone,
        "batch-size": case.batch_size,
        "crop-size": case.crop_size,
        "precision": case.precision,
        "device": case.device.type,
        "negatives-per-view": per_view,
        "bank-past-steps": steps - 1,
        "normalization": "active",
        # Every pair is active in one direction: the most that the loss can cost.
        "threshold": 0,
        # Next to nothing, so that every repetition meets the same weights.
        "learning-rate": 1e-9,
        "workers": 0,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), CLASSES, side=8, count=1)
        where = ["--dataset", "folder", "--data-dir", folder, "--output", f"{folder}/run"]
        settings = config.parse([*where, *flags, *case.more, *more])
        trainer = Trainer(settings, World(0, 1, case.device))
    trainer.use_unlabeled(True)
    step = make_step(case, trainer.stream.memory_format)
    spread_labels(trainer.method, trainer.network, step.unlabeled["image_1"])
    rng = torch.Generator(case.device).manual_seed(2)
    bank = trainer.method.bank
    for _ in range(steps):
        size = (2 * per_view, bank.dim)
        rows = torch.randn(size, generator=rng, device=case.device)
        labels = torch.randint(CLASSES, size[:1], generator=rng, device=case.device)
        bank.push(F.normalize(rows, dim=1), labels)
    return trainer


def make_step(case: Case, memory_format: torch.memory_format) -> Step:
    """Smooth random images on the device, labels of 19 classes, crops offset by up to a half."""
    rng = torch.Generator().manual_seed(1)
    batch, crop = case.batch_size, case.crop_size
    blocks = -(-crop // 32)

    def images() -> Tensor:
        coarse = torch.randn(batch, 3, blocks, blocks, generator=rng)
        smooth = F.interpolate(coarse, size=(crop, crop), mode="bilinear")
        smooth += 0.3 * torch.randn(smooth.shape, generator=rng)
        return smooth.to(case.device).contiguous(memory_format=memory_format)

    def flips() -> Tensor:
        return (torch.rand(batch, generator=rng) < 0.5).to(case.device)

    labels = torch.randint(CLASSES + 1, (batch, blocks, blocks), generator=rng, dtype=torch.uint8)
    labels[labels == CLASSES] = 255
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :crop, :crop]
    side = crop // CELL
    offset = torch.randint(-(side // 2), side // 2 + 1, (batch, 2), generator=rng)
    valid = torch.full((batch, 2), side, device=case.device)
    return Step(
        {"image": images(), "label": labels.contiguous().to(case.device)},
        {
            "image_1": images(),
            "image_2": images(),
            "offset": offset.to(case.device),
            "flip1": flips(),
            "flip2": flips(),
            "valid1": valid,
            "valid2": valid.clone(),
        },
        0.0,
    )


def problem(case: Case) -> str | None:
    """What differs between the trainer's step and the baseline's, in float32 and without dropout.

    Compares the supervised and the contrastive loss and the gradients of a few weights; None where
    they agree.
    """
    torch.backends.cudnn.allow_tf32, before = False, torch.backends.cudnn.allow_tf32
    try:
        # A joint pass, or slices, would have other batch statistics.
        separate = ("--forward=separate", "--accumulate=1")
        trainer = make_trainer(case, "--precision=fp32", "--no-dropout", *separate)
        baseline = BaselineStep(make_trainer(plain(case), "--no-dropout"))
        torch.manual_seed(3)  # of the chosen negatives
        losses = trainer.optimize(make_step(case, trainer.stream.memory_format))
        torch.manual_seed(3)
        expected = baseline(*make_step(case, torch.contiguous_format)[:2])
    finally:
        torch.backends.cudnn.allow_tf32 = before
    for name in ("loss_ce", "loss_dc"):
        mine, theirs = float(losses[name]), float(expected[name])
        if not abs(mine - theirs) <= LOSS_ERROR * abs(theirs):
            return f"{name} is {mine:.7g}, the baseline's {theirs:.7g}"
    if not losses["active"] > 0:
        return "no anchor is active"
    mine, theirs = (dict(method.named_parameters()) for method in (trainer.method, baseline.method))
    names = [name for name in mine if name.endswith("weight") and mine[name].ndim == 4]
    for name in (names[0], *names[-5:]):  # the first convolution; decoder, classifier, projector
        difference = (mine[name].grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        if not difference <= GRADIENT_ERROR:
            return f"gradient of {name} differs by {float(difference):.2g} of its norm"
    return None


def plain(case: Case) -> Case:
    """The same in float32 and with nothing of the trainer's more that was asked for."""
    return replace(case, precision="fp32", more=())


@torch.no_grad()
def spread_labels(method: Method, network: Segmenter, images: Tensor) -> None:
    """Center and scale the logits of a random network of `method`: else all pixels would have one
    label. images: (B, 3, H, W)."""
    method.train()
    classifier = network.classifier[-1]
    kept: list[Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    network.classify(method.features(images, network))
    hook.remove()
    logits = nn.functional.conv2d(kept[0], classifier.weight)
    scale = 3 / logits.std((0, 2, 3))
    classifier.weight *= scale.view(-1, 1, 1, 1)
    classifier.bias.copy_(-scale * logits.mean((0, 2, 3)))
