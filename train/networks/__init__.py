"""Segmentation networks: a head on a backbone, one file a head."""

from __future__ import annotations

from cac_fast.train.errors import InputError
from cac_fast.train.networks.recompute import in_slices
from cac_fast.train.networks.segmenter import Segmenter, freeze_batch_norm, upsample_logits
from cac_fast.train.networks.sync_batch_norm import synchronize_batch_norm
from cac_fast.train.networks.weights import WeightsReport, load_backbone_weights
from cac_fast.train.registry import NETWORKS

__all__ = [
    "Segmenter",
    "WeightsReport",
    "build_network",
    "freeze_batch_norm",
    "in_slices",
    "load_backbone_weights",
    "synchronize_batch_norm",
    "upsample_logits",
]


def build_network(network: str, backbone: str, num_classes: int, dropout: bool = True) -> Segmenter:
    """Build a network on a backbone, both by their names in the registry, with random weights.

    dropout: whether the network has the dropout that it is published with. The weight names do not
    depend on it.

    Raises:
        InputError: an unknown name, or code outside the project that returns something else.
    """
    built = NETWORKS.load(network)(backbone, num_classes, dropout)
    if not isinstance(built, Segmenter):
        raise InputError(
            f"--network {network}: it returns a {type(built).__name__}, not a Segmenter"
        )
    return built
