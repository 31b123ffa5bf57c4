"""Labels that are not to be trusted: a classifier of their own learns them (paper, Sec. 3.5)."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn

from cac_fast.train.methods.base import cross_entropy_sum
from cac_fast.train.methods.ramp import sigmoid_ramp
from cac_fast.train.networks import Segmenter, upsample_logits
from cac_fast.train.networks.segmenter import initialize

FULL_WEIGHT = 0.4
RAMP_SHARE = 0.1


class WeakClassifier(nn.Module):
    """C_w, of the form of a network's classifier C and with weights of its own.

    iterations: of the run.
    """

    def __init__(self, network: Segmenter, iterations: int) -> None:
        super().__init__()
        self.classifier = deepcopy(network.classifier)
        initialize(self.classifier)
        self.ramp = RAMP_SHARE * iterations

    def weight(self, iteration: int) -> float:
        """lambda_w after so many steps: it rises to 0.4 in the first tenth of the run."""
        return FULL_WEIGHT * sigmoid_ramp(iteration, self.ramp)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Summed cross entropy of features (B, C, h, w) by labels (B, H, W) uint8, 255 ignored."""
        return cross_entropy_sum(
            upsample_logits(self.classifier(features), labels.shape[-2:]), labels
        )
