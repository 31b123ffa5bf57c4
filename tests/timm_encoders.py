"""Three small encoders of timm with random weights, and networks on them."""

from __future__ import annotations

import functools

import pytest
import torch

from cac_fast.train.networks import Segmenter, build_network

CLASSES = 3
# Channels of the first maps at strides 4 and 8, and of the last one.
CHANNELS = {
    "resnet18": ({4: 64, 8: 128}, 512),
    "mobilenetv3_small_050": ({4: 8, 8: 16}, 288),
    "convnext_atto": ({4: 40, 8: 80}, 320),
}
every_backbone = pytest.mark.parametrize("backbone", CHANNELS)


@functools.cache
def built(network: str, backbone: str) -> Segmenter:
    """A network for the tests that do not change it, or set what they change."""
    torch.manual_seed(0)
    return build_network(network, f"timm/{backbone}", CLASSES, dropout=False)


def counters_aside(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
