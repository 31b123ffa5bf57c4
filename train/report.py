"""Report: `python train/report.py RUN [RUN...] [--output FILE.html]`, one file to send around."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cac_fast.train import distributed
from cac_fast.train.errors import InputError, writing
from cac_fast.train.options import DEVICES, Parser, at_least
from cac_fast.train.progress import warn
from cac_fast.train.reporting.gather import Run, read_runs
from cac_fast.train.reporting.images import Album
from cac_fast.train.reporting.page import build
from cac_fast.train.reporting.scoring import draw, score_runs, share_images


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; 0 at the end, also where parts are missing, 2 after a line on bad input."""
    parser = Parser(
        prog="train/report.py",
        description="Write one HTML file that shows runs without server or network: scores, "
        "settings, curves, IoU of each class, confusion matrix, images with truth, prediction and "
        "confidence, speed and memory. What a run lacks is named in it.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    text = "file to write [report.html in the first run's folder]"
    parser.add_path("--output", "FILE", text, writable=True)
    text = "show the N worst, N median and N best images of val [4]"
    parser.add_argument("--images", type=at_least(0), default=4, metavar="N", help=text)
    text = "where the data lies now [where the run found it]"
    parser.add_path("--data-dir", "DIR", text)
    text = "where to compute; auto: the GPU if there is one"
    parser.add_argument("--device", choices=DEVICES, default="auto", help=text)
    return distributed.run_command(lambda: _report(parser.parse_args(arguments)))


def _report(options: argparse.Namespace) -> None:
    if distributed.world_size() > 1:
        raise InputError("report is a single process: start it with python, not with torchrun")
    output = options.output or options.runs[0] / "report.html"
    runs = read_runs(options.runs)
    with distributed.world(options.device) as world:
        score_runs(runs, options.data_dir, world)
        albums = [_album(group, options.images) for group in share_images(runs)]
    page = build(runs, albums, options.images)
    with writing(output):
        output.write_text(page, encoding="utf-8")
    for run in runs:
        for gap in run.gaps:
            warn(f"{run.name}: {gap}")
    print(f"{output}: {len(page.encode()) / 1e6:.1f} MB")


def _album(runs: list[Run], count: int) -> Album:
    try:
        return Album(runs, draw(runs, count))
    except InputError as error:
        runs[0].gaps.append(f"Pictures are missing: {error}.")
        return Album(runs, [])


if __name__ == "__main__":
    sys.exit(main())
