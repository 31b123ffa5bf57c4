"""Supervised training: cross entropy on the labeled images alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.networks import Segmenter, in_slices, upsample_logits
from cac_fast.train.profiling import phase

Batch = dict[str, Tensor]


class Supervised(nn.Module):
    """Cross entropy of the upsampled logits, over the valid pixels of the whole global batch.

    ``forward(labeled, unlabeled)`` returns named scalars; ``"loss"`` is the one to minimize. It is
    scaled so that the mean of the gradients over ranks, which DDP takes, is the gradient of the
    global loss.

    With ``--accumulate`` > 1 the network sees the batch in so many slices, whose activations
    backward computes again, a slice at a time. The losses are taken once, of the whole batch, so
    that every denominator and every negative is that of the step in one pass. It costs one more
    forward pass, which a loss with fewer negatives for the earlier slices would have saved.
    """

    def __init__(self, network: Segmenter, world: World, config: Config) -> None:
        super().__init__()
        self.network = network
        self.world = world
        self.num_slices = config.optim.accumulate
        self.features = network.features
        self.report: str | None = None
        """What a run says of its loss at the beginning."""

    def compile_features(self) -> None:
        """Compile the encoder for training, once for each shape of batch.

        The network itself stays as it was: its weight names too, and evaluation in original sizes
        would compile for every size.
        """
        self.features = torch.compile(self.network.features, dynamic=False)

    def set_unlabeled(self, used: bool) -> None:
        """Say whether the coming steps use unlabeled images (no part of this method does)."""

    def sliced(self, function: Any, *batch: Tensor, keep_last: bool = False) -> list[Any]:
        """``function`` of each slice of a batch; see :func:`in_slices`."""
        return in_slices(function, self.num_slices, self, *batch, keep_last=keep_last)

    def cross_entropy_sum(self, features: Tensor, labels: Tensor) -> Tensor:
        """Summed cross entropy by labels (B, H, W) uint8, 255 ignored, of the upsampled logits."""
        logits = upsample_logits(self.network.classify(features), labels.shape[-2:])
        return F.cross_entropy(logits, labels.long(), ignore_index=255, reduction="sum")

    def labeled_sum(self, images: Tensor, labels: Tensor) -> Tensor:
        """Summed cross entropy of images (B, 3, H, W)."""
        return self.cross_entropy_sum(self.features(images), labels)

    def normalized(self, sums: list[Tensor], labels: Tensor) -> Tensor:
        """The slices' summed cross entropy over the valid pixels of all ranks."""
        valid = self.world.all_reduce((labels != 255).sum()).clamp(min=1)
        return torch.stack(sums).sum() * self.world.size / valid

    def supervised_loss(self, labeled: Batch) -> Tensor:
        """Cross entropy of ``image`` (B, 3, H, W) by ``label`` (B, H, W) uint8, 255 ignored.

        The step's last pass through the network.
        """
        images, labels = labeled["image"], labeled["label"]
        with phase("forward labeled"):
            sums = self.sliced(self.labeled_sum, images, labels, keep_last=True)
            return self.normalized(sums, labels)

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        loss = self.supervised_loss(labeled)
        return {"loss": loss, "loss_ce": loss.detach()}

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold beyond ``state_dict``."""
        return {}

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what :meth:`extra_state` gave."""
