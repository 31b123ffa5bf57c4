"""Context-aware consistency (CAC): the features of one pixel agree under two different contexts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cac_fast.train.config import Config
from cac_fast.train.data.views import PAIR
from cac_fast.train.distributed import World
from cac_fast.train.methods.base import Batch, Networks, cross_entropy_sum
from cac_fast.train.methods.contrastive import ContrastiveMethod, Finish, Projected, join
from cac_fast.train.methods.teacher import Teacher
from cac_fast.train.networks import upsample_logits
from cac_fast.train.profiling import phase


class CAC(ContrastiveMethod):
    """`L = L_ce + lambda * L_dc` (Eq. 9), L_dc between two overlapping crops."""

    views = PAIR

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        self.teacher: Teacher | None = None
        if config.loss.averaged_labels:
            self.teacher = Teacher(self.network, config.loss.ema_decay)

    def after_step(self) -> None:
        if self.teacher is not None:
            self.teacher.update(self.network, self.iteration)

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        if unlabeled is None:
            loss = self.supervised_loss(labeled)
            return {"loss": loss, "loss_ce": loss.detach()}
        networks = self.joint_forward if self.joint else self.separate_forward
        loss_ce, finish = networks(labeled, unlabeled)
        with phase("loss"):
            dc = finish()
        loss = loss_ce + self.weight * dc.loss
        return {"loss": loss, "loss_ce": loss_ce.detach(), **self.dc_scalars(dc)}

    def separate_forward(self, labeled: Batch, unlabeled: Batch) -> tuple[Tensor, Finish]:
        """Cross entropy and `contrast` of three passes, each with its own batch statistics.

        The labeled images come last: meanwhile the negatives travel between the ranks.
        """
        views = []
        with phase("forward unlabeled"):
            for name in ("image_1", "image_2"):
                views.append(join(self.sliced(self.unlabeled_view, unlabeled[name])))
        with phase("loss"):
            finish = self.contrast(*self.relabeled(views, unlabeled), unlabeled)
        return self.supervised_loss(labeled), finish

    def joint_forward(self, labeled: Batch, unlabeled: Batch) -> tuple[Tensor, Finish]:
        """The same of one pass over all images, with batch statistics of all of them."""
        images = labeled["image"], labeled["label"], unlabeled["image_1"], unlabeled["image_2"]
        with phase("forward"):
            sums, *views = zip(*self.sliced(self.joint_slice, *images, keep_last=True), strict=True)
        with phase("loss"):
            finish = self.contrast(*self.relabeled(map(join, views), unlabeled), unlabeled)
            return self.normalized(list(sums), labeled["label"]), finish

    def joint_slice(
        self, images: Tensor, labels: Tensor, images1: Tensor, images2: Tensor
    ) -> tuple[Tensor, Projected, Projected]:
        """Summed cross entropy and both views of a slice, each part with as many images."""
        parts = self.features(torch.cat((images, images1, images2))).chunk(3)
        logits = upsample_logits(self.network.classify(parts[0]), labels.shape[-2:])
        loss = cross_entropy_sum(logits, labels)
        return loss, self.view(parts[1]), self.view(parts[2])

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

    def unlabeled_view(self, images: Tensor) -> Projected:
        """`view` of images (B, 3, H, W)."""
        return self.view(self.features(images))
