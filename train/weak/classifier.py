"""A classification network on a run's backbone (paper, Sec. 3.5)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cac_fast.train.inference import STRIDE
from cac_fast.train.networks.encoder import Encoder
from cac_fast.train.networks.segmenter import initialize


class Classifier(nn.Module):
    """backbone at stride 16 -> 1x1 convolution without bias -> mean over cells.

    backbone: its last map is used. classes: how many there are, the background not counted.
    """

    def __init__(self, backbone: Encoder, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.convolution = nn.Conv2d(backbone.high_channels, classes, 1, bias=False)
        initialize(self.convolution)

    @property
    def weight(self) -> Tensor:
        """(classes, D), what the features are multiplied with."""
        return self.convolution.weight[:, :, 0, 0]

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), values in 0..255, to (B, D, ceil(H / 16), ceil(W / 16))."""
        expected = self.backbone.preprocessing
        mean, std = (
            255 * torch.tensor(values, device=images.device).view(3, 1, 1)
            for values in (expected.mean, expected.std)
        )
        return self.backbone((images.to(torch.float32) - mean) / std)[1]

    def forward(self, images: Tensor, shown: Tensor | None = None) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W), values in 0..255.

        shown: (B, H, W) bool, False on padding: cells without a True are left out of the mean.
        """
        maps = self.convolution(self.features(images))
        if shown is None:
            return maps.mean((2, 3))
        cells = F.max_pool2d(shown[:, None].to(maps.dtype), STRIDE, ceil_mode=True)
        return (maps * cells).sum((2, 3)) / cells.sum((2, 3)).clamp(min=1)


def image_tensor(image: Image.Image, device: torch.device) -> Tensor:
    """An RGB image as floats (3, H, W) in 0..255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device).float()
