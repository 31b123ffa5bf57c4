"""Segmentation networks: three heads on five backbones."""

from __future__ import annotations

from cac_fast.train.errors import InputError
from cac_fast.train.networks.backbones import BACKBONES, build_backbone
from cac_fast.train.networks.deeplabv3plus import DeepLabV3PlusHead
from cac_fast.train.networks.lraspp import LRASPPHead
from cac_fast.train.networks.pspnet import PSPHead
from cac_fast.train.networks.recompute import in_slices
from cac_fast.train.networks.segmenter import Segmenter, freeze_batch_norm, upsample_logits
from cac_fast.train.networks.sync_batch_norm import synchronize_batch_norm
from cac_fast.train.networks.weights import WeightsReport, load_backbone_weights

NETWORKS = ("deeplabv3plus", "lraspp", "pspnet")

__all__ = [
    "BACKBONES",
    "NETWORKS",
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
    """Build a network (one of NETWORKS) on a backbone (one of BACKBONES) with random weights.

    dropout: DeepLabv3+ with 0.5 after ASPP and in the decoder and 0.1 before the classifier, or
    without any. LR-ASPP and PSPNet have none. The weight names do not depend on it.

    Raises InputError for an unknown name.
    """
    if network == "deeplabv3plus":
        encoder = build_backbone(backbone, output_stride=16, low_stride=4)
        head = DeepLabV3PlusHead(
            encoder.low_channels, encoder.high_channels, dropout=0.5 if dropout else 0.0
        )
        return Segmenter(encoder, head, num_classes, dropout=0.1 if dropout else 0.0)
    if network == "lraspp":
        encoder = build_backbone(backbone, output_stride=16, low_stride=8)
        head = LRASPPHead(encoder.low_channels, encoder.high_channels)
        return Segmenter(encoder, head, num_classes, dropout=0.0)
    if network == "pspnet":
        encoder = build_backbone(backbone, output_stride=8, low_stride=4)
        return Segmenter(encoder, PSPHead(encoder.high_channels), num_classes, dropout=0.0)
    raise InputError(f"unknown network '{network}': choose one of {', '.join(NETWORKS)}")
