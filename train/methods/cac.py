"""Context-aware consistency (CAC): the features of one pixel agree under two different contexts."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from cac_fast.train.config import Config
from cac_fast.train.data.views import PAIR
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods.base import Batch, Networks, cross_entropy_sum, label_scalars
from cac_fast.train.methods.contrastive import ContrastiveMethod, Finish, Projected, join
from cac_fast.train.methods.teacher import Teacher
from cac_fast.train.methods.weak_labels import WeakClassifier
from cac_fast.train.networks import upsample_logits
from cac_fast.train.networks.recompute import without_dropout
from cac_fast.train.profiling import phase

Seen = tuple[Tensor, ...]
"""`Projected`, and with pseudo labels C_w's summed cross entropy."""


class CAC(ContrastiveMethod):
    """`L = L_ce + lambda * L_dc` (Eq. 9), L_dc between two overlapping crops.

    With pseudo labels `L = L_ce + lambda * L_dc + lambda_w * L_w` (Eq. 10), where C_w, an extra
    classifier that training alone knows, learns them from both crops.
    """

    views = PAIR
    label_sources = ("pseudo_labels",)

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        self.drops = config.loss.unlabeled_dropout
        if not self.drops and self.joint:
            raise InputError(
                "--no-unlabeled-dropout needs passes of their own: use --forward separate"
            )
        self.teacher: Teacher | None = None
        if config.loss.averaged_labels:
            self.teacher = Teacher(self.network, config.loss.ema_decay, world)
        self.weak: WeakClassifier | None = None
        if config.data.pseudo_labels is not None:
            self.weak = WeakClassifier(self.network, config.optim.iterations)

    def after_step(self) -> None:
        if self.teacher is not None:
            self.teacher.update(self.network, self.iteration)

    def set_unlabeled(self, used: bool) -> None:
        super().set_unlabeled(used)
        if self.weak is not None:
            self.weak.requires_grad_(used)

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        if unlabeled is None:
            loss = self.supervised_loss(labeled)
            return {"loss": loss, "loss_ce": loss.detach()}
        networks = self.joint_forward if self.joint else self.separate_forward
        loss_ce, finish, weak_sums = networks(labeled, unlabeled)
        with phase("loss"):
            dc = finish()
        loss = loss_ce + self.weight * dc.loss
        scalars = {"loss_ce": loss_ce.detach(), **self.dc_scalars(dc)}
        if self.weak is not None:
            loss_weak = self.weak_loss(weak_sums, unlabeled)
            weight = torch.full_like(loss_weak, self.weak.weight(self.iteration))
            loss = loss + weight * loss_weak
            scalars |= {"loss_weak": loss_weak.detach(), "weak_weight": weight}
            scalars |= label_scalars("weak", self.labels(unlabeled), unlabeled, self.world)
        return {"loss": loss, **scalars}

    def separate_forward(
        self, labeled: Batch, unlabeled: Batch
    ) -> tuple[Tensor, Finish, list[list[Tensor]]]:
        """Cross entropy, `contrast` and C_w's sums of three passes, each with its own batch
        statistics.

        The labeled images come last: meanwhile the negatives travel between the ranks.
        """
        labels, seen = self.labels(unlabeled), []
        quiet = nullcontext() if self.drops else without_dropout(self.network)
        with phase("forward unlabeled"), quiet:
            for place, name in enumerate(self.views):
                images = unlabeled[f"image_{name}"]
                told = labels[place : place + 1]
                seen.append(self.sliced(self.unlabeled_view, images, *told))
        views, weak_sums = joined(seen)
        with phase("loss"):
            finish = self.contrast(*self.relabeled(views, unlabeled), unlabeled)
        return self.supervised_loss(labeled), finish, weak_sums

    def joint_forward(
        self, labeled: Batch, unlabeled: Batch
    ) -> tuple[Tensor, Finish, list[list[Tensor]]]:
        """The same of one pass over all images, with batch statistics of all of them."""
        images = labeled["image"], labeled["label"], unlabeled["image_1"], unlabeled["image_2"]
        with phase("forward"):
            slices = self.sliced(self.joint_slice, *images, *self.labels(unlabeled), keep_last=True)
            sums, *seen = zip(*slices, strict=True)
        views, weak_sums = joined(seen)
        with phase("loss"):
            finish = self.contrast(*self.relabeled(views, unlabeled), unlabeled)
            return self.normalized(list(sums), labeled["label"]), finish, weak_sums

    def joint_slice(
        self, images: Tensor, labels: Tensor, images1: Tensor, images2: Tensor, *told: Tensor
    ) -> tuple[Tensor, Seen, Seen]:
        """Summed cross entropy and both views of a slice, each part with as many images."""
        parts = self.features(torch.cat((images, images1, images2))).chunk(3)
        logits = upsample_logits(self.network.classify(parts[0]), labels.shape[-2:])
        loss = cross_entropy_sum(logits, labels)
        return loss, self.seen(parts[1], *told[:1]), self.seen(parts[2], *told[1:])

    def labels(self, unlabeled: Batch) -> list[Tensor]:
        """Of both crops the pseudo labels, uint8 (B, c, c), for C_w; nothing without it."""
        return [] if self.weak is None else [unlabeled["label1"], unlabeled["label2"]]

    def weak_loss(self, sums: list[list[Tensor]], unlabeled: Batch) -> Tensor:
        """`L_w`: the mean over both crops of C_w's cross entropy over the pixels with a label."""
        pairs = zip(sums, self.labels(unlabeled), strict=True)
        return torch.stack([self.normalized(*pair) for pair in pairs]).mean()

    def relabeled(self, views: Iterable[Projected], unlabeled: Batch) -> Iterable[Projected]:
        """The views, with the averaged copy's logits where there is one."""
        if self.teacher is None:
            return views
        images = (unlabeled[f"image_{name}"] for name in self.views)
        with phase("teacher"):
            logits = [torch.cat(self.sliced(self.averaged_logits, of_view)) for of_view in images]
        return [(features, each) for (features, _), each in zip(views, logits, strict=True)]

    @torch.no_grad()
    def averaged_logits(self, images: Tensor) -> Tensor:
        """The averaged copy's logits (B, K, h, w), at 1/8, of images (B, 3, H, W)."""
        copy = self.teacher.copy
        return copy.classify(self.at_stride_8(copy.features(images)))

    def unlabeled_view(self, images: Tensor, *told: Tensor) -> Seen:
        """`seen` of images (B, 3, H, W)."""
        return self.seen(self.features(images), *told)

    def seen(self, features: Tensor, *told: Tensor) -> Seen:
        """`view` of E's features, and by pseudo labels `told`, if given, C_w's summed cross
        entropy."""
        sums = (self.weak(self.at_stride_8(features), labels) for labels in told)
        return *self.view(features), *sums


def joined(seen: Iterable[Iterable[Seen]]) -> tuple[list[Projected], list[list[Tensor]]]:
    """Of the slices of each view: the views, and the sums of those that have some."""
    of_views = [list(slices) for slices in seen]
    views = [join(one[:2] for one in slices) for slices in of_views]
    return views, [[sums for one in slices for sums in one[2:]] for slices in of_views]
