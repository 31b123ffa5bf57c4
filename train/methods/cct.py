"""Cross-consistency training (CCT): predictions agree, however the features are perturbed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast.train.config import Config
from cac_fast.train.data.crops import CELL
from cac_fast.train.distributed import World
from cac_fast.train.methods.base import Batch, Method, Networks, View, check_separate
from cac_fast.train.methods.ramp import sigmoid_ramp
from cac_fast.train.networks.segmenter import initialize
from cac_fast.train.profiling import phase

RAMP_SHARE = 0.1
"""Of the run, after the warm-up, in which the weight rises."""


def channel_dropout(features: Tensor) -> Tensor:
    """DropOut: features (B, C, h, w), each channel of an image times 0 or 2."""
    return F.dropout2d(features, 0.5)


def feature_drop(features: Tensor) -> Tensor:
    """F-Drop: without the places where the mean of the channels is near its maximum in the image.

    Near is above a share of it that is drawn between 0.7 and 0.9, one
    for a rank and slice of the batch.
    """
    mean = features.detach().mean(1, keepdim=True)
    share = mean.new_empty(()).uniform_(0.7, 0.9)
    return features * (mean < share * mean.amax((2, 3), keepdim=True))


def feature_noise(features: Tensor) -> Tensor:
    """F-Noise: each value changes by up to 30 % of itself, as in the other images of the slice."""
    noise = torch.empty_like(features[0]).uniform_(-0.3, 0.3)
    return features + features * noise


PERTURBATIONS = channel_dropout, feature_drop, feature_noise


class CCT(Method):
    """`L = L_ce + w * L_u`: auxiliary classifiers of perturbed features learn what C says of them
    unperturbed.

    L_u is the mean squared difference of the probabilities over classes, cells on the image and
    auxiliary classifiers. C learns from labels alone, the encoder from both. w rises from nearly 0
    in the first tenth of the run after the warm-up. In the warm-up `L = L_ce`.
    """

    views: Mapping[str, View] = {"weak": View()}

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__(networks, world, config, dtype)
        check_separate(config)
        self.full_weight, self.warmup = config.loss.unsupervised_weight, config.num_warmup
        self.ramp = RAMP_SHARE * config.optim.iterations
        channels, classes = self.network.feature_channels, self.network.classifier[-1].out_channels
        count = config.loss.auxiliary_heads * len(PERTURBATIONS)
        self.heads = nn.ModuleList(nn.Conv2d(channels, classes, 1) for _ in range(count))
        initialize(self.heads)

    @property
    def weight(self) -> float:
        """w in this step."""
        return self.full_weight * sigmoid_ramp(self.iteration - self.warmup, self.ramp)

    def set_unlabeled(self, used: bool) -> None:
        self.heads.requires_grad_(used)

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        loss_ce = self.supervised_loss(labeled, last=unlabeled is None)
        if unlabeled is None:
            return {"loss": loss_ce, "loss_ce": loss_ce.detach()}
        with phase("forward unlabeled"):
            cells = whole_cells(unlabeled["on_image1"])
            sums = self.sliced(self.distance, unlabeled["image_weak"], cells, keep_last=True)
            loss_u = self.mean_over(cells, sums)
        weight = torch.full_like(loss_u, self.weight)
        scalars = {"loss_ce": loss_ce.detach(), "loss_u": loss_u.detach(), "weight_u": weight}
        return {"loss": loss_ce + weight * loss_u, **scalars}

    def distance(self, images: Tensor, cells: Tensor) -> Tensor:
        """Of images (B, 3, H, W), summed over the cells that are True in bool (B, h, w)."""
        features = self.at_stride_8(self.features(images))
        # C without the network's own dropout, as the auxiliary classifiers have none.
        target = probabilities(self.network.classifier[-1](features)).detach()
        found = [
            (probabilities(head(perturbed(features))) - target).square().mean(1)
            for perturbed, head in zip(cycle(PERTURBATIONS), self.heads, strict=False)
        ]
        return torch.stack(found).mean(0).where(cells, 0).sum()


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of logits (B, K, h, w), in fp32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def whole_cells(on_image: Tensor) -> Tensor:
    """Which cells lie on the image with all their pixels: bool (B, H, W) to (B, H / 8, W / 8)."""
    rows = on_image.unflatten(2, (-1, CELL)).all(3)
    return rows.unflatten(1, (-1, CELL)).all(2)
