"""Class activation maps and pseudo masks of them, as functions of tensors (paper, Sec. 3.5).

As in CCT, which the paper refers to, but without its dense CRF: masks are coarser than the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cac_fast.train.data.images import IGNORE
from cac_fast.train.inference import MIN_INPUT_SIDE, STRIDE

EPSILON = 1e-5
"""Added to a class's maximum, by which its map is divided."""

SCALES = (1.0, 0.5, 1.5, 2.0)
FOREGROUND, BACKGROUND = 0.30, 0.05


def responses(features: Tensor, weight: Tensor) -> Tensor:
    """R, (B, C, h, w): where `features` (B, D, h, w) speak for the C classes of `weight` (C, D)."""
    return F.conv2d(features, weight[:, :, None, None]).relu()


def scaled(image: Tensor, scale: float) -> Tensor:
    """An image (B, 3, H, W) of floats in 0..255 at `scale`, bicubic, still in 0..255.

    Sides become the multiples of 16, at least 32, that are nearest: every cell of the features lies
    wholly on the image, and a mirrored one has the cells of the other.
    """
    sides = (int(side * scale / STRIDE + 0.5) * STRIDE for side in image.shape[-2:])
    size = tuple(max(MIN_INPUT_SIDE, side) for side in sides)
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 255)


def activation_sum(
    features: Callable[[Tensor], Tensor], weight: Tensor, image: Tensor, scales: Sequence[float]
) -> Tensor:
    """Q, (C, H, W): the responses to an image at all scales, each also mirrored, summed.

    Args:
        features: maps (B, 3, h, w), values in 0..255, to features (B, D, h / 16, w / 16).
        weight: (C, D), of the classes that are asked for.
        image: (3, H, W) floats in 0..255.
    """
    size = image.shape[-2:]
    total = image.new_zeros(len(weight), *size)
    for scale in scales:
        view = scaled(image[None], scale)
        straight, mirrored = responses(features(torch.cat([view, view.flip(-1)])), weight)
        both = straight + mirrored.flip(-1)
        total += F.interpolate(both[None], size, mode="bilinear", align_corners=False)[0]
    return total


def normalized(sums: Tensor) -> Tensor:
    """M, (C, H, W): each class's Q over its maximum, so in [0, 1); all zero stays zero."""
    return sums / (sums.amax((1, 2), keepdim=True) + EPSILON)


def pseudo_mask(
    maps: Tensor,
    classes: Sequence[int],
    background_class: int | None,
    foreground: float = FOREGROUND,
    background: float = BACKGROUND,
) -> Tensor:
    """Class ids (H, W) uint8 of M.

    The largest m of a pixel decides: above `foreground` it is that class (of equal ones the first),
    up to `background` the background, and between them 255. In data that has no background it is
    255 up to `foreground`.

    Args:
        maps: (C, H, W) of the classes that are in the image, C = 0 too.
        classes: their C ids, in rising order.
        background_class: the id of the background, None where the data has none.
    """
    if not len(maps):
        maps, classes = maps.new_zeros(1, *maps.shape[1:]), [IGNORE]
    strength, index = maps.max(0)
    ids = torch.tensor(classes, dtype=torch.uint8, device=maps.device)[index]
    # Compared in the maps' own precision, not in Python's.
    low, high = maps.new_tensor(background), maps.new_tensor(foreground)
    rest = torch.full_like(ids, IGNORE)
    if background_class is not None:
        rest[strength <= low] = background_class
    return torch.where(strength > high, ids, rest)
