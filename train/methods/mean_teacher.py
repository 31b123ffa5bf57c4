"""Mean Teacher: the student's probabilities on unlabeled images meet those of its average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods.base import Batch, Method, Networks, View, cross_entropy_sum
from cac_fast.train.methods.ramp import sigmoid_ramp
from cac_fast.train.methods.teacher import Teacher
from cac_fast.train.networks import Segmenter
from cac_fast.train.profiling import phase


class MeanTeacher(Method):
    """`L = L_ce + w * r * L_u`, L_u the mean over valid pixels of `||p_student - p_teacher||^2`.

    p are the class probabilities, the squares are summed over the classes. r rises from exp(-5) to
    1 in the first sixteenth of the iterations after the warm-up. The teacher is in eval mode. Both
    see the same image, or with a strong view the student sees that. In the warm-up `L = L_ce`.
    """

    views: Mapping[str, View] = {"weak": View()}

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        loss = config.loss
        if loss.strong_views > 1:
            raise InputError(
                f"--strong-views {loss.strong_views}: the student of mean_teacher sees one view, "
                "use 0 (weak) or 1 (strong)"
            )
        self.seen = "strong" if loss.strong_views else "weak"
        if loss.strong_views:
            self.views = {"weak": View(), "strong": View(color="strong")}
        self.unsupervised_weight = loss.unsupervised_weight
        self.joint = loss.forward == "joint"
        self.warmup, self.ramp_length = config.num_warmup, config.optim.iterations / 16
        self.teacher = Teacher(self.network, loss.ema_decay, world)

    def after_step(self) -> None:
        self.teacher.update(self.network, self.iteration)

    @property
    def evaluated(self) -> Segmenter:
        return self.teacher.copy

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        if unlabeled is None:
            loss = self.supervised_loss(labeled)
            return {"loss": loss, "loss_ce": loss.detach()}
        images, valid = unlabeled[f"image_{self.seen}"], unlabeled["on_image1"]
        with phase("teacher"):
            targets = torch.cat(self.sliced(self.probabilities, unlabeled["image_weak"]))
        losses = self.joint_losses if self.joint else self.separate_losses
        loss_ce, loss_u = losses(labeled, images, targets, valid)
        ramp = torch.full_like(loss_u, sigmoid_ramp(self.iteration - self.warmup, self.ramp_length))
        loss = loss_ce + self.unsupervised_weight * ramp * loss_u
        scalars = {"loss_ce": loss_ce.detach(), "loss_u": loss_u.detach(), "ramp": ramp}
        return {"loss": loss, **scalars}

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """The teacher's, (B, K, H, W), of images (B, 3, H, W)."""
        return self.teacher(images).softmax(1)

    def separate_losses(
        self, labeled: Batch, images: Tensor, targets: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_ce and L_u of two passes, each with its own batch statistics."""

        def of_slice(images: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
            return distance_sum(self.logits(images), targets, valid)

        loss_ce = self.supervised_loss(labeled, last=False)
        with phase("forward unlabeled"):
            sums = self.sliced(of_slice, images, targets, valid, keep_last=True)
            return loss_ce, self.mean_over(valid, sums)

    def joint_losses(
        self, labeled: Batch, images: Tensor, targets: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of one pass over all images, with batch statistics of all of them."""

        def of_slice(
            first: Tensor, labels: Tensor, second: Tensor, targets: Tensor, valid: Tensor
        ) -> tuple[Tensor, Tensor]:
            of_labeled, of_unlabeled = self.logits(torch.cat((first, second))).chunk(2)
            return cross_entropy_sum(of_labeled, labels), distance_sum(of_unlabeled, targets, valid)

        batch = labeled["image"], labeled["label"], images, targets, valid
        with phase("forward"):
            sums, distances = zip(*self.sliced(of_slice, *batch, keep_last=True), strict=True)
            loss_ce = self.normalized(list(sums), labeled["label"])
            return loss_ce, self.mean_over(valid, list(distances))


def distance_sum(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Summed squared distance of softmaxed logits from targets (B, K, H, W), where the bool
    `valid` (B, H, W) is True."""
    return ((logits.softmax(1) - targets).square().sum(1) * valid).sum()
