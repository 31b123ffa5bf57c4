"""S4GAN: a discriminator tells predictions from masks, and chooses which ones are learned."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cac_fast.train.config import Config
from cac_fast.train.data.stream import on_image
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods.base import (
    Batch,
    Method,
    Networks,
    View,
    check_separate,
    cross_entropy_sum,
)
from cac_fast.train.methods.judged import judge_optimizer
from cac_fast.train.methods.teacher import frozen
from cac_fast.train.profiling import phase

FEATURE_MATCHING = 0.1
"""Weight of the distance between the discriminator's features."""
WIDTHS = 64, 128, 256, 512
DROPOUT = 0.5
SMALLEST_CROP = 2 ** len(WIDTHS)


class Discriminator(nn.Module):
    """D: says of class maps (B, K, H, W) on images (B, 3, H, W) in [0, 1] whether they are masks.

    Takes both as one (B, 3 + K, H, W), of at least 16 x 16; returns features (B, 512) and logits
    (B,), in fp32 at least.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in pairwise((3 + num_classes, *WIDTHS)):
            halving = nn.Conv2d(inner, outer, 4, stride=2, padding=1)
            layers += [halving, nn.LeakyReLU(0.2), nn.Dropout2d(DROPOUT)]
        self.maps = nn.Sequential(*layers[:-1])
        self.judge = nn.Linear(WIDTHS[-1], 1)

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.maps(planes)
        features = maps.to(torch.promote_types(maps.dtype, torch.float32)).mean((2, 3))
        return features, self.judge(features).squeeze(1).to(features.dtype)


class S4GAN(Method):
    """`L = L_ce + 0.1 * L_fm + w * L_u` for the segmenter, and `L_d` for D beside it.

    L_fm is the mean absolute difference between D's mean features of the labeled images with their
    masks and those of the unlabeled ones with their predictions. L_u is the cross entropy of the
    unlabeled images that D takes for labeled ones, by their own predictions, from the second step
    with unlabeled images on. L_d is the mean of D's cross entropies on both. The pixels off the
    images are 0 for D. In the warm-up `L = L_ce` and D does not learn.
    """

    views: Mapping[str, View] = {"weak": View()}

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        check_separate(config)
        if config.data.crop_size < SMALLEST_CROP:
            raise InputError(
                f"--crop-size {config.data.crop_size}: s4gan's discriminator needs at least "
                f"{SMALLEST_CROP}"
            )
        self.unsupervised_weight = config.loss.unsupervised_weight
        self.confidence, self.warmup = config.loss.confidence, config.num_warmup
        self.rate = config.loss.discriminator_learning_rate
        self.num_classes = self.network.classifier[-1].out_channels
        self.discriminator = Discriminator(self.num_classes)

    def more_optimizers(self) -> list[Optimizer]:
        return [judge_optimizer(self.discriminator, self.rate)]

    def set_unlabeled(self, used: bool) -> None:
        self.discriminator.requires_grad_(used)

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        loss_ce = self.supervised_loss(labeled, last=unlabeled is None)
        if unlabeled is None:
            return {"loss": loss_ce, "loss_ce": loss_ce.detach()}
        images, shown = unlabeled["image_weak"], unlabeled["on_image1"]
        with phase("forward unlabeled"):
            logits = torch.cat(self.sliced(self.logits, images, keep_last=True))
        with phase("discriminator"):
            truth = self.one_hot(labeled["label"])
            in_labeled = on_image(labeled["flip"], labeled["valid"], images.shape[-1])
            masks = self.planes(labeled["image"], truth, in_labeled)
            predicted = self.planes(images, logits.softmax(1), shown)
            features, judged = frozen(self.discriminator)(predicted)
            _, of_predicted = self.discriminator(predicted.detach())
            features_of_masks, of_masks = self.discriminator(masks)
            loss_fm = self.feature_matching(features, features_of_masks.detach())
            loss_d = (truth_is(0, of_predicted) + truth_is(1, of_masks)) / 2
        chosen = judged.detach().sigmoid() > self.confidence
        loss_u = self.self_training(logits, shown, chosen)
        loss = loss_ce + FEATURE_MATCHING * loss_fm + self.unsupervised_weight * loss_u
        return {
            "loss": loss + loss_d,
            "loss_ce": loss_ce.detach(),
            "loss_u": loss_u.detach(),
            "loss_fm": loss_fm.detach(),
            "loss_d": loss_d.detach(),
            "d_labeled": of_masks.detach().sigmoid().mean(),
            "d_unlabeled": of_predicted.detach().sigmoid().mean(),
            "confident": chosen.float().mean(),
        }

    def planes(self, images: Tensor, classes: Tensor, shown: Tensor) -> Tensor:
        """What D sees of normalized images (B, 3, H, W) and class maps (B, K, H, W)."""
        expected = self.network.preprocessing
        colors = zip(images.unbind(1), expected.mean, expected.std, strict=True)
        plain = torch.stack([plane * std + mean for plane, mean, std in colors], 1)
        return torch.cat((plain, classes.to(plain)), 1).where(shown.unsqueeze(1), 0)

    def one_hot(self, labels: Tensor) -> Tensor:
        """Bool (B, K, H, W) of uint8 (B, H, W), False in all classes where it is 255."""
        ids = torch.arange(self.num_classes, device=labels.device)
        return labels.unsqueeze(1) == ids[:, None, None]

    def feature_matching(self, features: Tensor, of_masks: Tensor) -> Tensor:
        """Mean absolute difference of mean features (B, 512) over the batches of all ranks."""
        mine = features.mean(0) - of_masks.mean(0)
        # The value is that of all ranks, the gradient this rank's part of it.
        whole = self.world.all_reduce(mine.detach().clone()) / self.world.size
        return (mine + (whole - mine.detach())).abs().mean()

    def self_training(self, logits: Tensor, shown: Tensor, chosen: Tensor) -> Tensor:
        """Cross entropy by their own predictions of the images that are True in bool (B,)."""
        learned = shown & chosen[:, None, None]
        if self.iteration <= self.warmup:  # D has not learned anything yet
            learned = torch.zeros_like(learned)
        labels = logits.argmax(1).to(torch.uint8).masked_fill(~learned, 255)
        return self.mean_over(learned, [cross_entropy_sum(logits, labels)])


def truth_is(value: float, logits: Tensor) -> Tensor:
    """Mean binary cross entropy of logits (B,)."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, value))
