"""The PSPNet head (Zhao et al. 2017): pyramid pooling at 1/8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast.train.networks.segmenter import conv_bn_relu

_BINS = (1, 2, 3, 6)
_CHANNELS = 512


class PSPHead(nn.Module):
    """(low, unused; high at 1/8) -> (B, 512, h, w) at 1/8, all but the last 1x1 classifier.

    In training mode the BatchNorm of the 1x1 bin needs two images per process (or SyncBatchNorm).
    """

    feature_channels = _CHANNELS
    feature_stride = 8

    def __init__(self, high_channels: int) -> None:
        super().__init__()
        self.pyramid = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), conv_bn_relu(high_channels, _CHANNELS, 1))
            for bins in _BINS
        )
        self.bottleneck = conv_bn_relu(high_channels + len(_BINS) * _CHANNELS, _CHANNELS, 3)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        # A bin stands for an area, not for a point on the border: no align_corners here.
        size = high.shape[-2:]
        pooled = [F.interpolate(bins(high), size=size, mode="bilinear") for bins in self.pyramid]
        return self.bottleneck(torch.cat([high, *pooled], dim=1))

    def blocks(self) -> list[nn.Module]:
        """The bins and the bottleneck."""
        return [*self.pyramid, self.bottleneck]
