"""Context-aware consistency (CAC): the features of one pixel agree under two different contexts."""

from __future__ import annotations

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
        self.weight = config.dc_weight
        channels = network.feature_channels
        self.projector: nn.Module = nn.Identity()
        if config.projector:
            self.projector = nn.Sequential(
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, PROJECTOR_CHANNELS, 1),
            )
            channels = PROJECTOR_CHANNELS
        self.bank = FeatureBank(1 + config.bank_past_steps, channels, bank_dtype)
        self.dc_loss = DirectionalContrastiveLoss(
            temperature=config.temperature,
            threshold=config.threshold if config.positive_filtering else 0.0,
            normalization=config.normalization,
            bank=self.bank,
            directional=config.directional,
            contrastive=config.contrastive,
            negative_sampling=config.negative_sampling,
            negatives_per_view=config.negatives_per_view,
            backend=config.dc_backend,
        )

    def set_unlabeled(self, used: bool) -> None:
        # DDP waits for the gradient of every parameter that requires one.
        self.projector.requires_grad_(used)

    def view(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features (B, D, h, w) and logits (B, K, h, w), at 1/8 of the crop, of E's."""
        if self.network.feature_stride == 4:
            features = F.avg_pool2d(features, 2)
        return self.projector(features), self.network.classify(features)

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        if unlabeled is None:
            return super().forward(labeled, unlabeled)
        loss_ce, views = self.supervised_loss(labeled, keep_last=False), []
        with phase("forward unlabelled"):
            for name, last in (("image1", False), ("image2", True)):
                slices = self.sliced(self.unlabeled_view, unlabeled[name], keep_last=last)
                views.append([torch.cat(parts) for parts in zip(*slices, strict=True)])
        with phase("loss"):
            dc = self.contrast(*views, unlabeled)
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

    def unlabeled_view(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`view` of images (B, 3, H, W)."""
        return self.view(self.network.features(images))

    def contrast(self, view1: list[Tensor], view2: list[Tensor], unlabeled: Batch) -> DCLossOutput:
        """The contrastive loss of two views, each (B, D, h, w) features and (B, K, h, w) logits."""
        (features1, logits1), (features2, logits2) = view1, view2
        overlap = overlap_from_crops(
            *(unlabeled[name] for name in ("offset", "flip1", "flip2", "valid1", "valid2")),
            size=features1.shape[-2:],
        )
        truth = None
        if "truth1" in unlabeled:
            truth = (unlabeled["truth1"].long(), unlabeled["truth2"].long())
        return self.dc_loss(features1, features2, logits1, logits2, overlap, truth)

    def extra_state(self) -> dict[str, Any]:
        return {"bank": self.bank.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.bank.load_state_dict(state["bank"])
