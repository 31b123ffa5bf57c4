"""The LR-ASPP head (Howard et al. 2019, MobileNetV3): little more than the backbone, at 1/8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast.train.networks.backbones import build_backbone
from cac_fast.train.networks.light import lighten
from cac_fast.train.networks.segmenter import Segmenter, conv_bn_relu

_CHANNELS = 128


class LRASPPHead(nn.Module):
    """(low at 1/8, high at 1/16) -> (B, 128 + low channels, h, w) at 1/8, all but the classifier.

    The high-level features, gated channel by channel by their global average, are upsampled to the
    low-level ones, which follow as they are.
    """

    feature_stride = 8

    def __init__(self, low_channels: int, high_channels: int) -> None:
        super().__init__()
        self.feature_channels = _CHANNELS + low_channels
        self.reduce = conv_bn_relu(high_channels, _CHANNELS, 1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(high_channels, _CHANNELS, 1), nn.Sigmoid()
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        gated = self.reduce(high) * self.gate(high)
        gated = F.interpolate(gated, size=low.shape[-2:], mode="bilinear", align_corners=True)
        return torch.cat([gated, low], dim=1)

    def blocks(self) -> list[nn.Module]:
        """The reduction of the high-level features and their gate."""
        return [self.reduce, self.gate]


def lraspp(backbone: str, num_classes: int, dropout: bool) -> Segmenter:
    """LR-ASPP, which has no dropout."""
    encoder = build_backbone(backbone, output_stride=16, low_stride=8)
    head = LRASPPHead(encoder.low_channels, encoder.high_channels)
    network = Segmenter(encoder, head, num_classes, dropout=0.0)
    lighten(network)
    return network
