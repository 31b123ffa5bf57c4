"""torchvision's VGG-16 as an encoder: its convolutions under its names, without the classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from cac_fast.train.networks.encoder import Encoder


class VGGBackbone(Encoder):
    """torchvision's vgg16 or vgg16_bn up to relu5_3, without pool5 and the fully connected layers.

    `forward` takes (B, 3, H, W) and returns relu3_3 (256 channels, `low_stride` 4) or relu4_3
    (512, 8) and relu5_3 (512) at `output_stride`; stride s gives ceil(H / s) rows, where
    torchvision's pools round down.

    Output stride 16 (DeepLabv3+, LR-ASPP): nothing is dilated.
    Output stride 8 (PSPNet): pool4 has no stride and conv5_1 to conv5_3 are dilated by 2, and at
    every second location they compute what the undilated network computes.
    """

    high_channels = 512

    def __init__(self, name: str, output_stride: int, low_stride: int) -> None:
        super().__init__()
        layers = make_layers(cfgs["D"], batch_norm=name == "vgg16_bn")
        *pools, end = (i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d))
        self.features = layers[:end]
        for pool in pools:
            self.features[pool].ceil_mode = True
        for layer in self.features.modules():
            if isinstance(layer, nn.Conv2d):  # as torchvision does
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        if output_stride == 8:
            _dilate(self.features, pools[-1])
        self.low_group = 2 if low_stride == 4 else 3
        self.low_channels = 256 if low_stride == 4 else 512
        # No list of modules: weights would have a second name.
        self.groups = tuple(_Group(self.features, *ends) for ends in pairwise([0, *pools, end]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = []
        for group in self.groups:
            x = group(x)
            maps.append(x)
        return maps[self.low_group], x

    def blocks(self) -> list[nn.Module]:
        """The five groups of convolutions, each with the pool before it."""
        return list(self.groups)


class _Group(nn.Module):
    """Layers start to stop of a sequence, whichever modules stand there; it has none of its own."""

    def __init__(self, layers: nn.Sequential, start: int, stop: int) -> None:
        super().__init__()
        self.part = layers, slice(start, stop)

    def forward(self, x: Tensor) -> Tensor:
        layers, part = self.part
        return layers[part](x)

    def modules(self, *args: object, **kwargs: object) -> Iterator[nn.Module]:
        layers, part = self.part
        return layers[part].modules()


class _PoolAtEveryLocation(nn.Module):
    """The 2x2 maximum at every location; what lies beyond the border never wins."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2, stride=1)


def _dilate(features: nn.Sequential, pool: int) -> None:
    """Remove the stride of the pool and dilate the 3x3 convolutions after it."""
    features[pool] = _PoolAtEveryLocation()
    for layer in features[pool:]:
        if isinstance(layer, nn.Conv2d):
            layer.dilation = layer.padding = (2, 2)
