"""Guided collaborative training (GCT): two networks, and a detector of the flaws of each."""

from __future__ import annotations

import torch
from torch import Tensor

from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.methods.base import Batch, Networks, cross_entropy_sum, second_network
from cac_fast.train.methods.flaws import DETECTOR, FLAWED, found_flaws, true_flaws
from cac_fast.train.methods.judged import Judge, JudgedMethod
from cac_fast.train.methods.teacher import frozen
from cac_fast.train.networks import Segmenter
from cac_fast.train.profiling import phase

DETECTOR_WEIGHT = 10.0


class GCT(JudgedMethod):
    """`L = L_ce + w * L_dc + L_fc` of each network, and `L_flaws` of the flaw detector.

    L_dc (dynamic consistency) is the mean square distance, over classes too, from the prediction of
    the network with the smaller flaw. L_fc (flaw correction) is the mean square of the detector's
    answer where both are flawed. L_flaws is 10 times the mean square distance of the answer from
    the true flaws of labeled images. Pixels without a label, of labeled images, and padding are in
    none of these means. In the warm-up `L = L_ce` of each network.
    """

    layers = DETECTOR

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        self.second = second_network(networks)
        self.judge = Judge(self.num_classes, self.layers, config.data.crop_size)

    def segmenters(self) -> list[Segmenter]:
        return [self.network, self.second]

    def judged(self, labeled: Batch, unlabeled: Batch) -> Batch:
        labels = labeled["label"]
        images = torch.cat((labeled["image"], unlabeled["image_weak"]))
        valid = torch.cat((labels != 255, unlabeled["on_image1"]))
        logits = [self.both_logits(labeled, unlabeled, network) for network in self.segmenters()]
        with phase("loss"):
            sums = [cross_entropy_sum(each[: len(labels)], labels) for each in logits]
            loss_ce = self.normalized(sums, labels)
            predicted = [each.softmax(1) for each in logits]
            answers = [frozen(self.judge)(images, p, valid).squeeze(1) for p in predicted]
            flaws = [found_flaws(answer, valid) for answer in answers]
            consistency = self.mean_over(valid, distances(predicted, flaws))
            bad = (flaws[0] > FLAWED) & (flaws[1] > FLAWED)
            correction = self.mean_over(valid, [(answer**2 * bad).sum() for answer in answers])
            loss_flaws = self.detection(predicted, labeled)
        return {
            "loss": loss_ce + self.weight * consistency + correction + loss_flaws,
            "loss_ce": loss_ce.detach(),
            "loss_consistency": consistency.detach(),
            "loss_correction": correction.detach(),
            "loss_flaws": loss_flaws.detach(),
            "flawed": self.mean_over(valid, [bad.sum()]),
        }

    def detection(self, predicted: list[Tensor], labeled: Batch) -> Tensor:
        """L_flaws, the mean of both networks, whose probabilities begin with the labeled images."""
        images, labels = labeled["image"], labeled["label"]
        known, sums = labels != 255, []
        for each in predicted:
            fixed = each[: len(labels)].detach()
            answer = self.judge(images, fixed, known).squeeze(1)
            sums.append(((answer - true_flaws(fixed, labels)) ** 2 * known).sum())
        return DETECTOR_WEIGHT * self.mean_over(known, sums) / len(predicted)


def distances(predicted: list[Tensor], flaws: list[Tensor]) -> list[Tensor]:
    """Of two predictions (B, K, H, W): of each the summed square distance from the less flawed one.

    Of a pixel it is the mean over classes. Where both have the same flaw (on padding both have
    none), or flaws that are too large, each stays as it is.
    """
    ranks = [each.masked_fill(each > FLAWED, 1) for each in flaws]
    sums = []
    for mine, other in ((0, 1), (1, 0)):
        follows = (ranks[other] < ranks[mine]).unsqueeze(1)
        target = predicted[other].detach().where(follows, predicted[mine].detach())
        sums.append(((predicted[mine] - target) ** 2).mean(1).sum())
    return sums
