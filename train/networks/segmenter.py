"""A segmentation network as the methods see it: encoder `features`, 1x1 classifier `classify`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cac_fast.train.networks.light import takes_light_kernels, upsample_by_products
from cac_fast.train.networks.recompute import recompute_blocks
from cac_fast.train.preprocessing import Preprocessing


class Segmenter(nn.Module):
    """backbone -> head (together the encoder E of the paper) -> classifier C.

    `head(low, high)` takes the two feature maps of the backbone and has `feature_channels` and
    `feature_stride`. `dropout` is the probability before the classifier; it belongs to C, so the
    projector sees features without it.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_channels: int = head.feature_channels
        """Channels C of `features`."""
        self.feature_stride: int = head.feature_stride
        """Pixels of the image per location of `features`, per axis."""
        self.classifier = nn.Sequential(
            dropout_layer(dropout), nn.Conv2d(head.feature_channels, num_classes, 1)
        )
        initialize(self.head)
        initialize(self.classifier)

    @property
    def preprocessing(self) -> Preprocessing:
        """What images must be like."""
        return self.backbone.preprocessing

    def checkpoint_activations(self) -> None:
        """Keep the inputs of the encoder's blocks alone; backward computes the rest again."""
        recompute_blocks([*self.backbone.blocks(), *self.head.blocks()])

    def features(self, x: Tensor) -> Tensor:
        """E: normalized images (B, 3, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        return self.head(*self.backbone(x))

    def classify(self, features: Tensor) -> Tensor:
        """C: features (B, C, h, w), pooled or not, to logits (B, num_classes, h, w)."""
        return self.classifier(features)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W), H, W >= 32, to logits (B, num_classes, H, W), >= fp32."""
        return upsample_logits(self.classify(self.features(x)), x.shape[-2:])


def upsample_logits(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Upsample (B, K, h, w) bilinearly, align_corners=True, to (B, K, H, W), size = (H, W).

    Half precision becomes fp32: between close logits the rounding of the result would decide.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if takes_light_kernels(logits):
        return upsample_by_products(logits, size)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


class DilatedConv2d(nn.Conv2d):
    """A 3x3 convolution that keeps the size, without bias.

    On a map no larger than its dilation all taps but one meet padding.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__(
            in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        # An exported graph has no branches: all sizes take the general way.
        if not torch.compiler.is_exporting() and max(x.shape[-2:]) <= self.dilation[0]:
            return F.conv2d(x, self.weight[:, :, 1:2, 1:2])
        return super().forward(x)


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """A convolution that keeps the size, without bias, then BatchNorm and ReLU."""
    padding = kernel_size // 2
    return then_bn_relu(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
    )


def then_bn_relu(convolution: nn.Conv2d) -> nn.Sequential:
    """The convolution, BatchNorm of its channels and ReLU."""
    return nn.Sequential(
        convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)
    )


def dropout_layer(probability: float) -> nn.Module:
    """Dropout, or for 0 a placeholder that keeps the weight names of the modules after it."""
    return nn.Dropout(probability) if probability > 0 else nn.Identity()


def initialize(module: nn.Module) -> None:
    """Kaiming-normal convolutions with zero bias, as the authors do; BatchNorm starts as (1, 0)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def freeze_batch_norm(module: nn.Module) -> None:
    """Let every batch norm of `module` use its running statistics."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()
