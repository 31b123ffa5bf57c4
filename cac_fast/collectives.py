"""What the ranks exchange: rows of features and labels, gathered in the background."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
"""The ranks that take part; None for all."""


def world_size(group: Group = None) -> int:
    """Number of ranks in `group`, 1 without a process group."""
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if ready else 1


def all_gather(
    gathered: Tensor, tensor: Tensor, group: Group, async_op: bool = False
) -> dist.Work | None:
    """Every rank's `tensor`, one after the other along dim 0, by whichever name PyTorch has it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(gathered, tensor, group=group, async_op=async_op)


def start_gathering(
    features: Tensor, labels: Tensor, group: Group
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Start to concatenate all ranks' rows; return what waits for them.

    features: (M, C) floating point. labels: (M,) int64. M is the same on all ranks.

    Both travel as the bytes of one tensor: it costs one collective's latency, and int64 labels
    arrive exactly, whatever the dtype of the features.
    """
    world = world_size(group)
    if world == 1:
        return lambda: (features, labels)
    # The labels first, and all rows of a multiple of their 8 bytes: so both can be viewed.
    parts = labels.unsqueeze(1).view(torch.uint8), features.contiguous().view(torch.uint8)
    end = 8 + parts[1].shape[1]
    packed = torch.nn.functional.pad(torch.cat(parts, dim=1), (0, -end % 8))
    gathered = packed.new_empty(world * packed.shape[0], packed.shape[1])
    work = all_gather(gathered, packed, group, async_op=True)

    def arrived() -> tuple[Tensor, Tensor]:
        work.wait()
        return gathered[:, 8:end].view(features.dtype), gathered[:, :8].view(torch.int64)[:, 0]

    return arrived
