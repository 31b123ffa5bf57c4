"""A 3x3 convolution of maps that were upsampled, made where they are small.

Upsampling U is linear and acts on each channel alone, the convolution acts on the channels at every
tap alone: W_t (S_t U x) = S_t U (W_t x), with S_t the shift of tap t. So the taps' channel products
are taken at low resolution, and what is done at high resolution no longer sums over the input
channels. S_t U is a small matrix for the rows times one for the columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_of_upsampled(
    x: Tensor, weight: Tensor, size: tuple[int, int] | torch.Size, align_corners: bool
) -> Tensor:
    """`F.conv2d(F.interpolate(x, size, mode="bilinear", align_corners), weight, padding=1)`.

    x: (B, C, h, w). weight: (O, C, 3, 3). size: (H, W). Returns (B, O, H, W), in channels_last
    strides; equal but for rounding. Under autocast the products are taken in its dtype.
    """
    if torch.compiler.is_exporting():  # plain operators, which know sizes of all kinds
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)
        return F.conv2d(x, weight, padding=1)
    batch, channels, h, w = x.shape
    out, _, taps, _ = weight.shape
    # One row of the product per location: (tap row, tap column, output channel).
    products = x.permute(0, 2, 3, 1) @ weight.permute(1, 2, 3, 0).reshape(channels, -1)
    products = products.view(batch, h, w, taps, -1).transpose(2, 3)
    # Locations of weight 0 fill the sums up; the transposed products are copied anyhow.
    below, right = (-n % _multiple(products) for n in (h, w))
    if below or right:
        products = F.pad(products, [0, 0, 0, right, 0, 0, 0, below])
    rows, columns = (
        _taps_of_upsampled(small, large, taps, align_corners, extra, x)
        for small, large, extra in ((h, size[0], below), (w, size[1], right))
    )
    result = rows @ products.reshape(batch, rows.shape[1], -1)
    result = columns @ result.view(batch, size[0], columns.shape[1], out)
    return result.permute(0, 3, 1, 2)


def _multiple(products: Tensor) -> int:
    """Tensor cores want sums of 16-bit values over a multiple of 8: rows of whole 16 bytes."""
    return 8 if products.is_cuda and products.element_size() == 2 else 1


@torch.no_grad()
def _taps_of_upsampled(
    small: int, large: int, taps: int, align_corners: bool, extra: int, like: Tensor
) -> Tensor:
    """(large, (small + extra) * taps): the share of each low location in what each tap meets.

    0 outside, and for the `extra` locations.
    """
    identity = torch.eye(small, dtype=like.dtype, device=like.device)[None, :, :, None]
    weights = F.interpolate(
        identity, size=(large, 1), mode="bilinear", align_corners=align_corners
    )[0, :, :, 0]
    weights = F.pad(weights, [taps // 2, taps // 2, 0, extra])
    return weights.unfold(1, taps, 1).transpose(0, 1).flatten(1)
