"""Every setting of a run, declared once: its default, its meaning, and what it may be."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cac_fast.backend import BACKENDS
from cac_fast.train.options import DEVICES
from cac_fast.train.registry import BACKBONES, LAYOUTS, METHODS, NETWORKS, Registry


class Check(NamedTuple):
    """What a value must be, and what is said of one that is not."""

    holds: Callable[[Any], bool]
    complaint: str


POSITIVE = Check(lambda value: value > 0, "must be positive")
NOT_NEGATIVE = Check(lambda value: value >= 0, "must not be negative")
BELOW_1 = Check(lambda value: value < 1, "must be below 1")
BELOW_2_32 = Check(lambda value: value < 2**32, "must be below 2**32")
AT_MOST_2 = Check(lambda value: value <= 2, "must be 0, 1 or 2")
CONFIDENCE = Check(lambda value: value <= 1, "a confidence is at most 1")
POSITIVE_RANGE = Check(
    lambda ends: 0 < ends[0] <= ends[1], "give two positive numbers, lower first"
)
IOU_RANGE = Check(lambda ends: ends[1] <= 1, "an IoU is at most 1")


def setting(
    default: Any, text: str, *checks: Check, choices: Sequence[str] | Registry | None = None
) -> Any:
    """A field of a group of settings with its help text; a value of None is not checked."""
    metadata = {"help": text, "checks": checks, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataSettings:
    """What to train on, and how it is cropped (paper, Sec. 4.1)."""

    dataset: str = setting("", "data layout, always needed", choices=LAYOUTS)
    data_dir: str | None = setting(None, "the data's folder (not needed for toycity)")
    labeled: str | None = setting(None, "list of labeled images")
    unlabeled: str | None = setting(
        None, "list of unlabeled images (default: the rest of the train split)"
    )
    labeled_share: str | None = setting(
        None, "without lists: this share of the masks is used, as 1/16, or full"
    )
    pseudo_labels: str | None = setting(
        None,
        "cac, self_training: folder of pseudo masks, NAME.png of class ids for unlabeled images, "
        "255 where no label is known",
    )
    teacher: str | None = setting(
        None, "self_training: a run, whose last.pt labels the unlabeled images once"
    )
    data_list: int = setting(0, "seed of the derived labeled share", NOT_NEGATIVE)
    workers: int = setting(
        2, "loader processes per loader and rank; 0 loads in the training process", NOT_NEGATIVE
    )
    cache: str | None = setting(
        None, "folder for decoded images, written once: the loader then decodes no file"
    )
    crop_size: int = setting(320, "side of the square crops in pixels, a multiple of 8")
    labeled_scale: tuple[float, float] = setting(
        (0.5, 2.0), "range of the random resize of labeled images, as 0.5,2.0", POSITIVE_RANGE
    )
    unlabeled_scale: tuple[float, float] = setting(
        (0.8, 2.0), "range of the random resize of unlabeled images, as 0.8,2.0", POSITIVE_RANGE
    )
    base_size: int | None = setting(
        None,
        "as the authors: the scales are multiples of this long side in pixels (default: of the "
        "image's own size)",
        POSITIVE,
    )
    iou_range: tuple[float, float] = setting(
        (0.1, 1.0), "bounds of the IoU of the two crops, as 0.1,1.0", POSITIVE_RANGE, IOU_RANGE
    )
    jitter_labeled: bool = setting(False, "authors, Cityscapes: color jitter of labeled crops too")


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    network: str = setting("deeplabv3plus", "segmentation network", choices=NETWORKS)
    backbone: str = setting("resnet50", "backbone", choices=BACKBONES)
    weights: str | None = setting(
        None,
        "torchvision's or timm's file for the backbone, a run of this program, or timm: what timm "
        "fetches (default: random)",
    )
    dropout: bool = setting(True, "the networks' dropout")
    channels_last: bool = setting(
        True, "channels_last memory format (on CPUs only for lraspp on a MobileNet)"
    )
    compile: bool = setting(False, "compile the network for training (torch.compile)")
    checkpoint_activations: bool = setting(
        False, "less memory: the network's blocks are computed again in the backward pass"
    )


@dataclass(frozen=True)
class OptimizationSettings:
    """The steps (paper, Sec. 4.1)."""

    iterations: int = setting(20_000, "optimizer steps", POSITIVE)
    batch_size: int = setting(
        8, "labeled images a step over all processes; as many unlabeled ones are drawn", POSITIVE
    )
    accumulate: int = setting(
        1, "less memory: the network sees the batch in this many slices, computed twice", POSITIVE
    )
    precision: str = setting(
        "auto",
        "autocast type; auto: bf16 on GPUs that have it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    learning_rate: float = setting(0.002, "base learning rate of the backbone", POSITIVE)
    head_learning_rate_factor: float = setting(
        10.0, "learning rate of the rest, as a multiple of the backbone's", POSITIVE
    )
    momentum: float = setting(0.9, "SGD momentum", NOT_NEGATIVE, BELOW_1)
    weight_decay: float = setting(1e-4, "SGD weight decay", NOT_NEGATIVE)
    poly_power: float = setting(0.9, "power of the poly schedule", NOT_NEGATIVE)
    sync_bn: bool = setting(True, "batch statistics over all processes")
    freeze_bn: bool = setting(False, "batch norm keeps its running statistics, in training too")


@dataclass(frozen=True)
class LossSettings:
    """The method and its loss (paper, Sec. 3.3 and 3.4); the ablations are those of Table 3."""

    method: str = setting("cac", "training method", choices=METHODS)
    forward: str = setting(
        "separate",
        "separate (authors): labeled images and both views have batch statistics of their own; "
        "joint: one pass over all",
        choices=("separate", "joint"),
    )
    dc_weight: float = setting(0.1, "lambda, the weight of the contrastive loss", NOT_NEGATIVE)
    warmup: int | None = setting(
        None, "iterations with the supervised loss alone (default: 1/16 of all)", NOT_NEGATIVE
    )
    dc_ramp: int = setting(
        0, "iterations after the warm-up in which lambda rises from 0 to --dc-weight", NOT_NEGATIVE
    )
    averaged_labels: bool = setting(
        False,
        "cac: confidence and pseudo labels of the crops from an averaged copy of the network, in "
        "evaluation mode (--ema-decay)",
    )
    unlabeled_dropout: bool = setting(
        True, "cac: the network's dropout in the passes of the unlabeled crops (authors: on)"
    )
    temperature: float = setting(0.1, "tau, by which the loss divides cosines")
    threshold: float = setting(
        0.75, "gamma, confidence that a positive must exceed", NOT_NEGATIVE, CONFIDENCE
    )
    normalization: str = setting(
        "image",
        "image (paper): 1/N per image; active (authors): by the number of active pixels",
        choices=("image", "active"),
    )
    negatives_per_view: int | None = setting(
        None,
        "authors: this many random negatives per view and process (default, paper: all)",
        POSITIVE,
    )
    max_negatives: int | None = setting(
        None,
        "draw this many of the M negatives at random and let each count for M / N (default: all)",
        POSITIVE,
    )
    bank_past_steps: int = setting(
        0, "past steps whose negatives are kept besides the current one's", NOT_NEGATIVE
    )
    projector: bool = setting(
        True, "ablation Proj: the projector between features and loss (off: none)"
    )
    context: bool = setting(True, "ablation Context: two different crops (off: identical boxes)")
    contrastive: bool = setting(
        True, "ablation CL: the contrastive loss (off: l2 between positives)"
    )
    directional: bool = setting(
        True, "ablation Dir: only the less confident side learns (off: both)"
    )
    negative_sampling: bool = setting(
        True, "ablation NS: negatives of other pseudo labels only (off: every other location)"
    )
    positive_filtering: bool = setting(
        True, "ablation PF: positives above the threshold only (off: gamma = 0)"
    )
    dc_backend: str = setting(
        "auto",
        "back end of the loss: auto (the first of a fixed order that is right here), "
        + ", ".join(f"{name} ({entry.help})" for name, entry in BACKENDS.items()),
        choices=("auto", *BACKENDS),
    )
    false_negatives: bool = setting(
        False, "measure the share of false negatives (Fig. 6); reads the unlabeled images' masks"
    )
    unsupervised_weight: float = setting(
        1.0,
        "weight of the unlabeled images' loss in every method but cac, self_training, supervised",
        NOT_NEGATIVE,
    )
    confidence: float = setting(
        0.95,
        "fixmatch, --teacher: confidence that a pseudo label needs; s4gan: that the discriminator "
        "needs of an image; above 1: none has it",
        NOT_NEGATIVE,
    )
    ema_decay: float = setting(
        0.996,
        "fixmatch, mean_teacher and --averaged-labels: share that the averaged network keeps in a "
        "step; 0: it is the network itself",
        NOT_NEGATIVE,
        BELOW_1,
    )
    strong_views: int = setting(
        1,
        "fixmatch: strong views of an image; UniMatch: 2. mean_teacher: whether the student sees "
        "one: 0 or 1",
        NOT_NEGATIVE,
        AT_MOST_2,
    )
    pseudo_loss_weight: float = setting(
        1.0, "self_training: alpha, the weight of the loss by pseudo labels", NOT_NEGATIVE
    )
    normalize_pseudo_loss: bool = setting(
        False,
        "self_training: bring the loss by pseudo labels to the size of the other (Zoph et al.)",
    )
    feature_dropout: str = setting(
        "none",
        "fixmatch: channel (UniMatch V1): the weak view once more, with channels dropped; "
        "complementary (V2): each of two strong views lacks the channels that the other one has",
        choices=("none", "channel", "complementary"),
    )
    cutmix: bool = setting(False, "cps: mix the unlabeled images in pairs (CutMix)")
    auxiliary_heads: int = setting(
        2, "cct: auxiliary classifiers for each kind of perturbation", POSITIVE
    )
    discriminator_learning_rate: float = setting(
        1e-4, "s4gan, gct, ecs: Adam's rate for the network that judges predictions", POSITIVE
    )


@dataclass(frozen=True)
class RunSettings:
    """Where and how it runs, and what it leaves."""

    output: str | None = setting(None, "run folder (default: runs/ and a name made of the choices)")
    seed: int = setting(0, "seed of everything random", NOT_NEGATIVE, BELOW_2_32)
    device: str = setting("auto", "where to train", choices=DEVICES)
    deterministic: bool = setting(False, "deterministic algorithms only")
    restart: bool = setting(False, "start over even if the run folder holds a run")
    eval_every: int | None = setting(
        None, "iterations between evaluations (default: a tenth of the run)", POSITIVE
    )
    save_every: int = setting(500, "iterations between checkpoints", POSITIVE)
    log_every: int = setting(20, "iterations between lines of metrics.jsonl", POSITIVE)
    profile: int | None = setting(
        None, "profile this many steps: shares of time, and trace.json in the run folder", POSITIVE
    )


@dataclass(frozen=True)
class Config:
    """The settings of a run, in groups; `python train/main.py --help` gives each one's meaning.

    Flags, TOML files, `config.json` and checkpoints name a setting without its group.
    """

    data: DataSettings
    model: ModelSettings
    optim: OptimizationSettings
    loss: LossSettings
    run: RunSettings

    @classmethod
    def of(cls, **values: Any) -> Config:
        """The settings `values`, by their flat names, and the defaults of all others."""
        groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for name, value in values.items():
            groups[GROUP_OF[name]][name] = value
        return cls(**{group: GROUPS[group](**given) for group, given in groups.items()})

    def flat(self) -> dict[str, Any]:
        """All settings by their flat names."""
        return {
            name: value for group in GROUPS for name, value in vars(getattr(self, group)).items()
        }

    def changed(self, **values: Any) -> Config:
        """The same settings but for `values`, by their flat names."""
        return Config.of(**self.flat() | values)

    @property
    def num_warmup(self) -> int:
        """Iterations before unlabeled images take part."""
        return self.optim.iterations // 16 if self.loss.warmup is None else self.loss.warmup

    @property
    def num_eval_every(self) -> int:
        """Iterations between evaluations."""
        tenth = max(1, self.optim.iterations // 10)
        return tenth if self.run.eval_every is None else self.run.eval_every

    @property
    def run_folder(self) -> Path:
        """The folder that holds the run."""
        if self.run.output is not None:
            return Path(self.run.output)
        share = (self.data.labeled_share or "all").replace("/", "_")
        if self.data.labeled is not None:
            share = f"{Path(self.data.labeled).parent.name}_{Path(self.data.labeled).stem}"
        model = self.model
        names = f"{self.data.dataset}-{self.loss.method}-{model.network}-{model.backbone}"
        numbers = f"list{self.data.data_list}-seed{self.run.seed}"
        return Path("runs") / f"{re.sub('[:/]', '_', names)}-{share}-{numbers}"


GROUPS = typing.get_type_hints(Config)
FIELDS = {field.name: field for group in GROUPS.values() for field in dataclasses.fields(group)}
GROUP_OF = {
    field.name: name for name, group in GROUPS.items() for field in dataclasses.fields(group)
}
TYPES = {
    name: kind for group in GROUPS.values() for name, kind in typing.get_type_hints(group).items()
}
