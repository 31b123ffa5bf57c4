"""Context-aware consistency (CAC): the features of one pixel agree under two different contexts."""

from __future__ import annotations

import torch
from torch import Tensor

from cac_fast.train.data.views import PAIR
from cac_fast.train.methods.base import Batch, cross_entropy_sum
from cac_fast.train.methods.contrastive import ContrastiveMethod, Finish, Projected, join
from cac_fast.train.networks import upsample_logits
from cac_fast.train.profiling import phase


class CAC(ContrastiveMethod):
    """`L = L_ce + lambda * L_dc` (Eq. 9), L_dc between two overlapping crops."""

    views = PAIR

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
            finish = self.contrast(*views, unlabeled)
        return self.supervised_loss(labeled), finish

    def joint_forward(self, labeled: Batch, unlabeled: Batch) -> tuple[Tensor, Finish]:
        """The same of one pass over all images, with batch statistics of all of them."""
        images = labeled["image"], labeled["label"], unlabeled["image_1"], unlabeled["image_2"]
        with phase("forward"):
            sums, *views = zip(*self.sliced(self.joint_slice, *images, keep_last=True), strict=True)
        with phase("loss"):
            finish = self.contrast(*map(join, views), unlabeled)
            return self.normalized(list(sums), labeled["label"]), finish

    def joint_slice(
        self, images: Tensor, labels: Tensor, images1: Tensor, images2: Tensor
    ) -> tuple[Tensor, Projected, Projected]:
        """Summed cross entropy and both views of a slice, each part with as many images."""
        parts = self.features(torch.cat((images, images1, images2))).chunk(3)
        logits = upsample_logits(self.network.classify(parts[0]), labels.shape[-2:])
        loss = cross_entropy_sum(logits, labels)
        return loss, self.view(parts[1]), self.view(parts[2])

    def unlabeled_view(self, images: Tensor) -> Projected:
        """`view` of images (B, 3, H, W)."""
        return self.view(self.features(images))
