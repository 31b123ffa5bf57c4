"""Read the settings of a run from defaults, presets, a TOML file and flags; compare two runs'.

A parser of our own over argparse: tyro, which would take the dataclasses as they are, answers a
mistake with a box of several lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tomllib
import typing
from collections.abc import Mapping, Sequence
from configparser import ConfigParser
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

from cac_fast.checks import check_temperature
from cac_fast.train.errors import InputError, check_crop, did_you_mean
from cac_fast.train.options import Parser
from cac_fast.train.registry import CONTRASTIVE, LAYOUTS, METHODS, Registry
from cac_fast.train.settings import FIELDS, TYPES, Config

__all__ = ["Config", "compared", "differences", "parse", "unused"]

# Settings that a resumed run may change: they do not alter what is computed. (The lists may move;
# what they name may not change.)
FREE = frozenset(
    (
        "data_dir output workers cache device eval_every save_every log_every restart dc_backend "
        "labeled unlabeled pseudo_labels teacher checkpoint_activations compile profile"
    ).split()
)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line of `train/main.py`.

    Later sources win: defaults, the method's preset, the data set's, `--config` TOML, flags.

    Raises:
        InputError: an unknown option or key (with the nearest match), or an impossible value.
    """
    parser, arguments = _parser(), sys.argv[1:] if arguments is None else arguments
    values = vars(parser.parse_args(arguments))
    if values["config"] is not None:
        values = vars(parser.parse_args([*_read_toml(Path(values["config"])), *arguments]))
    del values["config"]
    if (item := values.pop("set")) is not None:
        name, _, value = item.partition("=")
        raise InputError(f"--set {item}: use {_as_flag(_known(name, '--set'), value.strip(), ' ')}")
    if not values.get("dataset"):
        raise InputError(f"--dataset is needed: {', '.join(LAYOUTS.names)}")
    layout = LAYOUTS.entry(values["dataset"])
    asked = Config.of(**layout.preset | values)
    preset = METHODS.entry(asked.loss.method).preset_for(asked.flat())
    config = Config.of(**preset | layout.preset | values)
    if layout.made_in is None and config.data.data_dir is None:
        raise InputError(f"--data-dir is needed for --dataset {config.data.dataset}")
    check_values(config.flat())
    check_crop(config.data.crop_size, 8)
    try:
        check_temperature(config.loss.temperature)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    if config.model.compile and config.model.checkpoint_activations:
        raise InputError(
            "--compile cuts its graph at each block of --checkpoint-activations: use one of them, "
            "or --compile with --accumulate"
        )
    return config


def differences(config: Config, former: dict[str, Any]) -> list[str]:
    """Settings that change what is computed and differ from those of a `former` run."""
    return [
        f"{name}: {there!r} there, {here!r} here"
        for name, here in config.flat().items()
        # A run made before a setting was there did what is the default now.
        for there in [former.get(name, FIELDS[name].default)]
        if name not in FREE and compared(name, there) != compared(name, here)
        if name != "iterations" or there > here  # a run may be made longer
    ]


def unused(config: Config) -> list[str]:
    """The flags of the loss that were given and that the method does not read beside the others.

    None of them for supervised training and for a method from outside the project.
    """
    loss, layout = config.loss, LAYOUTS.entry(config.data.dataset)
    method = METHODS.entry(loss.method)
    if method.uses is None:
        return []
    read = {"method", *method.uses.split()}
    if loss.method == "fixmatch" and loss.dc_weight == 0:
        read -= {*CONTRASTIVE.split()} - {"forward", "warmup"}
    if loss.method == "cac" and not loss.averaged_labels:
        read.remove("ema_decay")
    if loss.method == "self_training" and config.data.teacher is None:
        read.remove("confidence")
    defaults = [
        {name: field.default for name, field in FIELDS.items()},
        method.preset_for(config.flat()),
        layout.preset,
    ]
    return [
        _as_flag(name, value, " ")
        for name, value in vars(loss).items()
        if name not in read and all(value != values.get(name) for values in defaults)
    ]


def compared(name: str, value: Any) -> Any:
    """A setting's value as two runs are compared by it."""
    if name == "weights" and value is not None:
        # Wherever it lies now, as only the first start has read it; but all runs have a best.pt.
        path = Path(value)
        return path.parts[-2:] if path.name in ("best.pt", "last.pt") else path.name
    return list(value) if isinstance(value, tuple) else value


def _parser() -> Parser:
    parser = Parser(
        prog="train/main.py",
        description="Train a segmentation network, semi-supervised with CAC or another method.",
        epilog="Presets of methods and data sets, in place of the defaults: " + _preset_text(),
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE.toml", default=None, help="settings from a TOML file"
    )
    parser.add_argument("--set", default=None, help=argparse.SUPPRESS)  # older commands have it
    add_settings(parser, {name: field.default for name, field in FIELDS.items()})
    return parser


def add_settings(parser: Parser, defaults: Mapping[str, Any]) -> None:
    """Add the flags of some settings, with the defaults that their help texts name."""
    for name, default in defaults.items():
        field = FIELDS[name]
        choices, text = field.metadata["choices"], field.metadata["help"]
        if isinstance(choices, Registry):
            text += f": {choices.describe()}"
        if default not in ("", None):
            text += f" [{default}]"
        options = {"metavar": _metavar(field), "type": partial(_convert, name)}
        if TYPES[name] is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(_flag(name), help=text, **options)


def check_values(values: Mapping[str, Any]) -> None:
    """Raise InputError for a setting with an impossible value; None is not checked."""
    for name, value in values.items():
        if value is not None:
            _check(name, value)


def _preset_text() -> str:
    def listed(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in settings.items())

    texts = []
    for key, entry in (METHODS.entries | LAYOUTS.entries).items():
        if entry.preset:
            texts.append(f"{key}: {listed(entry.preset)}")
        texts += [f"{key} with {listed(where)}: {listed(more)}" for where, more in entry.cases]
    return "; ".join(texts)


def _metavar(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    if isinstance(choices, tuple):
        return "{" + ",".join(choices) + "}"
    names = {"int": "N", "float": "X", "tuple[float, float]": "LOW,HIGH"}
    return names.get(str(field.type).removesuffix(" | None"), field.name.rsplit("_", 1)[-1].upper())


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _as_flag(name: str, value: Any, separator: str) -> str:
    if TYPES[name] is bool:
        return _flag(name if _convert(name, str(value)) else f"no_{name}")
    if isinstance(value, bool):
        raise InputError(f"{_flag(name)} {value}: expected a value, not a switch")
    return f"{_flag(name)}{separator}{value}"


def _read_toml(path: Path) -> list[str]:
    """A file's settings as flags."""
    if not path.is_file():
        raise InputError(f"--config {path}: no such file")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: {error}") from error
    return [_as_flag(_known(key, f"--config {path}"), item, "=") for key, item in table.items()]


def _known(key: str, where: str) -> str:
    name = key.strip().replace("-", "_")
    if name not in FIELDS:
        raise InputError(f"{where}: unknown setting {key}{did_you_mean(name, FIELDS)}")
    return name


def _convert(name: str, text: str) -> Any:
    """`text` as the type of the setting `name`."""
    kind = TYPES[name]
    if NoneType in typing.get_args(kind):
        if text.lower() == "none":
            return None
        kind = typing.get_args(kind)[0]
    convert, expected = _CONVERTERS[typing.get_origin(kind) or kind]
    try:
        return convert(text)
    except (ValueError, KeyError):
        raise InputError(f"{_flag(name)} {text}: expected {expected}") from None


def _check(name: str, value: Any) -> None:
    choices, flag = FIELDS[name].metadata["choices"], _flag(name)
    if isinstance(choices, Registry):
        choices.checked(value)
    elif choices is not None and value not in choices:
        raise InputError(
            f"{flag} {value}: expected one of {', '.join(choices)}{did_you_mean(value, choices)}"
        )
    for check in FIELDS[name].metadata["checks"]:
        if not check.holds(value):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(f"{flag} {text}: {check.complaint}")


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _two_numbers(text: str) -> tuple[float, float]:
    low, high = text.strip("()[]").split(",")
    return _number(low), _number(high)


_CONVERTERS = {
    bool: (lambda text: ConfigParser.BOOLEAN_STATES[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (_number, "a number"),
    str: (str, "text"),
    tuple: (_two_numbers, "two numbers, as 0.5,2.0"),
}
