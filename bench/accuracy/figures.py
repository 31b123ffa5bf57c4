"""The paper's figures from trained runs, each one PNG.

    python bench/accuracy/figures.py --figure 7 --runs RUN [RUN...] [--output FILE.png] [...]

1: where networks look to tell one pixel's class (Grad-CAM). 3: t-SNE of an overlap's features in
other contexts and colors. 6: precision of the negatives with and without pseudo labels (runs with
--false-negatives). 7: val mIoU while training. 8: images on which the runs differ most, and others.

`--figure N --help` lists the options of figure N.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import figure_curves, figure_gradcam, figure_sheet, figure_tsne
from accuracy.figure_runs import Drawn
from cac_fast.train.distributed import run_command
from cac_fast.train.errors import InputError, writing
from cac_fast.train.options import Parser, at_least, write_json
from lib.measure import can_plot


class Figure(NamedTuple):
    """What draws a figure, and what adds its own options."""

    make: Callable[[argparse.Namespace], Drawn]
    add_options: Callable[[Parser], None] = lambda parser: None


FIGURES = {
    1: Figure(figure_gradcam.make, figure_gradcam.add_options),
    3: Figure(figure_tsne.make, figure_tsne.add_options),
    6: Figure(figure_curves.make_negatives),
    7: Figure(figure_curves.make_validation),
    8: Figure(figure_sheet.make, figure_sheet.add_options),
}


def parser_of(figure: int | None) -> Parser:
    """The options of all figures and of this one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=int, choices=FIGURES, required=True, help="of the paper")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="RUN")
    text = "of the runs, one each (default: their folders); runs of one name are seeds of it"
    parser.add_argument("--captions", nargs="+", metavar="NAME", help=text)
    parser.add_path("--data-dir", "DIR", "where the data are now, if they were moved")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="(%(default)s)")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of what is drawn (%(default)s)"
    )
    text = "(default: figureN.png)"
    parser.add_path("--output", "FILE.png", text, writable=True)
    parser.add_path("--json", "FILE", "also write the numbers in the figure", writable=True)
    if figure is not None:
        FIGURES[figure].add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw one figure.

    Raises:
        InputError: something that it needs is missing or cannot be used.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--figure", nargs="?")
    asked = first.parse_known_args(arguments)[0].figure or ""
    figure = int(asked) if asked.isdecimal() and int(asked) in FIGURES else None
    options = parser_of(figure).parse_args(arguments)
    if not can_plot():
        raise InputError("the figures need matplotlib: pip install matplotlib")
    output = options.output or Path(f"figure{figure}.png")
    drawn = FIGURES[options.figure].make(options)
    with writing(output):
        # 256 colors: a third of the file. Smooth shades show bands.
        drawn.image.quantize(256).save(output, "PNG", optimize=True)
    write_json(options.json, drawn.numbers)


if __name__ == "__main__":
    sys.exit(run_command(main))
