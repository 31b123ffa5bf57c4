"""The memory bank: features of past batches as further negatives (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cac_fast.checks import check_kind, check_shape
from cac_fast.collectives import start_gathering, world_size


class FeatureBank:
    """A ring of the last `steps` pushes, the current one included, gathered from all ranks.

    The ring is allocated at the first push, on the device of what is pushed; its size is fixed from
    then on. Later pushes may be shorter (the rest of their place counts as empty), not longer.
    Empty places have label -1, which no anchor admits. The place of a push is counted on the host:
    a CUDA graph that captured one would write to that place for ever.

    The ranks' rows travel while the caller goes on: a push starts the gather, and whatever reads
    the ring first waits for it (on CUDA the stream does, not the host).

    steps: pushes kept.
    dim: channels.
    dtype: of the stored features.
    group: the ranks that share the bank; None for all. With a group of its own the gather waits
        for no other collective.

    Raises:
        ValueError: bad choices.

    >>> bank = FeatureBank(steps=2, dim=4)
    >>> bank.push(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    >>> bank.labels
    tensor([ 0,  1,  1, -1, -1, -1])
    """

    def __init__(
        self,
        steps: int,
        dim: int,
        dtype: torch.dtype = torch.bfloat16,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, not {dim}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, not {dtype}")
        self.steps = steps
        self.dim = dim
        self.dtype = dtype
        self.group = group
        self.pushes = 0
        self._arriving: Callable[[], tuple[Tensor, Tensor]] | None = None
        self._features = torch.zeros(steps, 0, dim, dtype=dtype)
        self._labels = torch.zeros(steps, 0, dtype=torch.int64)
        self._rows_per_rank: int | None = None

    @property
    def features(self) -> Tensor:
        """(steps * rows, dim): a view of the ring, unordered; the next push changes it."""
        self._settle()
        return self._features.flatten(0, 1)

    @property
    def labels(self) -> Tensor:
        """(steps * rows,) int64, -1 where the ring is empty."""
        self._settle()
        return self._labels.flatten()

    @property
    def push_id(self) -> int:
        """A number by which this rank's next push differs from all others it will meet here."""
        rank = dist.get_rank(self.group) if world_size(self.group) > 1 else 0
        return ((self.pushes % self.steps) << 16) + rank

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor) -> None:
        """Store one batch of every rank over the oldest one. All ranks must make the same pushes.

        features: (M, dim) floating point.
        labels: (M,) integer.
        Both are detached; nothing that is pushed ever receives a gradient.

        Raises:
            ValueError: a wrong shape or dtype, or more rows than the ring has room for.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(
                f"features must have shape (M, {self.dim}), not {tuple(features.shape)}"
            )
        check_shape("labels", labels, (len(features),))
        check_kind("labels", labels, "integers")
        self._settle()
        room = self._make_room(features)
        if len(features) > room:
            raise ValueError(
                f"features has {len(features)} rows but this bank keeps {room} per rank and push: "
                "make the first push the largest"
            )
        self._arriving = start_gathering(
            _pad(features.detach().to(self.dtype), room, 0.0),
            _pad(labels.detach().to(torch.int64), room, -1),
            self.group,
        )
        self.pushes += 1
        if world_size(self.group) == 1:
            self._settle()  # now, as the caller may change its tensors

    @torch.no_grad()
    def sample(self, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """A uniform random subset of `count` of all the places, of every rank and step.

        Returns features (count, dim), labels (count,) int64, and the weight, a 0-d float32: how
        many stored rows each drawn one stands for, at least 1. The weight times a sum over the
        drawn rows is an unbiased estimate of that sum over all. Empty places are drawn only where
        fewer than `count` are filled; with `count` places or less, all are returned.

        The draw is a function of `seed` and the number of pushes: the same on every rank, and after
        a resume. Nothing waits for the device.

        Raises:
            ValueError: a count below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        features, labels = self.features, self.labels
        if count >= len(labels):
            return features, labels, torch.ones((), device=labels.device)
        generator = torch.Generator(labels.device)
        # Hashed, as the generator of a CPU heeds 32 bits alone.
        state = np.random.SeedSequence((seed, self.pushes)).generate_state(1)
        generator.manual_seed(int(state[0]))
        # Among float32 keys some would be equal, and which of them are drawn up to the algorithm.
        keys = torch.rand(
            len(labels), generator=generator, dtype=torch.float64, device=labels.device
        )
        rows = (keys + (labels < 0)).topk(count, largest=False, sorted=False).indices
        weight = ((labels >= 0).sum() / count).clamp_min(1)
        return features[rows], labels[rows], weight

    def state_dict(self) -> dict[str, Any]:
        """The ring and the number of pushes, as plain tensors and numbers (not copies)."""
        self._settle()
        return {"features": self._features, "labels": self._labels, "pushes": self.pushes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved ring, whatever number of ranks wrote it.

        Raises:
            ValueError: its steps or channels are not those of this bank.
        """
        self._settle()
        features, labels = state["features"], state["labels"]
        if features.shape[0] != self.steps or features.shape[2] != self.dim:
            raise ValueError(
                f"the saved bank keeps {features.shape[0]} steps of {features.shape[2]} channels, "
                f"this one {self.steps} steps of {self.dim}"
            )
        self._features = features.to(self.dtype, copy=True)
        self._labels = labels.to(torch.int64, copy=True)
        self.pushes = int(state["pushes"])
        self._rows_per_rank = None

    def _make_room(self, features: Tensor) -> int:
        """Rows per rank and push; allocates the ring (or widens a loaded one) at the first push."""
        if self._rows_per_rank is None:
            ranks = world_size(self.group)
            # Ranks may hold unequal shares of the batch: the largest decides for all.
            most = torch.tensor(len(features), device=features.device)
            if ranks > 1:
                dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
            self._rows_per_rank = max(int(most), self._labels.shape[1] // ranks)
            missing = max(0, self._rows_per_rank * ranks - self._labels.shape[1])
            ring = torch.nn.functional.pad(self._features, (0, 0, 0, missing))
            self._features = ring.to(features.device)
            labels = torch.nn.functional.pad(self._labels, (0, missing), value=-1)
            self._labels = labels.to(features.device)
        return self._rows_per_rank

    @torch.no_grad()
    def _settle(self) -> None:
        """Write what the last push brings to its place."""
        if self._arriving is None:
            return
        features, labels = self._arriving()
        self._arriving = None
        slot = (self.pushes - 1) % self.steps
        self._features[slot, : len(features)] = features
        self._labels[slot, : len(labels)] = labels
        self._labels[slot, len(labels) :] = -1


def _pad(tensor: Tensor, rows: int, value: float) -> Tensor:
    missing = rows - tensor.shape[0]
    if missing == 0:
        return tensor
    return torch.cat((tensor, tensor.new_full((missing, *tensor.shape[1:]), value)))
