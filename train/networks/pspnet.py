"""The PSPNet head (Zhao et al. 2017): pyramid pooling at 1/8."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast.train.networks.backbones import build_backbone
from cac_fast.train.networks.segmenter import Segmenter, conv_bn_relu
from cac_fast.train.networks.upsampled import conv_of_upsampled

_BINS = (1, 2, 3, 6)
_CHANNELS = 512


class Bottleneck(nn.Sequential):
    """high (B, C, h, w) and the bins, upsampled to it -> (B, 512, h, w).

    The convolution is that of all, high first, joined along the channels.
    """

    def forward(self, high: Tensor, *bins: Tensor) -> Tensor:
        conv, norm, relu = self
        of_high, *of_bins = conv.weight.split([high.shape[1], *(x.shape[1] for x in bins)], dim=1)
        result = F.conv2d(high, of_high, padding=1)
        for x, weight in zip(bins, of_bins, strict=True):
            # A bin stands for an area, not for a point on the border: no align_corners here.
            result = result + conv_of_upsampled(x, weight, high.shape[-2:], align_corners=False)
        return relu(norm(result))


class PSPHead(nn.Module):
    """(low, unused; high at 1/8) -> (B, 512, h, w) at 1/8, all but the last 1x1 classifier.

    In training mode the BatchNorm of the 1x1 bin needs two images per process (or SyncBatchNorm2d).
    """

    feature_channels = _CHANNELS
    feature_stride = 8

    def __init__(self, high_channels: int) -> None:
        super().__init__()
        self.pyramid = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), conv_bn_relu(high_channels, _CHANNELS, 1))
            for bins in _BINS
        )
        self.bottleneck = Bottleneck(
            *conv_bn_relu(high_channels + len(_BINS) * _CHANNELS, _CHANNELS, 3)
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.bottleneck(high, *(bins(high) for bins in self.pyramid))

    def blocks(self) -> list[nn.Module]:
        """The bins and the bottleneck."""
        return [*self.pyramid, self.bottleneck]


def pspnet(backbone: str, num_classes: int, dropout: bool) -> Segmenter:
    """PSPNet, without dropout."""
    encoder = build_backbone(backbone, output_stride=8, low_stride=4)
    return Segmenter(encoder, PSPHead(encoder.high_channels), num_classes, dropout=0.0)
