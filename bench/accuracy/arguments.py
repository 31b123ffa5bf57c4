"""What a call of `compare.py` asks for, and what `tables.py` shares with it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from accuracy.arms import ARMS, METHODS, add_methods, add_variant, needed_arm
from accuracy.shrink import shrunken
from cac_fast.train.errors import InputError
from cac_fast.train.options import Parser, at_least
from cac_fast.train.registry import LAYOUTS
from lib.measure import ROOT

OWN = "--dataset --data-dir --method --output --seed --labeled-share --data-list --teacher".split()
"""Options of `train/main.py` that `compare.py` gives itself: behind `--` they would win."""


def numbers(text: str) -> list[int]:
    """Integers between commas, none of them twice.

    Raises:
        InputError: they are not.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len({*map(int, words)}) < len(words):
        raise InputError(f"--seeds {text}: give different whole numbers between commas")
    return [int(word) for word in words]


def refuse(words: Sequence[str], own: Collection[str], program: str) -> None:
    """Raise InputError for options of `train/main.py` that the program gives itself."""
    for word in words:
        if word.partition("=")[0] in own:
            raise InputError(f"{word}: {program} itself gives train/main.py this one, leave it out")


def arms(text: str) -> list[str]:
    """Names of ARMS between commas.

    Raises:
        InputError: one is not there.
    """
    names = text.split(",")
    for name in names:
        if name not in ARMS:
            raise InputError(f"--arms {text}: there is no {name!r}, choose of {', '.join(ARMS)}")
    return names


def add_shared(parser: Parser) -> None:
    """Add what a program that plans runs asks for: data, seeds, folders, how many at once."""
    parser.add_argument("--dataset", required=True, help="as train/main.py's")
    parser.add_argument("--data-dir", help="as train/main.py's")
    text = "of the data in tables (default: its folder's name); tells two experiments on it apart"
    parser.add_argument("--title", help=text)
    parser.add_argument("--seeds", type=numbers, default="0,1,2", help="of the runs (%(default)s)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: below runs)")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "bench" / "results",
        help="folder of the result files (default: bench/results)",
    )
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs side by side")
    text = "CPU threads a run (%(default)s)"
    parser.add_argument("--threads", type=at_least(1), default=os.cpu_count(), help=text)


def find_data(options: argparse.Namespace) -> None:
    """Note the data's `folder`, and its `title` in tables if none is given.

    Raises:
        InputError: a folder that is to be written to is a file.
    """
    for name in ("runs", "results"):
        path = getattr(options, name)
        if path is not None and path.exists() and not path.is_dir():
            raise InputError(f"--{name} {path} is no folder: give another one")
    options.folder = Path(options.data_dir).resolve() if options.data_dir else None
    options.title = options.title or (options.folder.name if options.folder else options.dataset)
    if options.folder is None and (made_in := LAYOUTS.entry(options.dataset).made_in):
        options.folder = ROOT / made_in


def data_options(options: argparse.Namespace) -> list[str]:
    """The options of `train/main.py` that name the data."""
    folder = [] if options.folder is None else ["--data-dir", str(options.folder)]
    return ["--dataset", options.dataset, *folder]


def split_arguments(
    arguments: list[str], description: str | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Read the arguments before `--`; those behind it are for `train/main.py`.

    Raises:
        InputError: an argument cannot be used.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="compare", help="name of the result files")
    add_shared(parser)
    text = f"of {', '.join(ARMS)} (default: {','.join(METHODS)})"
    parser.add_argument("--arms", type=arms, help=text)
    parser.add_argument(
        "--methods",
        type=add_methods,
        metavar="all|LIST",
        help="in place of --arms: methods of train/main.py between commas, or all of them; "
        "supervised, supervised_all (not for share full), supervised_adapted and, for cac, control "
        "come with them",
    )
    parser.add_argument(
        "--sort-by",
        choices=("steps", "time"),
        default="steps",
        help="with --methods: by the gain after equal steps or after equal time (%(default)s)",
    )
    parser.add_argument(
        "--variant",
        type=add_variant,
        action="append",
        default=[],
        dest="variants",
        metavar="'NAME=ARM OPTIONS'",
        help="one more arm: another one with further options of train/main.py",
    )
    parser.add_argument(
        "--shares", default="1/8", help="labeled shares, or 'lists' for the data set's own lists"
    )
    parser.add_argument(
        "--lists",
        metavar="DIR",
        help="in place of shares: the folder of labeled.txt and unlabeled.txt; {list} in it stands "
        "for the seed modulo the number of such folders",
    )
    parser.add_argument("--test", action="store_true", help="evaluate on the test split as well")
    parser.add_argument(
        "--names",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="evaluate on these images of test by themselves, a NAME a line; the summary is of the "
        "first such FILE",
    )
    parser.add_argument(
        "--shrink", type=int, default=1, help="train on a copy of a folder set at 1/N of its size"
    )
    return parser.parse_args(arguments[:cut]), arguments[cut + 1 :]


def parse(arguments: list[str], description: str | None = None) -> argparse.Namespace:
    """What a call asks for; a smaller copy of the data is made.

    Raises:
        InputError: as `split_arguments`, `refuse` and `shrunken`, of a copy that cannot be made, or
            of two results that would have one name.
    """
    options, rest = split_arguments(arguments, description)
    refuse(rest, OWN, "compare.py")
    for name in options.variants:
        refuse(ARMS[name].more, {*OWN} - {"--method"}, "compare.py")
    options.command, options.rest = arguments, rest
    if options.arms and options.methods:
        raise InputError("--methods names the arms itself: leave out --arms")
    chosen = options.methods or options.arms or list(METHODS)
    if options.methods and options.lists is None and options.shares == "full":
        chosen.remove("supervised_all")  # supervised has all masks already
    options.arms = [*chosen, *options.variants]
    for arm in options.arms:
        needed = needed_arm(arm)
        if needed is not None and needed not in options.arms:
            or_else = ", or use --methods" if needed == "supervised" else ""
            raise InputError(
                f"{arm} begins with the runs of {needed}: add {needed} to --arms{or_else}"
            )
    options.runs = (options.runs or ROOT / "runs" / options.name).resolve()
    find_data(options)
    if options.lists is not None:
        options.shares = Path(options.lists).name
        options.lists = str(Path(options.lists).resolve())
    options.names = [path.resolve() for path in options.names]
    called = ["val", "test"]
    for path in options.names:
        if path.stem in called:
            raise InputError(
                f"--names {path}: there are results called {path.stem!r} already: rename the file"
            )
        called.append(path.stem)
    if options.shrink < 1:
        raise InputError(f"--shrink {options.shrink} is no size: give 1 or more")
    if options.shrink > 1:
        if options.dataset != "folder":
            raise InputError(
                f"--shrink cannot copy the dataset {options.dataset}: leave it out, or use "
                "--dataset folder"
            )
        if options.folder is None:
            raise InputError("--shrink needs the folder that it copies: give --data-dir")
        options.folder = shrunken(options.folder, options.shrink)
    options.data = data_options(options)
    return options
