"""Photometric augmentation (paper, Sec. 4.1): drawn in the loader, applied on the device.

The loader draws a row of numbers for each crop, from the crop's own generator; the changes
themselves run on the batch, in float32, where a GPU does them in passing. On a CPU this is cheaper
too than to change the crops one by one as uint8 images. Values are clamped to [0, 255] after each
change and never rounded. The formulas are those of torchvision's adjust_* functions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

CHANGES = 13
"""Numbers a crop: sigma of the blur (0: none); brightness, contrast, saturation, hue; the turn, 0
to 3, at which each of these four comes (-1: not at all); 1 for gray; and where the image is in the
crop: its height, left and right border in pixels, the rest being padding."""

_SIGMA, _AMOUNT, _TURN, _GRAY, _PLACE = 0, 1, 5, 9, slice(10, 13)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def draw_photometric(
    rng: np.random.Generator, contrast: float = 0.4, hue: float = 0.1
) -> np.ndarray:
    """Gaussian blur (5 x 5, p 0.5), color jitter (p 0.8) and gray (p 0.2): float32 (13,).

    contrast, hue: as `draw_jitter`.
    """
    changes = no_change()
    blur, jitter, gray = rng.random(3) < (0.5, 0.8, 0.2)
    sigma = rng.uniform(0.1, 2.0)
    if jitter:
        changes = draw_jitter(rng, contrast, hue)
    changes[_SIGMA], changes[_GRAY] = sigma if blur else 0, gray
    return changes


def draw_jitter(rng: np.random.Generator, contrast: float = 0.4, hue: float = 0.1) -> np.ndarray:
    """Brightness, contrast, saturation and hue in random order: float32 (13,).

    contrast: the first three are factors at most so far from 1. hue: of a full turn, at most.
    """
    changes = no_change()
    changes[_AMOUNT : _AMOUNT + 3] = [rng.uniform(1 - contrast, 1 + contrast) for _ in range(3)]
    changes[_AMOUNT + 3] = rng.uniform(-hue, hue)
    changes[_TURN + rng.permutation(4)] = range(4)
    return changes


def no_change() -> np.ndarray:
    """The row of a crop that keeps its colors, float32 (13,); the place is still to be set."""
    changes = np.zeros(CHANGES, np.float32)
    changes[_TURN : _TURN + 4] = -1
    return changes


def set_place(changes: np.ndarray, height: int, left: int, right: int) -> None:
    """Note where the image is in the crop, from the top to `height` and from `left` to `right`."""
    changes[_PLACE] = height, left, right


def apply_photometric(images: Tensor, changes: Tensor) -> Tensor:
    """Change crops in place, each in its own way; padding stays as it is.

    Args:
        images: float (B, 3, H, W) in [0, 255], on any device.
        changes: float32 (B, 13) on the CPU, rows of `draw_photometric` or `draw_jitter`. There,
            since which crops a change concerns must be known without waiting for the device.

    Returns:
        images.
    """
    height, width = images.shape[2:]
    whole = (changes[:, _PLACE] == torch.tensor([height, 0, width])).all(1)
    _apply(images, changes, whole)
    # Crops of small images one by one: blur and contrast must not see the padding.
    for row in (~whole).nonzero().flatten().tolist():
        bottom, left, right = changes[row, _PLACE].int().tolist()
        part = images[row : row + 1, :, :bottom, left:right]
        _apply(part, changes[row : row + 1], torch.tensor([True]))
    return images


def _apply(images: Tensor, changes: Tensor, rows: Tensor) -> None:
    """Change the images whose `rows`, bool (B,), is set."""
    amounts = changes.to(images.device, non_blocking=True)
    if min(images.shape[2:]) > 2:  # the border is reflected, which takes 3 pixels
        _change(images, rows & (changes[:, _SIGMA] > 0), _blur, amounts[:, _SIGMA])
    for turn in range(4):
        for kind, function in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = rows & (changes[:, _TURN + kind] == turn)
            _change(images, chosen, function, amounts[:, _AMOUNT + kind])
    _change(images, rows & (changes[:, _GRAY] > 0), _to_gray, amounts[:, _GRAY])


def _change(
    images: Tensor, chosen: Tensor, function: Callable[[Tensor, Tensor], Tensor], amounts: Tensor
) -> None:
    index = chosen.nonzero().flatten().to(images.device, non_blocking=True)
    if index.numel():
        changed = function(images.index_select(0, index), amounts.index_select(0, index))
        images.index_copy_(0, index, changed)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    steps = torch.arange(-2, 3, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (steps / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).T.view(5, -1, 1, 1, 1)
    for dim, border in ((2, (0, 0, 2, 2)), (3, (2, 2, 0, 0))):
        # No convolution: cuDNN would take TF32, and try its algorithms for every number of images.
        padded, size = pad(images, border, mode="reflect"), images.shape[dim]
        images = padded.narrow(dim, 0, size) * kernel[0]
        for step in range(1, 5):
            images.addcmul_(padded.narrow(dim, step, size), kernel[step])
    return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(images).mean((1, 2, 3), keepdim=True)
    return images.sub_(mean).mul_(factor.view(-1, 1, 1, 1)).add_(mean).clamp_(0, 255)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    gray = _luma(images)
    return images.sub_(gray).mul_(factor.view(-1, 1, 1, 1)).add_(gray).clamp_(0, 255)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` of a full turn; value and chroma stay.

    Red, green and blue follow from the hue directly: value - chroma * clamp(min(k, 4 - k), 0, 1)
    with k = (n + hue) mod 6 and n = 5, 3, 1, the hue in sixths of a turn.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    hue = hue.div_(chroma.clamp(min=1e-6)).add_(6 * shift.view(-1, 1, 1))
    for channel, n in zip((red, green, blue), (5, 3, 1), strict=True):
        k = torch.remainder(hue + n, 6)
        torch.sub(value, torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma), out=channel)
    return images


def _to_gray(images: Tensor, _: Tensor) -> Tensor:
    return _luma(images).expand_as(images)


def _luma(images: Tensor) -> Tensor:
    red, green, blue = (
        weight * plane for weight, plane in zip(_LUMA, images.split(1, dim=1), strict=True)
    )
    return red.add_(green).add_(blue)
