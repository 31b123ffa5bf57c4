"""Tables 1 to 5 of the paper as data: its numbers, and the settings of the runs behind them.

mIoU in percent on val at original size and one scale. Tables 1, 2 and 5: mean of three runs, in 1
and 2 over three data lists; Tables 3 and 4: one data list.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Settings = Mapping[str, Any]
"""Settings of `train/main.py` by their flat names."""
_NONE: Settings = MappingProxyType({})


class Row(NamedTuple):
    """A row of a table.

    values: the paper's mIoU, one a column; None where it has none.
    method: of the registry; None: only the paper's number is known.
    network: settings that the options of a call replace, and the data's preset where all rows of
        the table have the same.
    own: settings that make the row what it is; nothing replaces them.
    """

    name: str
    values: tuple[float | None, ...]
    method: str | None
    network: Settings = _NONE
    own: Settings = _NONE


class Table(NamedTuple):
    """A table of the paper.

    dataset: the paper's. shares: labeled share of each column. list_by_seed: whether each seed has
    a data list of its own. weakly: columns that train with image-level labels. joins: networks
    with which the registry's methods beyond the paper's take part. notes: what a reader must know.
    """

    caption: str
    dataset: str
    columns: tuple[str, ...]
    shares: tuple[str, ...]
    rows: tuple[Row, ...]
    list_by_seed: bool = False
    weakly: frozenset[str] = frozenset()
    joins: Mapping[str, Settings] = _NONE
    notes: tuple[str, ...] = ()


PSPNET: Settings = {"network": "pspnet", "backbone": "resnet50"}
PSPNET_VGG: Settings = {"network": "pspnet", "backbone": "vgg16"}
DEEPLAB: Settings = {"network": "deeplabv3plus", "backbone": "resnet50"}
DEEPLAB_101: Settings = {"network": "deeplabv3plus", "backbone": "resnet101"}

BOTH: Settings = {
    "batch_size": 8,
    "head_learning_rate_factor": 10.0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "poly_power": 0.9,
    "sync_bn": True,
    "freeze_bn": False,
    "dropout": True,
    "iterations": 92_560,
    "labeled_scale": (0.5, 2.0),
    "jitter_labeled": False,
}
"""What the paper does on both data sets, with every method (Sec. 4.1)."""

VOC: Settings = {**BOTH, "crop_size": 320, "learning_rate": 0.001}
CITYSCAPES: Settings = {**BOTH, "crop_size": 720, "learning_rate": 0.01}

CAC: Settings = {
    "dc_weight": 0.1,
    "temperature": 0.1,
    "threshold": 0.75,
    "normalization": "image",
    "forward": "separate",
    "averaged_labels": False,
    "max_negatives": None,
    "dc_ramp": 0,
    "unlabeled_scale": (0.8, 2.0),
    "iou_range": (0.1, 1.0),
    "projector": True,
    "context": True,
    "contrastive": True,
    "directional": True,
    "negative_sampling": True,
    "positive_filtering": True,
}
"""What it does beyond that in CAC."""

NEGATIVES: Mapping[str, Settings] = {
    "voc": {"negatives_per_view": 6400, "bank_past_steps": 1},
    "cityscapes": {"negatives_per_view": 16_200, "bank_past_steps": 0},
}
"""Negatives a view and GPU and the past steps kept, of the authors' code, by data set."""

PAPER: Mapping[str, Settings] = {"voc": VOC, "cityscapes": CITYSCAPES}
GPUS: Mapping[str, int] = {"voc": 2, "cityscapes": 4}

_TAUGHT = "self_training: the iterations are its student's, those of its teacher come on top."
_ECS = (
    "ECS's authors published neither code nor settings: our runs of it are a reading of its paper, "
    "not their program."
)

_TABLE1 = Table(
    "Table 1: comparison on PASCAL VOC",
    "voc",
    ("1/16", "1/8", "1/4", "full"),
    ("1/16", "1/8", "1/4", "full"),
    (
        Row("SupOnly PSPNet R50", (57.4, 65.0, 68.3, 75.1), "supervised", PSPNET),
        Row("CCT PSPNet R50", (62.2, 68.8, 71.2, 75.3), "cct", PSPNET),
        Row("CAC PSPNet R50", (67.1, 71.3, 72.5, 76.4), "cac", PSPNET),
        Row("SupOnly DeepLabv3+ R50", (63.9, 68.3, 71.2, 76.3), "supervised", DEEPLAB),
        Row("ECS DeepLabv3+ R50", (None, 70.2, 72.6, 76.3), "ecs", DEEPLAB),
        Row("CAC DeepLabv3+ R50", (70.1, 72.4, 74.0, 76.5), "cac", DEEPLAB),
        Row("SupOnly DeepLabv3+ R101", (66.4, 71.0, 73.5, 77.7), "supervised", DEEPLAB_101),
        Row("S4GAN DeepLabv3+ R101", (69.1, 72.4, 74.5, 77.3), "s4gan", DEEPLAB_101),
        Row("GCT DeepLabv3+ R101", (67.2, 72.5, 75.1, 77.5), "gct", DEEPLAB_101),
        Row("CAC DeepLabv3+ R101", (72.4, 74.6, 76.3, 78.2), "cac", DEEPLAB_101),
    ),
    list_by_seed=True,
    joins={"PSPNet R50": PSPNET, "DeepLabv3+ R50": DEEPLAB, "DeepLabv3+ R101": DEEPLAB_101},
    notes=(
        "The paper's lists are CAC's three (662, 1323, 2645 masks). CCT, S4GAN and GCT were "
        "trained anew by its authors on the same lists; ECS's numbers are those of its own paper, "
        "with other lists.",
        "full: the unlabeled images are the labeled ones.",
        _TAUGHT,
        _ECS,
    ),
)

_TABLE2 = Table(
    "Table 2: comparison on Cityscapes",
    "cityscapes",
    ("1/8", "1/4", "full"),
    ("1/8", "1/4", "full"),
    (
        Row("SupOnly DeepLabv3+ R50", (66.0, 70.7, 77.7), "supervised", DEEPLAB),
        Row("CAC DeepLabv3+ R50", (69.7, 72.7, 77.5), "cac", DEEPLAB),
    ),
    list_by_seed=True,
    joins={"DeepLabv3+ R50": DEEPLAB},
    notes=(
        "The paper's lists are CAC's three (372, 744 masks).",
        "full: the unlabeled images are the labeled ones.",
        _TAUGHT,
        _ECS,
    ),
)

_EVERY_SWITCH = (
    "projector",
    "context",
    "contrastive",
    "directional",
    "negative_sampling",
    "positive_filtering",
)


def _ablation(name: str, value: float, *off: str) -> Row:
    switches = {switch: switch not in off for switch in _EVERY_SWITCH}
    return Row(name, (value,), "cac", PSPNET, switches)


_NS_PF = "negative_sampling", "positive_filtering"

_TABLE3 = Table(
    "Table 3: ablation study",
    "voc",
    ("mIoU",),
    ("1/8",),
    (
        Row("SupOnly", (64.7,), "supervised", PSPNET),
        Row("ST", (66.3,), "self_training", PSPNET),
        _ablation("I", 64.2, "contrastive", "directional", *_NS_PF),
        _ablation("II", 56.4, "directional", *_NS_PF),
        _ablation("III", 64.8, *_NS_PF),
        _ablation("IV", 71.6, "positive_filtering"),
        _ablation("V", 71.2, "directional"),
        _ablation("VI", 70.5, "context"),
        _ablation("VII", 61.5, "projector"),
        _ablation("VIII", 72.4),
    ),
    notes=(
        "The paper states no settings of ST, it refers to Zoph et al. Ours: the labels come from "
        "the last state of SupOnly with the same seed, once, from whole images at one scale and "
        "without a threshold; the student sees their images in strong colors without cutout, and "
        "their loss weighs as much as that of the masks. ST's iterations come on top of its "
        "teacher's.",
        "The paper's VIII has the number of 19.2k in Table 4. The authors' public settings, which "
        "VIII has here on VOC, are 25.6k if past steps count.",
    ),
)


def _negatives(name: str, value: float, per_view: int, past: int) -> Row:
    own = {"negatives_per_view": per_view, "bank_past_steps": past}
    return Row(name, (value,), "cac", PSPNET, own)


_TABLE4 = Table(
    "Table 4: number of negatives per GPU",
    "voc",
    ("mIoU",),
    ("1/8",),
    (
        _negatives("500", 70.9, 250, 0),
        _negatives("1k", 71.0, 500, 0),
        _negatives("2k", 71.7, 1000, 0),
        _negatives("6.4k", 71.3, 3200, 0),
        _negatives("12.8k", 71.9, 6400, 0),
        _negatives("19.2k", 72.4, 4800, 1),
        _negatives("25.6k", 71.9, 6400, 1),
    ),
    notes=(
        "Read as 2 n (1 + p) negatives: n a view (--negatives-per-view), p past steps "
        "(--bank-past-steps). The paper does not say whether past steps count.",
        "The paper, from 500 to 19.2k on two RTX 2080 Ti: 0.96 s to 1.18 s an iteration, 800 MB "
        "more a GPU.",
    ),
)

_TABLE5 = Table(
    "Table 5: with image-level labels",
    "voc",
    ("semi", "weakly"),
    ("1/8", "1/8"),
    (
        Row("WSSN VGG-16", (None, 64.6), None),
        Row("GAIN VGG-16", (None, 60.5), None),
        Row("MDC VGG-16", (None, 65.7), None),
        Row("DSRG VGG-16", (None, 64.3), None),
        Row("Souly et al. VGG-16", (64.1, 65.8), None),
        Row("FickleNet R101", (None, 65.8), None),
        Row("CCT R50", (69.4, 73.2), None),
        Row("CCT R50 (rerun)", (72.8, 74.6), None),
        Row("CAC VGG-16", (68.7, 69.3), "cac", PSPNET_VGG),
        Row("CAC R50", (74.5, 76.1), "cac", PSPNET),
    ),
    weakly=frozenset({"weakly"}),
    notes=(
        "The paper: 1,464 masks; semi: 9,118 images without labels; weakly: the same with "
        "image-level labels.",
        "VGG-16: PSPNet, our choice, as the paper names no head.",
        "The pseudo masks come from CAM without a CRF, so they are coarser than the paper's.",
    ),
)

TABLES: Mapping[int, Table] = {1: _TABLE1, 2: _TABLE2, 3: _TABLE3, 4: _TABLE4, 5: _TABLE5}
