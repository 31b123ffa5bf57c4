"""Error-correcting supervision (ECS), as we read its paper: a network that corrects predictions.

There is neither code of its authors nor a published setting. What the correction network looks
like, how it is trained, its weight in the segmenter's loss and the ramp are choices of this
project.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.methods.base import Batch, Networks, cross_entropy_sum
from cac_fast.train.methods.judged import Judge, JudgedMethod
from cac_fast.train.methods.teacher import frozen
from cac_fast.train.profiling import phase

CORRECTOR = ((64, 2), (128, 2), (256, 2), (256, 1))
"""Channels and strides of the correction network's convolutions but for the last, at 1/8."""

APPROVAL_WEIGHT = 0.01
"""As small as an adversarial loss is beside cross entropy in other work: a network can please the
corrector without being right, so the labels must lead."""


class ECS(JudgedMethod):
    """`L = L_ce + 0.01 * L_approval + w * L_u` of the network, and `L_c` of the correction network.

    The correction network C sees an image and the K probabilities of each of its pixels. It has
    K + 1 classes: the right one where the prediction is wrong, and "correct", the last one. L_c is
    its cross entropy on labeled images. L_approval is the cross entropy of C, as it is, by
    "correct" everywhere. L_u is the cross entropy on unlabeled images by the prediction itself
    where C says "correct", else by the class that C says, each pixel times C's certainty. In the
    warm-up `L = L_ce`.
    """

    layers = CORRECTOR

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        self.correct = self.num_classes
        layers = *self.layers, (self.num_classes + 1, 1)
        self.judge = Judge(self.num_classes, layers, config.data.crop_size)

    def judged(self, labeled: Batch, unlabeled: Batch) -> Batch:
        labels, valid = labeled["label"], unlabeled["on_image1"]
        logits, of_unlabeled = self.both_logits(labeled, unlabeled, self.network).chunk(2)
        with phase("loss"):
            loss_ce = self.normalized([cross_entropy_sum(logits, labels)], labels)
            corrector, approval = self.by_labels(labeled, logits)
            pseudo, certainty = self.corrected(unlabeled, of_unlabeled.detach())
            loss_u = self.mean_over(valid, [weighted_sum(of_unlabeled, pseudo, certainty)])
            kept = valid & (pseudo == of_unlabeled.argmax(1))
        return {
            "loss": loss_ce + APPROVAL_WEIGHT * approval + self.weight * loss_u + corrector,
            "loss_ce": loss_ce.detach(),
            "loss_approval": approval.detach(),
            "loss_u": loss_u.detach(),
            "loss_corrector": corrector.detach(),
            "kept": self.mean_over(valid, [kept.sum()]),
            "certainty": self.mean_over(valid, [certainty.sum()]),
        }

    def by_labels(self, labeled: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """L_c and L_approval, by the network's logits (B, K, c, c) of the labeled images."""
        images, labels = labeled["image"], labeled["label"]
        known, predicted = labels != 255, logits.softmax(1)
        correct = torch.full_like(labels, self.correct, dtype=torch.long)
        truth = labels.where(known & (labels != logits.argmax(1)), correct)
        pairs = (
            (self.judge(images, predicted.detach(), known), truth),
            (frozen(self.judge)(images, predicted, known), correct),
        )
        corrector, approval = (
            self.mean_over(known, [weighted_sum(answer, classes, known)])
            for answer, classes in pairs
        )
        return corrector, approval

    @torch.no_grad()
    def corrected(self, unlabeled: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo labels int64 (B, c, c) by the network's logits (B, K, c, c) and C.

        And C's certainty of each, 0 on padding.
        """
        images, valid = unlabeled["image_weak"], unlabeled["on_image1"]
        certainty, said = self.judge(images, logits.softmax(1), valid).softmax(1).max(1)
        return said.where(said != self.correct, logits.argmax(1)), certainty * valid


def weighted_sum(logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of logits (B, K, H, W) by classes int64 (B, H, W), summed with weights."""
    return (F.cross_entropy(logits, classes, reduction="none") * weights).sum()
