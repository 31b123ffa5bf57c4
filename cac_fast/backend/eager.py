"""The operator in tiles of plain PyTorch: one pass, sorted by label, memory of one tile."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cac_fast.backend.base import Backend
from cac_fast.checks import checked_labels
from cac_fast.operands import Operands

# Anchors x negatives of one tile: small enough for a CPU's cache, large enough to fill a GPU.
_CPU_TILE = (512, 1024)
_GPU_TILE = (4096, 8192)

# Sums of e^{logit} over any number of negatives stay normal numbers below this logit, so that no
# offset is needed (logits are at most 1/tau in size).
_LARGEST_LOGIT = {torch.float32: 64.0, torch.float64: 600.0}


class _Span(NamedTuple):
    """Anchors [begin, end) and the sorted negatives they meet.

    Negatives [admissible, low) and [high, M) have labels that none of these anchors has. Those in
    [low, high) have labels between the smallest and the largest of the anchors' and need a mask;
    with one label only they are all excluded, and `masked` is False.
    """

    begin: int
    end: int
    admissible: int
    low: int
    high: int
    masked: bool


def dc_loss_rows(operands: Operands, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Works in float32 (float64 for float64 anchors); beyond copies of its operands it needs the
    memory of one tile.
    """
    anchors, positives, negatives, *_, active, temperature = operands
    anchor_labels, negative_labels = checked_labels(operands, classes)
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    loss = anchors.new_zeros(len(anchors), dtype=dtype)
    gradient = anchors.new_zeros(anchors.shape)
    rows = active.nonzero().squeeze(1)
    if len(rows) == 0:
        return loss, gradient

    labels, order = anchor_labels[rows].sort()
    rows = rows[order]
    negative_labels, order = negative_labels.sort()
    negatives = negatives.index_select(0, order).to(dtype)
    height, width = _CPU_TILE if anchors.device.type == "cpu" else _GPU_TILE
    tile = negatives.new_empty(min(height, len(rows)) * min(width, len(negatives)))
    offset_needed = 1 / temperature > _LARGEST_LOGIT[dtype]

    for span in _spans(labels, negative_labels, height):
        chosen = rows[span.begin : span.end]
        scaled, positive = anchors[chosen].to(dtype) / temperature, positives[chosen].to(dtype)
        sums = _Sums(scaled, tile, offset_needed)
        sums.add(negatives[span.admissible : span.low])
        sums.add(negatives[span.high :])
        if span.masked:
            sums.add(
                negatives[span.low : span.high],
                labels[span.begin : span.end],
                negative_labels[span.low : span.high],
            )
        x = sums.log_total() - (scaled * positive).sum(1)
        row_loss = torch.logaddexp(x, torch.zeros_like(x))
        pull = (x.sigmoid() / temperature).unsqueeze(1)
        loss[chosen] = row_loss
        gradient[chosen] = (pull * (sums.mean() - positive)).to(gradient.dtype)
    return loss, gradient


class _Sums:
    """Per anchor, the sum of e^{logit} and of e^{logit} n over the negatives added so far."""

    def __init__(self, anchors: Tensor, tile: Tensor, offset_needed: bool) -> None:
        self.anchors = anchors
        self.tile = tile
        self.width = len(tile) // len(anchors)
        self.total = anchors.new_zeros(len(anchors))
        self.weighted = torch.zeros_like(anchors)
        self.offset = anchors.new_full((len(anchors),), -math.inf) if offset_needed else None

    def add(
        self,
        negatives: Tensor,
        labels: Tensor | None = None,
        negative_labels: Tensor | None = None,
    ) -> None:
        for start in range(0, len(negatives), self.width):
            part = negatives[start : start + self.width]
            logits = self.tile[: len(self.anchors) * len(part)].view(-1, len(part))
            torch.mm(self.anchors, part.T, out=logits)
            if labels is not None and negative_labels is not None:
                same = labels.unsqueeze(1) == negative_labels[start : start + self.width]
                logits.masked_fill_(same, -math.inf)
            if self.offset is not None:
                self._raise_offset(logits)
            weights = logits.exp_()
            self.total += weights.sum(1)
            self.weighted.addmm_(weights, part)

    def _raise_offset(self, logits: Tensor) -> None:
        """Subtract the running maximum, and bring the sums so far to the new one."""
        # Finite even where nothing is admitted yet, as -inf minus -inf is not a number.
        lowest = torch.finfo(logits.dtype).min
        offset = torch.maximum(self.offset, logits.amax(1)).clamp_min(lowest)
        shrink = (self.offset - offset).exp()
        self.total *= shrink
        self.weighted *= shrink.unsqueeze(1)
        logits -= offset.unsqueeze(1)
        self.offset = offset

    def log_total(self) -> Tensor:
        """log of the sum of e^{logit}; -inf where no negative was admitted."""
        total = self.total.log()
        return total if self.offset is None else total + self.offset

    def mean(self) -> Tensor:
        """The weighted mean of the negatives; 0 where no negative was admitted."""
        smallest = torch.finfo(self.total.dtype).tiny
        return self.weighted / self.total.clamp_min(smallest).unsqueeze(1)


def _spans(labels: Tensor, negative_labels: Tensor, size: int) -> list[_Span]:
    """Cut sorted anchors into spans of at most `size` rows, at label borders where it pays."""
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    groups = list(zip(values.tolist(), counts.tolist(), strict=True))
    cuts = _cut(groups, size)
    lowest, highest = torch.tensor([cut[2:] for cut in cuts], device=labels.device).T.contiguous()
    admissible = torch.searchsorted(negative_labels, torch.zeros_like(lowest[:1]))
    low = torch.searchsorted(negative_labels, lowest).maximum(admissible)
    high = torch.searchsorted(negative_labels, highest, right=True).maximum(admissible)
    first_admissible, *bounds = torch.cat((admissible, low, high)).tolist()
    return [
        _Span(begin, end, first_admissible, low, high, smallest != largest)
        for (begin, end, smallest, largest), low, high in zip(
            cuts, bounds[: len(cuts)], bounds[len(cuts) :], strict=True
        )
    ]


def _cut(groups: list[tuple[int, int]], size: int) -> list[tuple[int, int, int, int]]:
    """(begin, end, lowest label, highest label) of spans for groups of (label, rows).

    A group of at least half a span gets spans of its own, so that it needs no mask and skips all
    negatives of its label; smaller ones share a span.
    """
    cuts: list[tuple[int, int, int, int]] = []
    row = 0
    shared = False
    for label, count in groups:
        if 2 * count >= size:
            pieces = -(-count // size)
            for piece in range(pieces):
                begin, end = row + count * piece // pieces, row + count * (piece + 1) // pieces
                cuts.append((begin, end, label, label))
            shared = False
        elif shared and row + count - cuts[-1][0] <= size:
            cuts[-1] = (cuts[-1][0], row + count, cuts[-1][2], label)
        else:
            cuts.append((row, row + count, label, label))
            shared = True
        row += count
    return cuts


BACKEND = Backend(dc_loss_rows)
