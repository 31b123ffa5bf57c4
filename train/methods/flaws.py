"""Where a prediction is flawed: the truth that GCT's flaw detector learns, and what is made of its
answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DETECTOR = ((64, 2), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (1, 2))
"""Channels and strides of the flaw detector's convolutions."""

FLAWED = 0.6
"""A flaw above it is one that the network cannot mend by itself."""

NO_FLAW = 0.1
"""An image whose largest answer is not above it has no flaw."""


@torch.no_grad()
def true_flaws(predicted: Tensor, labels: Tensor) -> Tensor:
    """In [0, 1], (B, H, W): where the probabilities (B, K, H, W) miss the labels, blurred.

    labels: uint8 (B, H, W), 255 where none is known; there, and in a perfect image, it is 0.
    """
    known, side = labels != 255, labels.shape[-1]
    own = predicted.gather(1, (labels * known).long().unsqueeze(1)).squeeze(1)
    # Half the distance of the probabilities from the one-hot label.
    flaws = blurred(1 - own, known, odd(side // 8))
    widened = F.max_pool2d(flaws * known, 3, stride=1, padding=1)
    return stretched(blurred(widened, known, odd(side // 4)), known)


@torch.no_grad()
def found_flaws(answer: Tensor, valid: Tensor) -> Tensor:
    """In [0, 1], (B, H, W): the detector's answer (B, H, W), smoothed; 0 where `valid` is False."""
    flaws = blurred(answer.clamp(min=0), valid, odd(answer.shape[-1] // 16))
    largest = (flaws * valid).amax((1, 2), keepdim=True)
    return stretched(flaws, valid) * (largest > NO_FLAW)


def stretched(flaws: Tensor, valid: Tensor) -> Tensor:
    """Maps (B, H, W) from their least to their largest valid value, as 0 to 1; else 0."""
    low = flaws.masked_fill(~valid, torch.inf).amin((1, 2), keepdim=True)
    high = flaws.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True)
    # Of a flat map the rounding of float32 would be stretched.
    return ((flaws - low) / (high - low + 1e-6)).where(valid, 0)


def blurred(maps: Tensor, valid: Tensor, size: int) -> Tensor:
    """Gaussian means of maps (B, H, W), fp32 at least, over the valid pixels of an odd window.

    The borders reflect. 0 where the window has no valid pixel.
    """
    kernel, pad = gaussian(size, maps), size // 2
    with torch.autocast(maps.device.type, enabled=False):
        both = torch.cat((maps * valid, valid.to(maps)))
        padded = F.pad(both.unsqueeze(1), (pad, pad, pad, pad), mode="reflect")
        rows = F.conv2d(padded, kernel.view(1, 1, 1, size))
        sums, weights = F.conv2d(rows, kernel.view(1, 1, size, 1)).squeeze(1).chunk(2)
    return sums / weights.where(weights > 0, 1)


def gaussian(size: int, like: Tensor) -> Tensor:
    """Weights (size,) that sum to 1; the standard deviation follows from the size, as in OpenCV."""
    deviation = 0.3 * ((size - 1) / 2 - 1) + 0.8
    places = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    weights = torch.exp(-0.5 * (places / deviation) ** 2)
    return weights / weights.sum()


def odd(size: int) -> int:
    """The size, or the next one where it is even."""
    return size | 1
