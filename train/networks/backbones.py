"""torchvision's classifiers as dilated encoders: their modules and names, other strides."""

from __future__ import annotations

from collections.abc import Sequence

import torchvision
from torch import Tensor, nn

from cac_fast.train.errors import InputError

BACKBONES = ("mobilenet_v2", "resnet18", "resnet50", "resnet101")

_MULTIGRID = (2, 4, 8)


class ResNetBackbone(nn.Module):
    """A torchvision ResNet without pooling and classifier.

    `forward` takes (B, 3, H, W) and returns the output of layer1 at stride 4 and that of layer4
    at `output_stride`; stride s gives ceil(H / s) rows. Weight names are torchvision's, but "fc",
    and so is the stem, one 7x7 convolution (the authors' PSPNet has three of 3x3).

    Output stride 16 (DeepLabv3+): layer4 has no stride and its blocks are dilated by 2, 4, 8.
    Output stride 8 (PSPNet): layer3 and layer4 have no stride, and at every fourth location they
    compute what the undilated network computes (torchvision's `replace_stride_with_dilation`).
    """

    def __init__(self, name: str, output_stride: int) -> None:
        super().__init__()
        net = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        if output_stride == 16:
            _dilate(self.layer4, _MULTIGRID[: len(self.layer4)], strided=2)
        else:
            _dilate(self.layer3, [2] * len(self.layer3), strided=1)
            _dilate(self.layer4, [4] * len(self.layer4), strided=2)
        self.low_channels = _out_channels(self.layer1)
        self.high_channels = _out_channels(self.layer4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        low = self.layer1(x)
        return low, self.layer4(self.layer3(self.layer2(low)))

    def blocks(self) -> list[nn.Module]:
        """The residual blocks."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]


class MobileNetV2Backbone(nn.Module):
    """torchvision's mobilenet_v2 without its last 1x1 convolution (`features.18`) and classifier.

    `forward` takes (B, 3, H, W) and returns 24 channels at stride 4 and 320 at `output_stride`.

    Output stride 16 (DeepLabv3+): the last stage (blocks 14 to 17) has no stride and its 3x3
    convolutions are dilated by 2. Output stride 8 (PSPNet): the last two stages (7 to 17) have no
    stride and are dilated as the ResNets are.
    """

    def __init__(self, output_stride: int) -> None:
        super().__init__()
        self.features = torchvision.models.mobilenet_v2(weights=None).features[:18]
        if output_stride == 16:
            _dilate(self.features[14:], [2] * 4, strided=2)
        else:
            _dilate(self.features[7:14], [2] * 7, strided=1)
            _dilate(self.features[14:], [4] * 4, strided=2)
        self.low_channels = _out_channels(self.features[:4])
        self.high_channels = _out_channels(self.features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.features[:4](x)
        return low, self.features[4:](low)

    def blocks(self) -> list[nn.Module]:
        """The inverted residual blocks, without the stem."""
        return list(self.features[1:])


def build_backbone(name: str, output_stride: int) -> ResNetBackbone | MobileNetV2Backbone:
    """Build the backbone `name` (one of BACKBONES) with output stride 8 or 16 and random weights.

    Raises InputError for another name.
    """
    if name not in BACKBONES:
        raise InputError(f"unknown backbone '{name}': choose one of {', '.join(BACKBONES)}")
    if name == "mobilenet_v2":
        return MobileNetV2Backbone(output_stride)
    return ResNetBackbone(name, output_stride)


def _dilate(blocks: nn.Sequential, dilations: Sequence[int], strided: int) -> None:
    """Remove the strides of `blocks` and dilate the 3x3 convolutions of block i by dilations[i],
    but the one that had a stride by `strided`."""
    for block, dilation in zip(blocks, dilations, strict=True):
        for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
            if conv.kernel_size == (3, 3):
                d = strided if conv.stride != (1, 1) else dilation
                conv.dilation = conv.padding = (d, d)
            conv.stride = (1, 1)


def _out_channels(module: nn.Module) -> int:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
