"""What makes networks of depthwise convolutions faster on CPUs: the same modules, other kernels.

All of it is for float32 in channels-last; anything else takes PyTorch's way. Gradients of it cannot
be differentiated.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cac_fast import _extension

_BOUNDS = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}


def lighten(module: nn.Module) -> None:
    """Put `NormClamp` in the place of every `BatchNorm2d` of `module`, with the ReLU or ReLU6 that
    follows it, and `PointwiseConv2d` and `DepthwiseConv2d` in that of such convolutions.

    Names of weights stay as they are, and values but for roundings.
    """
    for parent in list(module.modules()):
        children = [*parent.named_children(), ("", None)]
        for (name, child), (next_name, activation) in pairwise(children):
            if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
                joined = isinstance(parent, nn.Sequential) and type(activation) in _BOUNDS
                setattr(parent, name, NormClamp(child, activation if joined else None))
                if joined:
                    setattr(parent, next_name, nn.Identity())
            elif type(child) is nn.Conv2d:
                child.__class__ = _faster(child)


def _faster(conv: nn.Conv2d) -> type[nn.Conv2d]:
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    steps = [*conv.stride, *conv.dilation]
    if plain and conv.kernel_size == (1, 1) and conv.groups == 1:
        return PointwiseConv2d if {*conv.stride, *conv.padding} == {0, 1} else nn.Conv2d
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.bias is None
    square = steps[0] == steps[1] and steps[2] == steps[3]
    return DepthwiseConv2d if plain and depthwise and square and max(steps) > 1 else nn.Conv2d


class NormClamp(nn.BatchNorm2d):
    """A `BatchNorm2d` and the ReLU or ReLU6 after it, in training as one operator of the extension.

    Its backward keeps the input alone.
    """

    def __init__(self, norm: nn.BatchNorm2d, activation: nn.Module | None) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        if activation is not None:
            self.activation = activation
        self.bounds = _BOUNDS.get(type(activation), (-math.inf, math.inf))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in the dtype of `x`."""
        several = x.numel() > x.shape[1]
        usual = self.training and self.momentum is not None  # None takes the mean of all batches
        if usual and several and takes_light_kernels(x) and not _extension.unavailable():
            self.num_batches_tracked.add_(1)
            return _NormClamp.apply(x, self.weight, self.bias, self)
        x = super().forward(x)
        for child in self.children():
            x = child(x)
        return x


class _NormClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: NormClamp) -> Tensor:
        moved = norm.running_mean, norm.running_var, norm.momentum
        y, kept = torch.ops.cac_fast.norm_clamp(x, weight, bias, *moved, norm.eps, *norm.bounds)
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.bounds = norm.bounds
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_all = torch.ops.cac_fast.norm_clamp_backward(gradient, *ctx.saved_tensors, *ctx.bounds)
        return *of_all, None


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution, as a product of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, O, H, W)."""
        if not takes_light_kernels(x):
            return super().forward(x)
        y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """A strided or dilated depthwise convolution, with both gradients by one operator of the
    extension: oneDNN's are slow there, and fast without stride and dilation."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, h, w)."""
        if not takes_light_kernels(x) or _extension.unavailable():
            return super().forward(x)
        return _Depthwise.apply(x, self.weight, self.stride[0], self.padding, self.dilation[0])


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return F.conv2d(x, weight, None, *settings, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_both = torch.ops.cac_fast.depthwise_backward(gradient, *ctx.saved_tensors, *ctx.settings)
        return *of_both, None, None, None


def upsample_by_products(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(B, C, h, w) to (B, C, *size), bilinearly with align_corners=True; equal but for rounding.

    PyTorch takes several times as long, above all for the gradient.
    """
    rows, columns = (
        F.interpolate(
            torch.eye(small)[None, None], (large, small), mode="bilinear", align_corners=True
        )[0, 0]
        for small, large in zip(x.shape[2:], size, strict=True)
    )
    return (rows @ x.contiguous()) @ columns.T


def takes_light_kernels(x: Tensor) -> bool:
    """Whether `x` is what the modules of this file are for."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
