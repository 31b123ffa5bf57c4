"""Context-aware consistency (CAC): the features of one pixel agree under two different contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast import DirectionalContrastiveLoss, FeatureBank, overlap_from_crops
from cac_fast.loss import DCLossOutput
from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.methods.supervised import Batch, Supervised
from cac_fast.train.networks import Segmenter
from cac_fast.train.profiling import phase

PROJECTOR_CHANNELS = 128  # paper, Sec. 4.1

View = tuple[Tensor, Tensor]
"""Projected features (B, D, h, w) and class logits (B, K, h, w)."""

Finish = Callable[[], DCLossOutput]
"""Waits for the other ranks' negatives, and computes the contrastive loss."""


class CAC(Supervised):
    """``L = L_ce + lambda * L_dc`` (Eq. 9), L_dc between two overlapping crops.

    Args:
        network: its features feed the projector Phi, which this method owns.
        config: the loss's settings and the ablation switches of Table 3.
        world: ranks that share the negatives.
        bank_dtype: dtype in which negatives are kept.
    """

    def __init__(self, network: Segmenter, world: World, config: Config, bank_dtype: Any) -> None:
        super().__init__(network, world, config)
        self.weight = config.loss.dc_weight
        self.joint = config.loss.forward == "joint"
        channels = network.feature_channels
        self.projector: nn.Module = nn.Identity()
        if config.loss.projector:
            self.projector = nn.Sequential(
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, PROJECTOR_CHANNELS, 1),
            )
            channels = PROJECTOR_CHANNELS
        past = config.loss.bank_past_steps
        self.bank = FeatureBank(1 + past, channels, bank_dtype, world.new_group())
        self.dc_loss = DirectionalContrastiveLoss(
            temperature=config.loss.temperature,
            threshold=config.loss.threshold if config.loss.positive_filtering else 0.0,
            normalization=config.loss.normalization,
            bank=self.bank,
            directional=config.loss.directional,
            contrastive=config.loss.contrastive,
            negative_sampling=config.loss.negative_sampling,
            negatives_per_view=config.loss.negatives_per_view,
            max_negatives=config.loss.max_negatives,
            seed=config.run.seed,
            backend=config.loss.dc_backend,
        )

    def set_unlabeled(self, used: bool) -> None:
        # DDP waits for the gradient of every parameter that requires one.
        self.projector.requires_grad_(used)

    def view(self, features: Tensor) -> View:
        """Projected features (B, D, h, w) and logits (B, K, h, w), at 1/8 of the crop, of E's."""
        if self.network.feature_stride == 4:
            features = F.avg_pool2d(features, 2)
        return self.projector(features), self.network.classify(features)

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        if unlabeled is None:
            return super().forward(labeled, unlabeled)
        networks = self.joint_forward if self.joint else self.separate_forward
        loss_ce, finish = networks(labeled, unlabeled)
        with phase("loss"):
            dc = finish()
        losses = {
            "loss": loss_ce + self.weight * dc.loss,
            "loss_ce": loss_ce.detach(),
            "loss_dc": dc.loss.detach(),
            "active": dc.active,
            "pairs": dc.pairs,
            "negatives": dc.negatives,
            "positive_cosine": dc.positive_cosine,
        }
        if dc.false_negatives is not None:
            losses["false_negatives"] = dc.false_negatives
        return losses

    def separate_forward(self, labeled: Batch, unlabeled: Batch) -> tuple[Tensor, Finish]:
        """Cross entropy and :meth:`contrast` of three passes, each with its own batch statistics.

        The labeled images come last: meanwhile the negatives travel between the ranks.
        """
        views = []
        with phase("forward unlabeled"):
            for name in ("image1", "image2"):
                views.append(_join(self.sliced(self.unlabeled_view, unlabeled[name])))
        with phase("loss"):
            finish = self.contrast(*views, unlabeled)
        return self.supervised_loss(labeled), finish

    def joint_forward(self, labeled: Batch, unlabeled: Batch) -> tuple[Tensor, Finish]:
        """The same of one pass over all images, with batch statistics of all of them."""
        images = labeled["image"], labeled["label"], unlabeled["image1"], unlabeled["image2"]
        with phase("forward"):
            sums, *views = zip(*self.sliced(self.joint_slice, *images, keep_last=True), strict=True)
        with phase("loss"):
            finish = self.contrast(*map(_join, views), unlabeled)
            return self.normalized(list(sums), labeled["label"]), finish

    def joint_slice(
        self, images: Tensor, labels: Tensor, images1: Tensor, images2: Tensor
    ) -> tuple[Tensor, View, View]:
        """Summed cross entropy and both views of a slice, each part with as many images."""
        parts = self.features(torch.cat((images, images1, images2))).chunk(3)
        return self.cross_entropy_sum(parts[0], labels), self.view(parts[1]), self.view(parts[2])

    def unlabeled_view(self, images: Tensor) -> View:
        """:meth:`view` of images (B, 3, H, W)."""
        return self.view(self.features(images))

    def contrast(self, view1: View, view2: View, unlabeled: Batch) -> Finish:
        """Start the contrastive loss of two views of a batch; return what ends it."""
        (features1, logits1), (features2, logits2) = view1, view2
        overlap = overlap_from_crops(
            *(unlabeled[name] for name in ("offset", "flip1", "flip2", "valid1", "valid2")),
            size=features1.shape[-2:],
        )
        truth = None
        if "truth1" in unlabeled:
            truth = (unlabeled["truth1"].long(), unlabeled["truth2"].long())
        return self.dc_loss.start(features1, features2, logits1, logits2, overlap, truth)

    def extra_state(self) -> dict[str, Any]:
        return {"bank": self.bank.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.bank.load_state_dict(state["bank"])


def _join(slices: Iterable[View]) -> View:
    features, logits = (torch.cat(parts) for parts in zip(*slices, strict=True))
    return features, logits
