"""Which feature cells of two crops show the same part of the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Overlap:
    """Partners and valid cells of two views of h * w cells (flat index row * w + column).

    partner1: (B, h*w) int64, the cell of view 2 that shows the same image cell, -1 where there is
        none or where either of the two lies on padding. partner2: the same from view 2 to view 1.
    valid1, valid2: (B, h*w) bool, whether the cell lies wholly on the image.

    >>> partner, valid = torch.tensor([[0, -1]]), torch.tensor([[True, True]])
    >>> Overlap(partner, partner, valid, valid).counts
    tensor([1])
    """

    partner1: Tensor
    partner2: Tensor
    valid1: Tensor
    valid2: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Overlap:
        """The same overlap on another device."""
        tensors = (self.partner1, self.partner2, self.valid1, self.valid2)
        return Overlap(*(t.to(device, non_blocking=non_blocking) for t in tensors))

    @property
    def counts(self) -> Tensor:
        """(B,) int64, the overlap locations of each image (N of Eq. 1)."""
        return (self.partner1 >= 0).sum(1)


def overlap_from_crops(
    offset: Tensor,
    flip1: Tensor,
    flip2: Tensor,
    valid1: Tensor,
    valid2: Tensor,
    size: tuple[int, int],
) -> Overlap:
    """Pair the feature cells of two crops of one image (Sec. 3.2), on the tensors' device.

    offset: (B, 2) integer, (top2 - top1, left2 - left1) in cells (pixels / 8).
    flip1, flip2: (B,) bool, whether the crop was flipped horizontally after it was cut.
    valid1, valid2: (B, 2) integer, the whole rows and columns of cells that lie on the image,
        counted from the top left of the crop before its flip (padding is at the bottom and right).
    size: (h, w) of the feature map.

    Raises:
        ValueError: a wrong shape or dtype.

    >>> inside, no = torch.tensor([[2, 2]]), torch.tensor([False])
    >>> overlap_from_crops(torch.tensor([[0, 1]]), no, no, inside, inside, size=(2, 2)).partner1
    tensor([[-1,  0, -1,  2]])
    """
    batch = offset.shape[0] if offset.ndim else 0
    for name, tensor, shape in (
        ("offset", offset, (batch, 2)),
        ("flip1", flip1, (batch,)),
        ("flip2", flip2, (batch,)),
        ("valid1", valid1, (batch, 2)),
        ("valid2", valid2, (batch, 2)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
        if tensor.is_floating_point():
            raise ValueError(f"{name} must hold integers or booleans, not {tensor.dtype}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be two positive numbers (h, w), not {size}")

    inside1 = _valid_cells(flip1, valid1, size)
    inside2 = _valid_cells(flip2, valid2, size)
    partner1 = _partners(offset, flip1, flip2, inside1, inside2, size)
    partner2 = _partners(-offset, flip2, flip1, inside2, inside1, size)
    return Overlap(partner1, partner2, inside1, inside2)


def _rows_and_columns(flip: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row (1, h*w) and column (B, h*w) of every cell in the crop before its flip."""
    h, w = size
    cell = torch.arange(h * w, device=flip.device).unsqueeze(0)
    row = torch.div(cell, w, rounding_mode="floor")
    column = cell - row * w
    return row, torch.where(flip.bool().unsqueeze(1), w - 1 - column, column)


def _valid_cells(flip: Tensor, valid: Tensor, size: tuple[int, int]) -> Tensor:
    row, column = _rows_and_columns(flip, size)
    return (row < valid[:, :1]) & (column < valid[:, 1:])


def _partners(
    offset: Tensor,
    flip: Tensor,
    other_flip: Tensor,
    inside: Tensor,
    other_inside: Tensor,
    size: tuple[int, int],
) -> Tensor:
    h, w = size
    row, column = _rows_and_columns(flip, size)
    row, column = row - offset[:, :1], column - offset[:, 1:]
    found = inside & (row >= 0) & (row < h) & (column >= 0) & (column < w)
    column = torch.where(other_flip.bool().unsqueeze(1), w - 1 - column, column)
    partner = torch.where(found, row * w + column, 0).long()
    found &= other_inside.gather(1, partner)
    return partner.masked_fill(~found, -1)
