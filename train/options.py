"""What the commands' lines share: one parser class, and options that several of them have."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from cac_fast.train.errors import InputError, did_you_mean, writing
from cac_fast.train.registry import LAYOUTS

DEVICES = ("auto", "cpu", "cuda")

_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose errors are `InputError`.

    An unknown option is reported first, with the nearest option there is.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def add_path(
        self, name: str, metavar: str, text: str, *, writable: bool = False, **more: Any
    ) -> None:
        """Add an option for a path; `writable` refuses one where no file can lie."""
        kind = partial(_writable, name) if writable else Path
        self.add_argument(name, type=kind, metavar=metavar, help=text, **more)

    def add_network_options(self) -> None:
        """Add `--checkpoint` and `--device`."""
        text = "a run folder, or its best.pt or last.pt"
        self.add_path("--checkpoint", "RUN", text, required=True)
        text = "where to compute; auto: the GPU if there is one"
        self.add_argument("--device", choices=DEVICES, default="auto", help=text)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore
        """Parse `args` (default: the command line).

        Raises:
            InputError: an unknown option, a missing one, or a value that cannot be used.
        """
        args = sys.argv[1:] if args is None else list(args)
        # First, as argparse would complain that a required option is missing if it is misspelled.
        self._reject_unknown(args)
        namespace, rest = self.parse_known_args(args)
        if rest:
            raise InputError(f"unexpected argument {rest[0]}: options start with --")
        return namespace

    def _reject_unknown(self, args: Sequence[str]) -> None:
        known = self._option_string_actions
        for argument in args:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            # As argparse has it: a negative number or a text with blanks is a value, no option.
            if not name.startswith("-") or name == "-" or " " in name or _NUMBER.match(name):
                continue
            if name in known or (not name.startswith("--") and name[:2] in known):
                continue
            hint = did_you_mean("--" + name.lstrip("-"), known) or ", --help lists the options"
            raise InputError(f"unknown option {name}{hint}")


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is `minimum` or more."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return convert


def _writable(option: str, text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option} {path}: give a file in a folder that exists")
    return path


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write what `--json` asks for, if it is given."""
    if path is not None:
        with writing(f"--json {path}"):
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def add_data_options(parser: Parser) -> None:
    """Add `--dataset` and `--data-dir`."""
    parser.add_argument(
        "--dataset",
        required=True,
        type=LAYOUTS.checked,
        metavar="NAME",
        help=f"data layout: {LAYOUTS.describe()}",
    )
    parser.add_path("--data-dir", "DIR", "the data's folder (not needed for toycity)")
