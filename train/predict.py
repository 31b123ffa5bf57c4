"""Predict: `python train/predict.py --checkpoint FILE --images DIR --output DIR`."""

from __future__ import annotations

import argparse
import glob
import itertools
import os
import sys
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cac_fast.train import distributed
from cac_fast.train.data.images import read_image
from cac_fast.train.data.listing import files, is_image, kinds
from cac_fast.train.data.names import IMAGE_SUFFIXES
from cac_fast.train.errors import InputError, fitting, writing
from cac_fast.train.inference import SMALLEST_TILE, load
from cac_fast.train.options import Parser
from cac_fast.train.progress import show_progress, warn

OVERLAY_OPACITY = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict every image; 0 if at least one was, 2 after one line about bad input."""
    parser = Parser(
        prog="train/predict.py",
        description="Write NAME.png (class ids, with the classes' colors as palette) and "
        "NAME_overlay.png for every image of a folder and the folders in it, of a pattern, or of "
        "several files.",
    )
    parser.add_network_options()
    text = "folder of images, image files, or a pattern as 'photos/**/*.jpg'"
    parser.add_path("--images", "PATH", text, required=True, nargs="+")
    parser.add_path("--output", "DIR", "folder for the predictions", required=True)
    text = "give the network N x N pixels at a time, for images too large for memory (try 1024)"
    parser.add_argument("--tile", type=int, metavar="N", help=text)
    return distributed.run_command(lambda: _predict(parser.parse_args(arguments)))


class Job(NamedTuple):
    """One image and the two files that are made of it."""

    image: Path
    ids: Path
    overlay: Path


def _predict(options: argparse.Namespace) -> None:
    if distributed.world_size() > 1:
        raise InputError("predict is a single process: start it with python, not with torchrun")
    if options.tile is not None and options.tile < SMALLEST_TILE:
        raise InputError(
            f"--tile {options.tile} is too small: use at least {SMALLEST_TILE}, better 1024"
        )
    sources, others = find_images(options.images, options.output)
    jobs = plan(sources, options.output)
    predictor = load(options.checkpoint, distributed.pick_device(options.device))
    show, skipped = show_progress("images"), 0
    remedy = "--tile 1024" if options.tile is None else "a smaller --tile"
    for done, job in enumerate(jobs, start=1):
        try:
            image = read_image(job.image)
        except InputError as error:
            skipped += 1
            warn(f"skipped: {error}")
        else:
            size = f"{image.width} x {image.height}"
            with fitting(f"image {job.image} ({size}) does not fit in memory: use {remedy}"):
                ids = predictor.predict(image, options.tile)
            _write(job, image, ids, predictor.palette)
        show(done, len(jobs))
    if skipped == len(jobs):
        raise InputError(
            f"none of the {skipped} images in {_listed(options.images)} can be read: nothing was "
            "written"
        )
    passed = f", {others.total()} files of other kinds passed over ({kinds(others)})"
    print(
        f"{len(jobs) - skipped} images predicted, {skipped} skipped{passed if others else ''}: "
        f"{options.output}"
    )


def plan(sources: Sequence[tuple[Path, Path]], output: Path) -> list[Job]:
    """What to write for every image, given with its path below `output`.

    Raises:
        InputError: a file would be written twice or over an image.
    """
    originals = {source.resolve() for source, _ in sources}
    made_of: dict[Path, Path] = {}
    jobs = []
    for source, below in sources:
        target = (output / below).with_suffix("")
        results = (target.with_name(f"{target.name}{end}.png") for end in ("", "_overlay"))
        job = Job(source, *results)
        for path in (job.ids, job.overlay):
            if path.resolve() in originals:
                raise InputError(
                    f"{path} is one of the images and would be overwritten: give another --output"
                )
            if (other := made_of.setdefault(path, source)) is not source:
                raise InputError(
                    f"{other} and {source} would both be written to {path}: rename one of them"
                )
        jobs.append(job)
    return jobs


def find_images(
    given: Sequence[Path], output: Path
) -> tuple[list[tuple[Path, Path]], Counter[str]]:
    """The images that are meant, sorted, with their paths below the folder that was given.

    Of a folder or a pattern and what is below it these are not hidden files, and not what lies in
    `output`, which an earlier run made of them. Files that are named are images whatever their
    suffix is. The second item counts the files of other kinds by suffix.

    Raises:
        InputError: there is no image, or `output` is the folder of the images.
    """
    found: dict[Path, Path] = {}
    others: set[Path] = set()
    matches = [pair for path in given for pair in _matches(path)]
    named = [path.parent.absolute() for path, base in matches if base is None]
    common = Path(os.path.commonpath(named)) if named else Path()
    target = output.resolve()
    for path, base in matches:
        place = path.resolve()
        if base and base.resolve() in target.parents and target in (place, *place.parents):
            continue
        if not path.is_dir():
            below = {path: path.relative_to(base) if base else path.absolute().relative_to(common)}
        elif place == target:
            raise InputError(f"--output {output} is the folder of the images: give another one")
        else:
            inside = files(path, without=output)
            below = {file: file.relative_to(base or path) for file in inside}
        for file in below:
            if is_image(file) or (file == path and base is None):
                found[file] = below[file]
            else:
                others.add(file)
    counts = Counter(path.suffix.lower() for path in others)
    if not found:
        suffixes = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        passed = f", passed over {kinds(counts)}" if counts else ""
        raise InputError(
            f"no image was found in --images {_listed(given)} (looked for {suffixes}{passed})"
        )
    return sorted(found.items(), key=itemgetter(1)), counts


def _matches(path: Path) -> list[tuple[Path, Path | None]]:
    """What a path or a pattern stands for, with the folder that a pattern starts from."""
    if path.exists():
        return [(path, None)]
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
    base = Path(*fixed)
    matches = glob.glob(str(path), recursive=True) if base != path else []
    if not matches:
        raise InputError(
            f"--images {path} is not a folder, no file and no pattern of files that exist"
        )
    return [(Path(match), base) for match in sorted(matches)]


def _listed(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _write(job: Job, image: Image.Image, ids: np.ndarray, palette: Sequence[Sequence[int]]) -> None:
    indexed = Image.fromarray(ids)
    indexed.putpalette([value for color in palette for value in color])
    with writing(job.ids):
        job.ids.parent.mkdir(parents=True, exist_ok=True)
        indexed.save(job.ids)
        Image.blend(image, indexed.convert("RGB"), OVERLAY_OPACITY).save(job.overlay)


if __name__ == "__main__":
    sys.exit(main())
