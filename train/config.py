"""Every setting of a run: one dataclass, read from defaults, a TOML file, ``--set`` and flags."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cac_fast.backend import BACKENDS
from cac_fast.checks import check_temperature
from cac_fast.train.errors import InputError
from cac_fast.train.options import Parser


def setting(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field of :class:`Config` with its help text."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class DataSettings:
    """What to train on, and how it is cropped (paper, Sec. 4.1)."""

    dataset: str = setting("", "data layout", ("cityscapes", "voc", "folder", "toycity"))
    data_dir: str | None = setting(None, "the data's folder (not needed for toycity)")
    labeled: str | None = setting(None, "list of labeled images")
    unlabeled: str | None = setting(
        None, "list of unlabeled images (default: the rest of the train split)"
    )
    labeled_share: str | None = setting(
        None, "without lists: this share of the masks is used, as 1/16, or full"
    )
    data_list: int = setting(0, "seed of the derived labeled share")
    workers: int = setting(
        2, "loader processes per loader and rank; 0 loads in the training process"
    )
    cache: str | None = setting(
        None, "folder for decoded images, written once: the loader then decodes no file"
    )
    crop_size: int = setting(320, "side of the square crops in pixels, a multiple of 8")
    labeled_scale: tuple[float, float] = setting(
        (0.5, 2.0), "range of the random resize of labeled images"
    )
    unlabeled_scale: tuple[float, float] = setting(
        (0.8, 2.0), "range of the random resize of unlabeled images"
    )
    base_size: int | None = setting(
        None,
        "authors: the long side is drawn from the range times this (default: a ratio of the image)",
    )
    iou_range: tuple[float, float] = setting((0.1, 1.0), "bounds of the IoU of the two crops")
    jitter_labeled: bool = setting(False, "authors, Cityscapes: color jitter of labeled crops too")


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    network: str = setting(
        "deeplabv3plus", "segmentation network", ("deeplabv3plus", "lraspp", "pspnet")
    )
    backbone: str = setting(
        "resnet50",
        "torchvision's backbone, or one of timm's that can be dilated",
        ("mobilenet_v2", "mobilenet_v3_large", "resnet18", "resnet50", "resnet101", "timm/NAME"),
    )
    weights: str | None = setting(
        None,
        "the library's checkpoint for the backbone, a run of this program, or timm: what timm "
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

    iterations: int = setting(20_000, "optimizer steps")
    batch_size: int = setting(
        8, "labeled images a step over all processes; as many unlabeled ones are drawn"
    )
    accumulate: int = setting(
        1, "less memory: the network sees the batch in this many slices, computed twice"
    )
    precision: str = setting(
        "auto",
        "autocast type; auto: bf16 on GPUs that have it, else fp32",
        ("auto", "fp32", "bf16", "fp16"),
    )
    learning_rate: float = setting(0.002, "base learning rate of the backbone")
    head_learning_rate_factor: float = setting(
        10.0, "learning rate of the rest, as a multiple of the backbone's"
    )
    momentum: float = setting(0.9, "SGD momentum")
    weight_decay: float = setting(1e-4, "SGD weight decay")
    poly_power: float = setting(0.9, "power of the poly schedule")
    sync_bn: bool = setting(True, "batch statistics over all processes")
    freeze_bn: bool = setting(False, "running statistics in training too")


@dataclass(frozen=True)
class LossSettings:
    """The method and its loss (paper, Sec. 3.3 and 3.4); the ablations are those of Table 3."""

    method: str = setting("cac", "training method", ("cac", "supervised"))
    forward: str = setting(
        "separate",
        "separate (authors): labeled images and both views have batch statistics of their own; "
        "joint: one pass over all",
        ("separate", "joint"),
    )
    dc_weight: float = setting(0.1, "lambda, the weight of the contrastive loss")
    warmup: int | None = setting(
        None, "iterations with the supervised loss alone (default: 1/16 of all)"
    )
    temperature: float = setting(0.1, "tau")
    threshold: float = setting(0.75, "gamma, confidence that a positive must exceed")
    normalization: str = setting(
        "image",
        "image (paper): 1/N per image; active (authors): by the number of active pixels",
        ("image", "active"),
    )
    negatives_per_view: int | None = setting(
        None, "authors: this many random negatives per view and process (default, paper: all)"
    )
    max_negatives: int | None = setting(
        None, "the loss meets so many random negatives of the bank, each counted M/N-fold"
    )
    bank_past_steps: int = setting(
        0, "past steps whose negatives are kept besides the current one's"
    )
    projector: bool = setting(True, "ablation Proj: the projector (off: identity)")
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
    dc_backend: str = setting("auto", "back end of the loss", ("auto", *BACKENDS))
    false_negatives: bool = setting(
        False, "measure the share of false negatives (Fig. 6); reads the unlabeled images' masks"
    )


@dataclass(frozen=True)
class RunSettings:
    """Where and how it runs, and what it leaves."""

    output: str | None = setting(None, "run folder (default: runs/ and a name made of the choices)")
    seed: int = setting(0, "seed of everything random")
    device: str = setting("auto", "where to train", ("auto", "cpu", "cuda"))
    deterministic: bool = setting(False, "deterministic algorithms only")
    restart: bool = setting(False, "start over even if the run folder holds a run")
    eval_every: int | None = setting(
        None, "iterations between evaluations (default: a tenth of the run)"
    )
    save_every: int = setting(500, "iterations between checkpoints")
    log_every: int = setting(20, "iterations between lines of metrics.jsonl")
    profile: int | None = setting(
        None, "profile this many steps: shares of time, and trace.json in the run folder"
    )


@dataclass(frozen=True)
class Config:
    """The settings of a run, in groups; ``python train/main.py --help`` gives each one's meaning.

    Flags, TOML files, ``config.json`` and checkpoints name a setting without its group.
    """

    data: DataSettings
    model: ModelSettings
    optim: OptimizationSettings
    loss: LossSettings
    run: RunSettings

    @classmethod
    def of(cls, **values: Any) -> Config:
        """The settings ``values``, by their flat names, and the defaults of all others."""
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
        """The same settings but for ``values``, by their flat names."""
        return Config.of(**self.flat() | values)

    @property
    def num_warmup(self) -> int:
        """Iterations before the contrastive loss starts."""
        return self.optim.iterations // 16 if self.loss.warmup is None else self.loss.warmup

    @property
    def num_eval_every(self) -> int:
        """Iterations between evaluations."""
        return (
            max(1, self.optim.iterations // 10)
            if self.run.eval_every is None
            else self.run.eval_every
        )

    @property
    def run_folder(self) -> Path:
        """The folder that holds the run."""
        if self.run.output is not None:
            return Path(self.run.output)
        share = (self.data.labeled_share or "all").replace("/", "_")
        if self.data.labeled is not None:
            share = f"{Path(self.data.labeled).parent.name}_{Path(self.data.labeled).stem}"
        return Path("runs") / "-".join(
            [
                self.data.dataset,
                self.loss.method,
                self.model.network,
                self.model.backbone.replace("/", "_"),
                share,
                f"list{self.data.data_list}",
                f"seed{self.run.seed}",
            ]
        )


GROUPS = {
    "data": DataSettings,
    "model": ModelSettings,
    "optim": OptimizationSettings,
    "loss": LossSettings,
    "run": RunSettings,
}
FIELDS = {field.name: field for group in GROUPS.values() for field in dataclasses.fields(group)}
GROUP_OF = {
    field.name: name for name, group in GROUPS.items() for field in dataclasses.fields(group)
}
TYPES = {
    name: kind for group in GROUPS.values() for name, kind in typing.get_type_hints(group).items()
}

# What differs between the data sets (paper, Sec. 4.1).
_PAPER = {"iterations": 92_560}
PRESETS: dict[str, dict[str, Any]] = {
    "voc": _PAPER | {"crop_size": 320, "learning_rate": 0.001, "bank_past_steps": 1},
    "cityscapes": _PAPER | {"crop_size": 720, "learning_rate": 0.01},
    "folder": {},
    # From random weights, in minutes on two CPU cores: ResNet-18 learns in fewer steps than
    # MobileNetV2, small crops buy a larger batch, dropout would slow it down, and the head, as new
    # as the backbone, shares its learning rate. Labeled crops are jittered, as the authors do for
    # Cityscapes: without it the supervised baseline would fail in other light for that alone. The
    # loss of the method itself is the paper's.
    "toycity": {
        "backbone": "resnet18",
        "dropout": False,
        "iterations": 200,
        "warmup": 60,
        "batch_size": 8,
        "crop_size": 56,
        "learning_rate": 0.05,
        "head_learning_rate_factor": 1.0,
        "labeled_scale": (0.9, 1.7),
        "unlabeled_scale": (0.9, 1.7),
        "jitter_labeled": True,
        "eval_every": 50,
    },
}

# Settings that a resumed run may change: they do not alter what is computed. (The lists may move;
# what they name may not change.)
FREE = frozenset(
    (
        "data_dir output workers cache device eval_every save_every log_every restart dc_backend "
        "labeled unlabeled checkpoint_activations compile profile"
    ).split()
)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line of ``train/main.py``.

    Later sources win: defaults, the data set's preset, ``--config`` TOML, ``--set``, flags.

    Raises:
        InputError: an unknown option or key (with the nearest match), or an impossible value.
    """
    parser = _parser()
    flags = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {}
    if (path := flags.pop("config")) is not None:
        values |= _read_toml(Path(path))
    for item in flags.pop("set"):
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--set {item}: write it as key=value")
        values[_known(key.strip(), "--set")] = text.strip()
    values |= flags
    converted = {key: _convert(key, value) for key, value in values.items()}
    if not converted.get("dataset"):
        raise InputError("--dataset is needed: cityscapes, voc, folder or toycity")
    config = Config.of(**PRESETS[converted["dataset"]] | converted)
    _check(config)
    return config


def differences(config: Config, former: dict[str, Any]) -> list[str]:
    """Settings that change what is computed and differ from those of a ``former`` run."""
    return [
        f"{name}: {there!r} there, {here!r} here"
        for name, here in config.flat().items()
        # A run made before a setting was there did what is the default now.
        for there in [former.get(name, FIELDS[name].default)]
        if name not in FREE and _compared(name, there) != _compared(name, here)
        if name != "iterations" or there > here  # a run may be made longer
    ]


def _compared(name: str, value: Any) -> Any:
    if name == "weights" and value is not None:
        # Wherever it lies now, as only the first start has read it; but all runs have a best.pt.
        path = Path(value)
        return path.parts[-2:] if path.name in ("best.pt", "last.pt") else path.name
    return list(value) if isinstance(value, tuple) else value


def _parser() -> Parser:
    parser = Parser(
        prog="train/main.py",
        description="Train a segmentation network, semi-supervised with CAC or supervised.",
        epilog="Presets of the data sets, in place of the defaults: " + _preset_text(),
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE.toml", default=None, help="settings from a TOML file"
    )
    parser.add_argument(
        "--set",
        metavar="key=value",
        action="append",
        default=[],
        help="any setting below by its name with underscores",
    )
    for field in FIELDS.values():
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.default not in ("", None):
            text += f" [{field.default}]"
        if TYPES[field.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, metavar=_metavar(field), help=text)
    return parser


def _preset_text() -> str:
    return "; ".join(
        f"{dataset}: " + ", ".join(f"{name} {value}" for name, value in values.items())
        for dataset, values in PRESETS.items()
        if values
    )


def _metavar(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    return "{" + ",".join(choices) + "}" if choices else field.name.rsplit("_", 1)[-1].upper()


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"--config {path}: no such file")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: {error}") from error
    return {_known(key, f"--config {path}"): value for key, value in table.items()}


def _known(key: str, where: str) -> str:
    name = key.replace("-", "_")
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        raise InputError(
            f"{where}: unknown setting {key}" + (f", did you mean {near[0]}?" if near else "")
        )
    return name


def _convert(name: str, value: Any) -> Any:
    """``value`` (text, or what TOML gave) as the type of the setting ``name``."""
    kind = TYPES[name]
    choices = FIELDS[name].metadata["choices"]
    options = typing.get_args(kind)
    wanted = f"--{name.replace('_', '-')} {value}"
    if type(None) in options:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        kind = next(option for option in options if option is not type(None))
    try:
        if kind is bool:
            return _boolean(value)
        if kind in (int, float, str):
            if isinstance(value, bool) or (kind is int and isinstance(value, float)):
                raise ValueError
            result = kind(value)
            if kind is float and not math.isfinite(result):
                raise ValueError
        else:
            parts = value.strip("()[]").split(",") if isinstance(value, str) else value
            low, high = (float(part) for part in parts)
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError
            result = (low, high)
    except (TypeError, ValueError, KeyError):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise InputError(
            f"{wanted}: expected {names.get(kind, 'two numbers, as 0.5,2.0')}"
        ) from None
    if choices and not any(_admits(choice, result) for choice in choices):
        near = difflib.get_close_matches(str(result), choices, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise InputError(f"{wanted}: expected one of {', '.join(choices)}{hint}")
    return result


def _admits(choice: str, value: str) -> bool:
    """Whether a choice, a name or as prefix/NAME any with this prefix, admits a value."""
    prefix, slash, _ = choice.rpartition("/")
    return value == choice if not slash else value.startswith(prefix + slash)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {
        "true": True,
        "1": True,
        "on": True,
        "yes": True,
        "false": False,
        "0": False,
        "off": False,
        "no": False,
    }[str(value).lower()]


def _check(config: Config) -> None:
    """Reject values that no run can use."""
    values, crop = config.flat(), config.data.crop_size
    if config.data.dataset != "toycity" and config.data.data_dir is None:
        raise InputError(f"--data-dir is needed for --dataset {config.data.dataset}")
    if crop < 8 or crop % 8:
        lower = max(8, crop // 8 * 8)
        raise InputError(f"--crop-size {crop} is not a multiple of 8: use {lower} or {lower + 8}")
    counts = (
        "iterations batch_size save_every log_every eval_every negatives_per_view base_size "
        "accumulate profile max_negatives"
    )
    for name in [*counts.split(), "learning_rate", "head_learning_rate_factor"]:
        value = values[name]
        if value is not None and (value <= 0 if isinstance(value, float) else value < 1):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be positive")
    counts = "warmup workers bank_past_steps seed data_list"
    for name in [*counts.split(), *"dc_weight weight_decay threshold momentum poly_power".split()]:
        value = values[name]
        if value is not None and value < 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: must not be negative")
    for name in ("labeled_scale", "unlabeled_scale", "iou_range"):
        low, high = values[name]
        if not 0 < low <= high:
            raise InputError(
                f"--{name.replace('_', '-')} {low},{high}: give two positive numbers, lower first"
            )
    if config.model.compile and config.model.checkpoint_activations:
        raise InputError(
            "--compile cuts its graph at each block of --checkpoint-activations: use one of them, "
            "or --compile with --accumulate"
        )
    try:
        check_temperature(config.loss.temperature)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    if config.optim.momentum >= 1:
        raise InputError(f"--momentum {config.optim.momentum}: must be below 1")
    if config.run.seed >= 2**32:
        raise InputError(f"--seed {config.run.seed}: must be below 2**32")
    if config.loss.threshold > 1:
        raise InputError(f"--threshold {config.loss.threshold}: a confidence is at most 1")
    if config.data.iou_range[1] > 1:
        raise InputError("--iou-range {},{}: an IoU is at most 1".format(*config.data.iou_range))
