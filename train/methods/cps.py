"""Cross pseudo supervision (CPS): each of two networks learns the labels that the other one gives.

Both have one architecture and start from other random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cac_fast.train.config import Config
from cac_fast.train.data.stream import on_image
from cac_fast.train.distributed import World
from cac_fast.train.methods.base import (
    Batch,
    Method,
    Networks,
    View,
    check_separate,
    cross_entropy_sum,
    second_network,
)
from cac_fast.train.methods.mixing import cutmix, inside, warn_of_unmixed
from cac_fast.train.networks import Segmenter
from cac_fast.train.profiling import phase

Pair = tuple[Tensor, Tensor]
"""Of the first network and of the second one."""


class Losses(NamedTuple):
    """Cross entropies by the truth and by the other network's labels; the share of the valid pixels
    of the unlabeled images whose labels are alike."""

    ce: Pair
    cross: Pair
    agreement: Tensor


class CPS(Method):
    """`L = L_ce1 + L_ce2 + w * (L_1 + L_2)`, L_i network i's cross entropy by the other's labels.

    Every pixel on an image has a label, none has a gradient. L_i is the mean over those of the
    labeled and the unlabeled images, whether or not the class of a labeled one is known. With
    CutMix L_i is of mixed unlabeled images alone; labels are those of the unmixed ones, mixed
    alike. In the warm-up `L = L_ce1 + L_ce2`. The first network is scored.
    """

    views: Mapping[str, View] = {"plain": View()}

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        check_separate(config)
        self.second = second_network(networks)
        self.unsupervised_weight = config.loss.unsupervised_weight
        self.cutmix = config.loss.cutmix
        if self.cutmix:
            warn_of_unmixed(config, world)
            self.views = {"plain": View(boxes=3)}

    def segmenters(self) -> list[Segmenter]:
        return [self.network, self.second]

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        if unlabeled is None:
            loss = sum(self.supervised_losses(labeled, last=True))
            return {"loss": loss, "loss_ce": loss.detach()}
        found = (self.mixed_losses if self.cutmix else self.plain_losses)(labeled, unlabeled)
        loss_ce, loss_u = sum(found.ce), sum(found.cross)
        scalars = {"loss_ce": loss_ce.detach(), "loss_u": loss_u.detach()}
        loss = loss_ce + self.unsupervised_weight * loss_u
        return {"loss": loss, **scalars, "agreement": found.agreement}

    def supervised_losses(self, labeled: Batch, last: bool) -> Pair:
        """Both networks' cross entropies; last: they are the step's last passes."""
        first = self.supervised_loss(labeled, last=False)
        return first, self.supervised_loss(labeled, self.second, last)

    def plain_losses(self, labeled: Batch, unlabeled: Batch) -> Losses:
        """Of labeled and unlabeled images as they are."""

        def of_labeled(images: Tensor, labels: Tensor, shown: Tensor) -> tuple[Tensor, ...]:
            logits = self.both_logits(images)
            of_truth = [cross_entropy_sum(each, labels) for each in logits]
            return *of_truth, *crossed(logits, shown)[:2]

        def of_unlabeled(images: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
            return crossed(self.both_logits(images), valid)

        images, labels, valid = labeled["image"], labeled["label"], unlabeled["on_image1"]
        shown = on_image(labeled["flip"], labeled["valid"], images.shape[-1])
        with phase("forward labeled"):
            slices = self.sliced(of_labeled, images, labels, shown)
            ce1, ce2, *cross = zip(*slices, strict=True)
        with phase("forward unlabeled"):
            slices = self.sliced(of_unlabeled, unlabeled["image_plain"], valid, keep_last=True)
            *more, alike = zip(*slices, strict=True)
        everywhere = torch.cat((shown, valid))
        cross1, cross2 = (
            self.mean_over(everywhere, [*of_labeled, *of_unlabeled])
            for of_labeled, of_unlabeled in zip(cross, more, strict=True)
        )
        of_truth = self.normalized(list(ce1), labels), self.normalized(list(ce2), labels)
        return Losses(of_truth, (cross1, cross2), self.share(torch.stack(alike).sum(), valid))

    def mixed_losses(self, labeled: Batch, unlabeled: Batch) -> Losses:
        """Of labeled images by the truth, of mixed unlabeled ones by the other's labels."""
        of_truth = self.supervised_losses(labeled, last=False)
        images, valid = unlabeled["image_plain"], unlabeled["on_image1"]
        with phase("forward unmixed"):
            slices = self.sliced(self.labels, images, valid)
            labels = [torch.cat(of_network) for of_network in zip(*slices, strict=True)]
        agreement = self.share(((labels[0] == labels[1]) & valid).sum(), valid)
        boxes = inside(unlabeled["boxes_plain"], images.shape[-2:])
        mixed = cutmix(images, boxes.unsqueeze(1))
        by_first, by_second = ({"image": mixed, "label": cutmix(x, boxes)} for x in labels)
        first = self.supervised_loss(by_second, last=False)
        return Losses(of_truth, (first, self.supervised_loss(by_first, self.second)), agreement)

    @torch.no_grad()
    def labels(self, images: Tensor, valid: Tensor) -> Pair:
        """Both networks' labels uint8 (B, H, W) of images (B, 3, H, W), 255 where not valid."""
        one, two = (told(logits, valid).to(torch.uint8) for logits in self.both_logits(images))
        return one, two

    def both_logits(self, images: Tensor) -> Pair:
        return self.logits(images), self.logits(images, self.second)

    def share(self, count: Tensor, valid: Tensor) -> Tensor:
        """A count of this rank's pixels, as that of all ranks by their valid ones."""
        count, pixels = self.world.all_reduce(torch.stack((count, valid.sum())))
        return count / pixels.clamp(min=1)


def crossed(logits: Pair, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both networks' summed cross entropies by the other's labels over the pixels of the bool
    `valid` (B, H, W), and the number of those where they agree."""
    one, two = logits
    by_one, by_two = told(one, valid), told(two, valid)
    alike = ((by_one == by_two) & valid).sum()
    return cross_entropy_sum(one, by_two), cross_entropy_sum(two, by_one), alike


def told(logits: Tensor, valid: Tensor) -> Tensor:
    """The labels of logits (B, K, H, W), int64 (B, H, W), 255 where not valid."""
    return logits.detach().argmax(1).masked_fill(~valid, 255)
