"""A sheet of pictures of compared methods: what each says of the images on which they differ."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from accuracy import figure_sheet
from accuracy.arms import ARMS
from accuracy.runs import Job, run_folder, scored_parts
from cac_fast.train.errors import writing

ROWS = 3
"""Images on which the methods differ most, and as many drawn at random."""


def draw_sheet(finished: Iterable[Job], options: argparse.Namespace, path: Path) -> None:
    """Draw the last states of the first share and seed that have two runs or more in
    `options.runs`, on test if any of it is scored and else on val; none where no two are there.

    A sheet that is there already is kept if the folder of a run of that seed is gone.

    Raises:
        InputError: a network, an image or `path` cannot be used.
    """
    finished = list(finished)
    there = [job for job in finished if (run_folder(job, options) / "last.pt").is_file()]
    for setting in dict.fromkeys((share, seed) for _, share, seed in there):
        arms = [arm for arm in ARMS if (arm, *setting) in there]
        if len(arms) < 2:
            continue
        gone = [arm for arm in ARMS if (arm, *setting) in finished and arm not in arms]
        if gone and path.exists():
            print(f"{path} stays as it is: {', '.join(gone)} of it are not in {options.runs}")
            return
        asked = argparse.Namespace(
            runs=[run_folder((arm, *setting), options) / "last.pt" for arm in arms],
            captions=arms,
            data_dir=options.folder,
            split="test" if scored_parts(options) else "val",
            rows=ROWS,
            seed=0,
        )
        drawn = figure_sheet.make(asked)
        with writing(path):
            drawn.image.save(path)
        return
