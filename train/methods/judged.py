"""Methods with a network that judges predictions: it has a loss and an optimizer of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.methods.base import Batch, Method, Networks, View
from cac_fast.train.methods.ramp import sigmoid_ramp
from cac_fast.train.networks import Segmenter, upsample_logits
from cac_fast.train.profiling import phase

RAMP_SHARE = 1 / 16
"""Of a run's steps: those in which the weight of the unlabeled images' loss rises."""

LEAST_SIDE = 4
"""Locations a side that a judge's answer has at least: a map of one could judge no part alone."""


class HalfInstanceNorm(nn.Module):
    """Batch norm of the first half of the channels, instance norm without weights of the rest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batch = nn.BatchNorm2d(channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), with more than one location, in the dtype of `x`."""
        first, rest = x.chunk(2, 1)
        return torch.cat((self.batch(first), F.instance_norm(rest)), 1)


class Judge(nn.Module):
    """4x4 convolutions of an image and the class probabilities that a network predicts for it.

    All but the last are followed by norm and LeakyReLU; the weights start as PyTorch draws them.

    layers: channels and stride, 1 or 2, of each convolution. A map keeps its size or has half.
    crop: side of the images in training. A map keeps its size too where half of it would have fewer
        than 4 locations a side.
    """

    def __init__(self, num_classes: int, layers: Sequence[tuple[int, int]], crop: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        width, side = 3 + num_classes, crop
        for number, (channels, wanted) in enumerate(layers, start=1):
            stride = wanted if side // wanted >= LEAST_SIDE else 1
            if parts:
                parts += [HalfInstanceNorm(width), nn.LeakyReLU(0.2)]
            if stride == 1:
                parts.append(nn.ZeroPad2d((0, 1, 0, 1)))
            has_bias = number == len(layers)  # a norm would take it away
            parts.append(nn.Conv2d(width, channels, 4, stride, padding=1, bias=has_bias))
            width, side = channels, side // stride
        self.layers = nn.Sequential(*parts)

    def forward(self, images: Tensor, predicted: Tensor, valid: Tensor) -> Tensor:
        """(B, channels of the last layer, H, W), fp32 at least, upsampled bilinearly.

        images: (B, 3, H, W). predicted: probabilities (B, K, H, W), which count as 0 where the
        bool `valid` (B, H, W) is False.
        """
        inputs = torch.cat((images, predicted * valid.unsqueeze(1)), 1)
        return upsample_logits(self.layers(inputs), images.shape[-2:])


def judge_optimizer(judge: nn.Module, rate: float) -> Optimizer:
    """Adam, as the authors of S4GAN and GCT have it, at the learning rate `rate`."""
    return torch.optim.Adam(judge.parameters(), rate, (0.9, 0.99), fused=True)


class JudgedMethod(Method):
    """A method whose `judge` learns by Adam in the same backward as the networks.

    In the warm-up the networks have their cross entropy alone, and the judge does not learn.
    """

    views: Mapping[str, View] = {"weak": View()}
    judge: Judge
    """A subclass makes it, after all networks."""

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        self.num_classes: int = self.network.classifier[-1].out_channels
        self.joint = config.loss.forward == "joint"
        self.full_weight = config.loss.unsupervised_weight
        self.judge_rate = config.loss.discriminator_learning_rate
        self.warmup, self.ramp = config.num_warmup, RAMP_SHARE * config.optim.iterations

    @property
    def weight(self) -> float:
        """That of the unlabeled images' loss in this step."""
        return self.full_weight * sigmoid_ramp(max(0, self.iteration - self.warmup), self.ramp)

    def more_optimizers(self) -> list[Optimizer]:
        return [judge_optimizer(self.judge, self.judge_rate)]

    def set_unlabeled(self, used: bool) -> None:
        self.judge.requires_grad_(used)

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        if unlabeled is not None:
            return self.judged(labeled, unlabeled)
        networks = self.segmenters()
        losses = [self.supervised_loss(labeled, each, each is networks[-1]) for each in networks]
        loss = torch.stack(losses).sum()
        return {"loss": loss, "loss_ce": loss.detach()}

    def judged(self, labeled: Batch, unlabeled: Batch) -> Batch:
        """`forward` of a step with unlabeled images."""
        raise NotImplementedError

    def both_logits(self, labeled: Batch, unlabeled: Batch, network: Segmenter) -> Tensor:
        """Logits (2 B, K, c, c) of the labeled images, then of the unlabeled ones.

        They come of one pass or, with batch statistics of their own, of two.
        """
        images = labeled["image"], unlabeled["image_weak"]
        is_last = network is self.segmenters()[-1]

        def of_slice(*parts: Tensor) -> tuple[Tensor, ...]:
            return self.logits(torch.cat(parts), network).chunk(len(parts))

        found: list[Tensor] = []
        passes = [images] if self.joint else [(of_kind,) for of_kind in images]
        with phase("forward"):
            for group in passes:
                keep_last = is_last and group is passes[-1]
                slices = self.sliced(of_slice, *group, keep_last=keep_last)
                found += [torch.cat(parts) for parts in zip(*slices, strict=True)]
        return torch.cat(found)
