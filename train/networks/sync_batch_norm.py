"""Batch norm with statistics of all processes, on CPUs too.

PyTorch's `SyncBatchNorm` takes GPUs alone, and makes the host wait for them in every layer, to
leave out ranks with an empty batch. Here every rank has as many values: the trainer sees to that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from cac_fast.collectives import all_gather


def synchronize_batch_norm(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Put a `SyncBatchNorm2d` with the same tensors where `module` has a `BatchNorm2d`.

    Names, and so checkpoints, stay as they are.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SyncBatchNorm2d(child, group))


class SyncBatchNorm2d(_BatchNorm):
    """`nn.BatchNorm2d` over the batches (B, C, H, W) of all ranks, which have one shape.

    Args:
        norm: gives its settings, parameters and buffers; affine, with running statistics that move
            by a momentum. Modules inside it follow it, as timm's `BatchNormAct2d` has them.
        group: the ranks; None for all.
    """

    def __init__(self, norm: nn.BatchNorm2d, group: dist.ProcessGroup | None) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.group = group
        self.training = norm.training  # a teacher stays in evaluation mode
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in norm.named_children():  # timm's activation, which its norms hold
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in the dtype of `x`; in evaluation mode by the running statistics."""
        if self.training:
            self.num_batches_tracked.add_(1)
            x = _Normalize.apply(x, self.weight, self.bias, self)
        else:
            x = super().forward(x)
        for child in self.children():
            x = child(x)
        return x

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(f"the input must have shape (B, C, H, W), not {tuple(x.shape)}")


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: SyncBatchNorm2d) -> Tensor:
        x, ops = _dense(x), _operators(x)
        ranks = dist.get_world_size(norm.group)
        local = torch.stack(ops.batch_norm_stats(x, norm.eps))
        gathered = local.new_empty(ranks * 2, local.shape[1])
        all_gather(gathered, local, norm.group)
        means, inverses = gathered.view(ranks, 2, -1).unbind(1)
        counts = means.new_full((ranks,), x.numel() // x.shape[1])
        of_ranks = means.contiguous(), inverses.contiguous()
        settings = norm.running_mean, norm.running_var, norm.momentum, norm.eps
        mean, inverse = ops.batch_norm_gather_stats_with_counts(x, *of_ranks, *settings, counts)
        ctx.save_for_backward(x, weight, mean, inverse, counts)
        ctx.group = norm.group
        return ops.batch_norm_elemt(x, weight, bias, mean, inverse, norm.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        gradient, ops = _dense(gradient), _operators(x)
        of_x = gradient, x, mean, inverse, weight
        *sums, of_weight, of_bias = ops.batch_norm_backward_reduce(*of_x, True, True, True)
        # The parameters' gradients stay the rank's own: DDP takes the mean of all gradients.
        both = torch.stack(sums)
        dist.all_reduce(both, group=ctx.group)
        return ops.batch_norm_backward_elemt(*of_x, *both, counts.int()), of_weight, of_bias, None


class _Plain:
    """What PyTorch has for GPUs alone, and cannot compile: the same names and arguments.

    inverse: 1 / sqrt(variance + eps), (C,), as mean in float32 at least. counts: (R,) values of a
    channel on each rank.
    """

    @staticmethod
    def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and inverse of the rank's batch."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if torch.compiler.is_compiling():
            variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        else:  # several times as fast where it is not fused
            mean, variance = torch.batch_norm_update_stats(wide, None, None, 0.0)
        return mean, torch.rsqrt(variance + eps)

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        x: Tensor,
        means: Tensor,
        inverses: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Mean and inverse of all ranks' batches, of each rank's (R, C); moves the running ones."""
        total = counts.sum()
        shares = (counts / total).unsqueeze(1)
        mean = (shares * means).sum(0)
        variance = (shares * (inverses**-2 - eps + (means - mean).square())).sum(0)
        unbiased = variance * total / (total - 1)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return mean, torch.rsqrt(variance + eps)

    @staticmethod
    def batch_norm_elemt(
        x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float
    ) -> Tensor:
        """The batch, normalized."""
        return F.batch_norm(x, mean, inverse**-2 - eps, weight, bias, eps=eps)

    @staticmethod
    def batch_norm_backward_reduce(
        gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums (C,) of dy and of dy (x - mean), and the gradients of weight and bias."""
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, inverse, True, 0.0, [False, True, True]
        )
        wide = of_weight.to(mean.dtype) / inverse
        return of_bias.to(mean.dtype), wide, of_weight, of_bias

    @staticmethod
    def batch_norm_backward_elemt(
        gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *of_all: Tensor
    ) -> Tensor:
        """The gradient of the batch, in its dtype; of_all: sums of dy and dy (x - mean), counts."""
        sum_dy, sum_dy_xmu, counts = of_all
        mean_dy, slope = sum_dy / counts.sum(), inverse**2 * sum_dy_xmu / counts.sum()
        scale = inverse * weight
        mean, mean_dy, slope, scale = (v.view(1, -1, 1, 1) for v in (mean, mean_dy, slope, scale))
        return torch.addcmul(gradient - mean_dy, x - mean, slope, value=-1).mul_(scale).to(x.dtype)


def _operators(x: Tensor) -> Any:
    return torch if x.is_cuda and not torch.compiler.is_compiling() else _Plain


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
