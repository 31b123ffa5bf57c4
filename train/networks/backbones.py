"""torchvision's classifiers as dilated encoders: their modules and names, other strides."""

from __future__ import annotations

from collections.abc import Sequence

import torchvision
from torch import Tensor, nn

from cac_fast.train.errors import InputError
from cac_fast.train.networks.encoder import Encoder
from cac_fast.train.registry import BACKBONES

_MULTIGRID = (2, 4, 8)


class ResNetBackbone(Encoder):
    """A torchvision ResNet without pooling and classifier.

    `forward` takes (B, 3, H, W) and returns the output of layer1 (`low_stride` 4) or layer2 (8) and
    that of layer4 at `output_stride`; stride s gives ceil(H / s) rows. Weight names are
    torchvision's, but "fc", and so is the stem, one 7x7 convolution (the authors' PSPNet has three
    of 3x3).

    Output stride 16 (DeepLabv3+, LR-ASPP): layer4 has no stride and its blocks are dilated by 2,
    4, 8.
    Output stride 8 (PSPNet): layer3 and layer4 have no stride, and at every fourth location they
    compute what the undilated network computes (torchvision's `replace_stride_with_dilation`).
    """

    def __init__(self, name: str, output_stride: int, low_stride: int) -> None:
        super().__init__()
        self.low_stride = low_stride
        net = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        _dilate_stages(self.layer3, self.layer4, output_stride, _MULTIGRID[: len(self.layer4)])
        self.low_channels = _out_channels(self.layer1 if low_stride == 4 else self.layer2)
        self.high_channels = _out_channels(self.layer4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        quarter = self.layer1(x)
        eighth = self.layer2(quarter)
        low = quarter if self.low_stride == 4 else eighth
        return low, self.layer4(self.layer3(eighth))

    def blocks(self) -> list[nn.Module]:
        """The residual blocks."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]


# The first blocks at strides 16 and 32, and where the features end: mobilenet_v2's last 1x1
# convolution (features.18) belongs to its classifier, mobilenet_v3_large's is what LR-ASPP takes.
_MOBILE_STAGES = {"mobilenet_v2": (7, 14, 18), "mobilenet_v3_large": (7, 13, 17)}


class MobileNetBackbone(Encoder):
    """torchvision's mobilenet_v2 or mobilenet_v3_large without classifier.

    `forward` takes (B, 3, H, W) and returns the last block at `low_stride` (24 channels at 4; at 8
    there are 32, with mobilenet_v3_large 40) and 320 or 960 channels at `output_stride`.

    Output stride 16 (DeepLabv3+, LR-ASPP): the last stage has no stride and its 3x3 or 5x5
    convolutions are dilated by 2. Output stride 8 (PSPNet): the last two stages have no stride and
    are dilated as the ResNets are.
    """

    def __init__(self, name: str, output_stride: int, low_stride: int) -> None:
        super().__init__()
        third, last, end = _MOBILE_STAGES[name]
        self.features = torchvision.models.get_model(name, weights=None).features[:end]
        stages = self.features[third:last], self.features[last:]
        _dilate_stages(*stages, output_stride, [2] * (end - last))
        self.low_end = 4 if low_stride == 4 else third
        self.low_channels = _out_channels(self.features[: self.low_end])
        self.high_channels = _out_channels(self.features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.features[: self.low_end](x)
        return low, self.features[self.low_end :](low)

    def blocks(self) -> list[nn.Module]:
        """The inverted residual blocks, without the stem."""
        return list(self.features[1:])


def build_backbone(name: str, output_stride: int, low_stride: int) -> Encoder:
    """Build the backbone of this name in the registry with random weights.

    output_stride: of the high-level features, 8 or 16. low_stride: of the low-level ones, 4 or 8.

    Returns a module that maps (B, 3, H, W) to the low-level and the high-level features; it has
    their `low_channels` and `high_channels`, and `blocks()`.

    Raises:
        InputError: an unknown name, or code outside the project that returns something else.
    """
    built = BACKBONES.load(name)(output_stride, low_stride)
    if not isinstance(built, Encoder):
        raise InputError(f"--backbone {name}: it returns a {type(built).__name__}, not an Encoder")
    return built


def _dilate_stages(
    third: nn.Sequential, last: nn.Sequential, output_stride: int, dilations: Sequence[int]
) -> None:
    """Dilate the last stage's blocks by `dilations` for stride 16; both stages for stride 8."""
    if output_stride == 8:
        _dilate(third, [2] * len(third), strided=1)
        dilations = [4] * len(last)
    _dilate(last, dilations, strided=2)


def _dilate(blocks: nn.Sequential, dilations: Sequence[int], strided: int) -> None:
    """Remove the strides of `blocks` and dilate the 3x3 and 5x5 convolutions of block i by
    dilations[i], but the one that had a stride by `strided`."""
    for block, dilation in zip(blocks, dilations, strict=True):
        for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
            size, _ = conv.kernel_size
            if size > 1:
                d = strided if conv.stride != (1, 1) else dilation
                conv.dilation = (d, d)
                conv.padding = (size // 2 * d, size // 2 * d)
            conv.stride = (1, 1)


def _out_channels(module: nn.Module) -> int:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
