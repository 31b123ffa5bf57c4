"""Supervised-only against CAC on the embedded toy city: a table, a curve and pictures, in minutes.

make demo        (or: python bench/accuracy/demo.py)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import compare
from accuracy.arms import METHODS
from cac_fast.train import load
from cac_fast.train.data.images import read_image
from cac_fast.train.data.layouts import open_data
from cac_fast.train.distributed import run_command
from cac_fast.train.options import Parser
from cac_fast.train.pictures import colorize
from lib.measure import ROOT

OUTPUT = ROOT / "runs" / "demo"
DATA = ROOT / "data" / "toycity"
SCENES, ZOOM = 6, 2


def pictures(path: Path) -> None:
    """Validation scenes: image, truth, supervised-only, CAC, a row each."""
    data = open_data("toycity", DATA)
    networks = [load(OUTPUT / f"{method}-lists-seed0" / "last.pt") for method in METHODS]
    rows = []
    for sample in data.splits["val"][:: max(1, len(data.splits["val"]) // SCENES)][:SCENES]:
        image = read_image(sample.image)
        maps = [data.read_mask(sample.mask), *(network.predict(image) for network in networks)]
        row = [np.asarray(image), *(colorize(labels, data.palette) for labels in maps)]
        rows.append(np.concatenate(row, axis=1))
    picture = Image.fromarray(np.concatenate(rows))
    size = (ZOOM * picture.width, ZOOM * picture.height)
    picture.resize(size, Image.Resampling.NEAREST).save(path)


def main(arguments: Sequence[str] = ()) -> int:
    """Train both methods side by side, one thread each, then show what they learned.

    1 if a run failed, else 0.

    Raises:
        InputError: an argument is given, or the toy city is an outdated one or cannot be written.
    """
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    name = "--name toycity --dataset toycity --shares lists --seeds 0 --jobs 2 --threads 1"
    folders = ["--data-dir", str(DATA), "--runs", str(OUTPUT), "--results", str(OUTPUT)]
    failed = compare.compare(compare.parse([*name.split(), *folders]))
    if failed:
        return failed
    pictures(OUTPUT / "scenes.png")
    print(f"pictures (image, truth, supervised, cac): {OUTPUT / 'scenes.png'}")
    print(f"curve: {OUTPUT / 'toycity.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
