"""CutMix: an image with rectangles of another one of the batch, and what is known of both."""

from __future__ import annotations

import torch
from torch import Tensor

from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.progress import warn


def inside(boxes: Tensor, size: torch.Size) -> Tensor:
    """Which pixels come from the partner: bool (B, H, W) of int (B, boxes, 4).

    boxes: top, left, bottom, right, the ends open. Where several cover a pixel each inverts what
        the ones before it chose (French et al., CPS).
    """
    top, left, bottom, right = boxes.unsqueeze(3).unbind(2)
    rows, columns = (torch.arange(side, device=boxes.device) for side in size)
    rows, columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (rows.unsqueeze(3) & columns.unsqueeze(2)).sum(1) % 2 == 1


def cutmix(values: Tensor, boxes: Tensor) -> Tensor:
    """`values` (B, ...) with their partners' where `boxes`, of `inside`, is True.

    The partner of image i is i xor 1; the last one of an odd number has none.
    """
    places = torch.arange(len(values), device=values.device)
    partners = places ^ 1
    partners = partners.where(partners < len(values), places)
    return torch.where(boxes, values[partners], values)


def warn_of_unmixed(config: Config, world: World) -> None:
    """Warn of an odd number of images on a process, as one of them has no partner."""
    count = config.optim.batch_size // world.size
    if count % 2 and world.is_main:
        warn(
            f"CutMix takes the images of a process in pairs: of {count} one stays as it is; use a "
            f"--batch-size that {2 * world.size} divides"
        )
