"""A network as a graph of its own: raw images of any size in, logits or class ids out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cac_fast.train.inference import MIN_INPUT_SIDE, Predictor


class Exportable(nn.Module):
    """A predictor's network with all that is around it, for `torch.export` with free sizes.

    `forward` takes RGB images (B, 3, H, W) uint8 of one size. It returns what `Predictor.logits`
    and `Predictor.predict` make of each: logits (B, K, H, W) float32 (`result` "logits") or class
    ids (B, H, W) uint8, above 255 classes int32 ("labels").
    """

    mean: Tensor
    std: Tensor

    def __init__(self, predictor: Predictor, result: str) -> None:
        super().__init__()
        self.network, self.multiple, self.result = predictor.network, predictor.multiple, result
        self.dtype = torch.uint8 if len(predictor.classes) <= 255 else torch.int32
        self.register_buffer("mean", predictor.mean)
        self.register_buffer("std", predictor.std)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        x = image.index_select(2, self._mirrored(height)).index_select(3, self._mirrored(width))
        x = self.network((x.float() / 255 - self.mean) / self.std)
        # Brackets would ask whether there is padding, and so take either such sizes or the others.
        x = x.index_select(2, torch.arange(height)).index_select(3, torch.arange(width))
        return x if self.result == "logits" else x.argmax(1).to(self.dtype)

    def _mirrored(self, length: int) -> Tensor:
        """As `pad_image`: for each row or column of the padded image the one that it shows."""
        padded = (length + self.multiple - 1) // self.multiple * self.multiple
        places = torch.arange(torch.sym_max(padded, MIN_INPUT_SIDE))
        return torch.where(places < length, places, (2 * length - 2 - places).clamp(min=0))


class PoolByProducts(nn.Module):
    """`nn.AdaptiveAvgPool2d(bins)` by one matrix for the rows and one for the columns.

    ONNX has no such pool, and one of fixed windows is wrong where `bins` does not divide a side.
    """

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        if self.bins == 1:
            return x.mean((2, 3), keepdim=True)
        rows, columns = (self._shares(length, x) for length in x.shape[-2:])
        return rows @ x @ columns.T

    def _shares(self, length: int, like: Tensor) -> Tensor:
        """(bins, length): what each row or column is of the mean of each bin."""
        first = torch.arange(self.bins) * length // self.bins
        end = ((torch.arange(self.bins) + 1) * length + self.bins - 1) // self.bins
        places, first, end = torch.arange(length), first[:, None], end[:, None]
        return ((places >= first) & (places < end)).to(like.dtype) / (end - first).to(like.dtype)


def pool_by_products(module: nn.Module) -> None:
    """Put `PoolByProducts` in the place of every adaptive mean of `module`."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(parent, name, PoolByProducts(child.output_size))
