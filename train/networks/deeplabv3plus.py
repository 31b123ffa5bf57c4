"""The DeepLabv3+ head (Chen et al. 2018): ASPP at 1/16, decoder at 1/4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast.train.networks.backbones import build_backbone
from cac_fast.train.networks.segmenter import (
    DilatedConv2d,
    Segmenter,
    conv_bn_relu,
    dropout_layer,
    then_bn_relu,
)
from cac_fast.train.networks.upsampled import conv_of_upsampled

_RATES = (6, 12, 18)
_CHANNELS = 256
_LOW_CHANNELS = 48


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: (B, in_channels, h, w) -> (B, 256, h, w).

    A 1x1, three 3x3 dilated by 6, 12, 18 and the global average, joined by a 1x1. In training mode
    the BatchNorm of the global average needs two images per process (or SyncBatchNorm2d).
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn_relu(in_channels, _CHANNELS, 1),
                *(then_bn_relu(DilatedConv2d(in_channels, _CHANNELS, rate)) for rate in _RATES),
            ]
        )
        self.pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv_bn_relu(in_channels, _CHANNELS, 1)
        )
        self.project = conv_bn_relu((len(self.branches) + 1) * _CHANNELS, _CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The pooled branch is one value per channel: expand instead of an interpolation.
        pooled = self.pooled(x).expand(-1, -1, *x.shape[-2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


class Decoder(nn.Sequential):
    """low (B, 48, H, W) and high (B, 256, h, w), upsampled to it -> (B, 256, H, W).

    The first convolution is that of both, high before low, joined along the channels.
    """

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        conv, norm, relu = self[0]
        of_high, of_low = conv.weight.split([_CHANNELS, _LOW_CHANNELS], dim=1)
        x = F.conv2d(low, of_low, padding=1)
        x = x + conv_of_upsampled(high, of_high, low.shape[-2:], align_corners=True)
        return self[2](self[1](relu(norm(x))))


class DeepLabV3PlusHead(nn.Module):
    """(low at 1/4, high at 1/16) -> (B, 256, h, w) at 1/4, all but the last 1x1 classifier."""

    feature_channels = _CHANNELS
    feature_stride = 4

    def __init__(self, low_channels: int, high_channels: int, dropout: float) -> None:
        super().__init__()
        self.aspp = ASPP(high_channels)
        self.dropout = dropout_layer(dropout)
        self.reduce = conv_bn_relu(low_channels, _LOW_CHANNELS, 1)
        self.decoder = Decoder(
            conv_bn_relu(_CHANNELS + _LOW_CHANNELS, _CHANNELS, 3),
            dropout_layer(dropout),
            conv_bn_relu(_CHANNELS, _CHANNELS, 3),
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.decoder(self.reduce(low), self.dropout(self.aspp(high)))

    def blocks(self) -> list[nn.Module]:
        """ASPP, the reduction of the low-level features, decoder."""
        return [self.aspp, self.reduce, self.decoder]


def deeplabv3plus(backbone: str, num_classes: int, dropout: bool) -> Segmenter:
    """DeepLabv3+; dropout: 0.5 after ASPP and in the decoder and 0.1 before the classifier."""
    encoder = build_backbone(backbone, output_stride=16, low_stride=4)
    head = DeepLabV3PlusHead(
        encoder.low_channels, encoder.high_channels, dropout=0.5 if dropout else 0.0
    )
    return Segmenter(encoder, head, num_classes, dropout=0.1 if dropout else 0.0)
