"""Read the settings of a run from defaults, presets, a TOML file and flags; compare two runs'.

A parser of our own over argparse: tyro, which would take the dataclasses as they are, answers a
mistake with a box of several lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from cac_fast.checks import check_temperature
from cac_fast.train.errors import InputError, did_you_mean
from cac_fast.train.options import Parser
from cac_fast.train.registry import LAYOUTS, Registry
from cac_fast.train.settings import FIELDS, TYPES, Config

__all__ = ["Config", "differences", "parse"]

# Settings that a resumed run may change: they do not alter what is computed. (The lists may move;
# what they name may not change.)
FREE = frozenset(
    (
        "data_dir output workers cache device eval_every save_every log_every restart dc_backend "
        "labeled unlabeled checkpoint_activations compile profile"
    ).split()
)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line of `train/main.py`.

    Later sources win: defaults, the data set's preset, `--config` TOML, flags.

    Raises:
        InputError: an unknown option or key (with the nearest match), or an impossible value.
    """
    flags = vars(_parser().parse_args(arguments))
    values: dict[str, Any] = {}
    if (path := flags.pop("config")) is not None:
        values |= _read_toml(Path(path))
    if (item := flags.pop("set")) is not None:
        name, _, value = item.partition("=")
        raise InputError(f"--set {item}: use {_as_flag(_known(name, '--set'), value.strip())}")
    converted = {name: _convert(name, value) for name, value in (values | flags).items()}
    if not converted.get("dataset"):
        raise InputError(f"--dataset is needed: {', '.join(LAYOUTS.names)}")
    layout = LAYOUTS.entry(converted["dataset"])
    config = Config.of(**layout.preset | converted)
    if layout.made_in is None and config.data.data_dir is None:
        raise InputError(f"--data-dir is needed for --dataset {config.data.dataset}")
    for name, value in config.flat().items():
        if value is not None:
            _check(name, value)
    crop = config.data.crop_size
    if crop < 8 or crop % 8:
        lower = max(8, crop // 8 * 8)
        raise InputError(f"--crop-size {crop} is not a multiple of 8: use {lower} or {lower + 8}")
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
    parser.add_argument("--set", default=None, help=argparse.SUPPRESS)  # older commands have it
    for field in FIELDS.values():
        choices, text = field.metadata["choices"], field.metadata["help"]
        if isinstance(choices, Registry):
            text += f": {choices.describe()}"
        if field.default not in ("", None):
            text += f" [{field.default}]"
        options: dict[str, Any] = {"metavar": _metavar(field)}
        if TYPES[field.name] is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(_flag(field.name), help=text, **options)
    return parser


def _preset_text() -> str:
    return "; ".join(
        f"{dataset}: " + ", ".join(f"{name} {value}" for name, value in entry.preset.items())
        for dataset, entry in LAYOUTS.entries.items()
        if entry.preset
    )


def _metavar(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    if isinstance(choices, tuple):
        return "{" + ",".join(choices) + "}"
    names = {"int": "N", "float": "X", "tuple[float, float]": "LOW,HIGH"}
    return names.get(str(field.type).removesuffix(" | None"), field.name.rsplit("_", 1)[-1].upper())


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _as_flag(name: str, value: str) -> str:
    if TYPES[name] is not bool:
        return f"{_flag(name)} {value}"
    return _flag(name if _convert(name, value) else f"no_{name}")


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"--config {path}: no such file")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: {error}") from error
    return {_known(key, f"--config {path}"): value for key, value in table.items()}


def _known(key: str, where: str) -> str:
    name = key.strip().replace("-", "_")
    if name not in FIELDS:
        raise InputError(f"{where}: unknown setting {key}{did_you_mean(name, FIELDS)}")
    return name


def _convert(name: str, value: Any) -> Any:
    """`value` (text, or what TOML gave) as the type of the setting `name`."""
    kind = TYPES[name]
    if NoneType in typing.get_args(kind):
        if str(value).lower() == "none":
            return None
        kind = typing.get_args(kind)[0]
    convert, expected = _CONVERTERS[typing.get_origin(kind) or kind]
    try:
        return convert(value)
    except (TypeError, ValueError, KeyError):
        raise InputError(f"{_flag(name)} {value}: expected {expected}") from None


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


def _boolean(value: Any) -> bool:
    return value if isinstance(value, bool) else _BOOLEANS[str(value).lower()]


def _integer(value: Any) -> int:
    if isinstance(value, (bool, float)):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _text(value: Any) -> str:
    if isinstance(value, bool):
        raise ValueError
    return str(value)


def _two_numbers(value: Any) -> tuple[float, float]:
    low, high = value.strip("()[]").split(",") if isinstance(value, str) else value
    return _number(low), _number(high)


_BOOLEANS = {
    **dict.fromkeys(("true", "1", "on", "yes"), True),
    **dict.fromkeys(("false", "0", "off", "no"), False),
}
_CONVERTERS = {
    bool: (_boolean, "true or false"),
    int: (_integer, "a whole number"),
    float: (_number, "a number"),
    str: (_text, "text"),
    tuple: (_two_numbers, "two numbers, as 0.5,2.0"),
}
