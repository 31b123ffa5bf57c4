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
_WIDEST = 128


def lighten(module: nn.Module) -> None:
    """Put `NormClamp` in the place of every `BatchNorm2d` of `module`, with the ReLU or ReLU6 that
    follows it, and `PointwiseConv2d` and `DilatedDepthwiseConv2d` in that of such convolutions.

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
    d = conv.dilation[0]
    same = tuple(d * (k // 2) for k in conv.kernel_size)
    if conv.stride != (1, 1) or conv.padding != same or conv.padding_mode != "zeros":
        return nn.Conv2d
    if conv.kernel_size == (1, 1) and conv.groups == 1:
        return PointwiseConv2d
    odd = all(k % 2 for k in conv.kernel_size)
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.bias is None
    is_dilated = conv.dilation == (d, d) != (1, 1)
    return DilatedDepthwiseConv2d if depthwise and is_dilated and odd else nn.Conv2d


class NormClamp(nn.BatchNorm2d):
    """A `BatchNorm2d` and the ReLU or ReLU6 after it, in training as one operator of the extension.

    Its backward keeps the input alone.
    """

    def __init__(self, norm: nn.BatchNorm2d, activation: nn.Module | None) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.training = norm.training
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        if activation is not None:
            self.activation = activation
        self.bounds = _BOUNDS.get(type(activation), (-math.inf, math.inf))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in the dtype of `x`."""
        # What is refused is left to PyTorch, and so is the mean of all batches, without a momentum.
        usual = self.training and self.momentum is not None and x.shape[1] == self.num_features
        several = x.numel() > self.num_features
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


class DilatedDepthwiseConv2d(nn.Conv2d):
    """A dilated depthwise convolution that keeps the size, with faster gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if not takes_light_kernels(x):
            return super().forward(x)
        return _DilatedDepthwise.apply(x, self.weight, self.dilation[0])


class _DilatedDepthwise(torch.autograd.Function):
    """oneDNN's gradients of dilated convolutions are slow, but not its dilated convolution, nor the
    gradient of the undilated ones that all pixels of one phase make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _convolve(x, weight, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_x = _convolve(gradient, weight.flip(2, 3), ctx.dilation)
        phases = _phases(gradient, ctx.dilation), _phases(x, ctx.dilation)
        padding = [k // 2 for k in weight.shape[2:]]
        settings = [1, 1], padding, [1, 1], False, [0, 0], len(weight)
        _, of_weight, _ = torch.ops.aten.convolution_backward(
            *phases, weight, None, *settings, [False, True, False]
        )
        return of_x, of_weight, None


def _convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    padding = [dilation * (k // 2) for k in weight.shape[2:]]
    return F.conv2d(x, weight, None, 1, padding, dilation, len(weight))


def _phases(x: Tensor, d: int) -> Tensor:
    """(B, C, H, W) to the pixels (d * d * B, C, ceil(H / d), ceil(W / d)) of each phase of d."""
    height, width = x.shape[-2:]
    if height % d or width % d:
        x = F.pad(x, (0, -width % d, 0, -height % d))
    phases = x.permute(0, 2, 3, 1).unflatten(2, (-1, d)).unflatten(1, (-1, d))
    return phases.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def upsample_by_products(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(B, C, h, w) to (B, C, *size), bilinearly with align_corners=True; equal but for rounding.

    The result is contiguous, which the cross entropy takes in less time than channels-last.
    """
    x = x.contiguous()
    if x.shape[-1] > _WIDEST:  # the time of the products grows with the width
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    rows, columns = (
        F.interpolate(
            torch.eye(small)[None, None], (large, small), mode="bilinear", align_corners=True
        )[0, 0]
        for small, large in zip(x.shape[2:], size, strict=True)
    )
    return (rows @ x) @ columns.T


def takes_light_kernels(x: Tensor) -> bool:
    """Whether `x` is what the modules of this file are for."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
