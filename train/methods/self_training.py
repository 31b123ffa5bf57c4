"""Self-training: the masks that a trained network made of the unlabeled images are learned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cac_fast.train.config import Config
from cac_fast.train.data.views import View
from cac_fast.train.distributed import World
from cac_fast.train.methods.base import (
    Batch,
    Method,
    Networks,
    cross_entropy_sum,
    label_scalars,
)
from cac_fast.train.profiling import phase

DECAY = 0.99


class SelfTraining(Method):
    """`L = (L_ce + alpha * r * L_p) / (1 + alpha)`, L_p by pseudo labels in strong colors.

    r is 1, or with `--normalize-pseudo-loss` the moving average of L_ce over that of L_p (Zoph et
    al.), whose averages begin at the end of the warm-up. A batch without a pseudo label has L_p = 0
    and moves no average of it. In the warm-up `L = L_ce`.
    """

    views: Mapping[str, View] = {"strong": View(color="strong")}
    label_sources = ("pseudo_labels", "teacher")
    needs_labels = True
    averages: Tensor | None

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        self.pseudo_weight = config.loss.pseudo_loss_weight
        self.joint = config.loss.forward == "joint"
        averages = torch.zeros(2) if config.loss.normalize_pseudo_loss else None
        self.register_buffer("averages", averages)  # of L_ce and L_p; 0 is none yet

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        if unlabeled is None:
            loss = self.supervised_loss(labeled)
            return {"loss": loss, "loss_ce": loss.detach()}
        pseudo = {"image": unlabeled["image_strong"], "label": unlabeled["label1"]}
        if self.joint:
            loss_ce, loss_pseudo = self.joint_losses(labeled, pseudo)
        else:
            loss_ce = self.supervised_loss(labeled, last=False)
            loss_pseudo = self.supervised_loss(pseudo)
        scalars = {"loss_ce": loss_ce.detach(), "loss_pseudo": loss_pseudo.detach()}
        scalars |= label_scalars("pseudo", [pseudo["label"]], unlabeled, self.world)
        weight: Tensor | float = self.pseudo_weight
        if self.averages is not None:
            scalars["pseudo_ratio"] = self.ratio(loss_ce, loss_pseudo)
            weight = weight * scalars["pseudo_ratio"]
        loss = (loss_ce + weight * loss_pseudo) / (1 + self.pseudo_weight)
        return {"loss": loss, **scalars}

    def joint_losses(self, labeled: Batch, pseudo: Batch) -> tuple[Tensor, Tensor]:
        """Both cross entropies of one pass over all images, with batch statistics of all."""

        def of_slice(*tensors: Tensor) -> list[Tensor]:
            images, labels = tensors[:2], tensors[2:]
            return list(map(cross_entropy_sum, self.logits(torch.cat(images)).chunk(2), labels))

        batch = labeled["image"], pseudo["image"], labeled["label"], pseudo["label"]
        with phase("forward"):
            sums, pseudo_sums = zip(*self.sliced(of_slice, *batch, keep_last=True), strict=True)
            of_pseudo = self.normalized(list(pseudo_sums), pseudo["label"])
            return self.normalized(list(sums), labeled["label"]), of_pseudo

    @torch.no_grad()
    def ratio(self, loss_ce: Tensor, loss_pseudo: Tensor) -> Tensor:
        """r, after the averages have taken in the losses of this step on all ranks."""
        losses = torch.stack((loss_ce, loss_pseudo)).to(self.averages)
        losses = self.world.all_reduce(losses) / self.world.size
        moved = self.averages.lerp(losses, 1 - DECAY).where(self.averages > 0, losses)
        self.averages.copy_(moved.where(losses > 0, self.averages))
        of_ce, of_pseudo = self.averages
        return (of_ce / of_pseudo).where(of_pseudo > 0, 1)
