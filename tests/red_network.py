"""A classification network that says how red a cell is."""

from __future__ import annotations

from torch import Tensor, nn

from cac_fast.train.networks.encoder import Encoder
from cac_fast.train.weak.classifier import Classifier


class RedEncoder(Encoder):
    """Its only feature is the red of a cell, after normalization."""

    low_channels = high_channels = 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, nn.functional.avg_pool2d(x[:, :1], 16)


def red_network() -> Classifier:
    """Of one class."""
    network = Classifier(RedEncoder(), 1).eval()
    nn.init.ones_(network.convolution.weight)
    return network
