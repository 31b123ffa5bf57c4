"""Predict: ``python train/predict.py --checkpoint FILE --images DIR --output DIR``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cac_fast.train import distributed
from cac_fast.train.errors import InputError
from cac_fast.train.options import Parser, add_device_option

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from cac_fast.train.inference import Predictor

OVERLAY_OPACITY = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict every image; 0 if at least one was, 2 after one line about bad input."""
    return distributed.run_command(lambda: _predict(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train/predict.py",
        description="Write NAME.png (class ids, with the classes' colors as palette) and "
        "NAME_overlay.png for every image in a folder and the folders in it.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="RUN",
        help="a run folder, or its best.pt or last.pt",
    )
    parser.add_argument(
        "--images", required=True, type=Path, metavar="DIR", help="folder of images"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder for the predictions"
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help="give the network N x N pixels at a time, for images too large for memory (try 1024)",
    )
    add_device_option(parser)
    return parser.parse_args(arguments)


class Job(NamedTuple):
    """One image and the two files that are made of it."""

    image: Path
    ids: Path
    overlay: Path


def _predict(options: argparse.Namespace) -> None:
    # Imported late, so that a mistyped option is answered at once.
    from cac_fast.train.data.images import read_image
    from cac_fast.train.inference import SMALLEST_TILE, load
    from cac_fast.train.progress import show_progress, warn

    if distributed.world_size() > 1:
        raise InputError("predict is a single process: start it with python, not with torchrun")
    if options.tile is not None and options.tile < SMALLEST_TILE:
        raise InputError(
            f"--tile {options.tile} is too small: use at least {SMALLEST_TILE}, better 1024"
        )
    jobs = plan(options.images, options.output)
    predictor = load(options.checkpoint, distributed.pick_device(options.device))
    show, skipped = show_progress("images"), 0
    for done, job in enumerate(jobs, start=1):
        try:
            image = read_image(job.image)
        except InputError as error:
            skipped += 1
            warn(f"skipped: {error}")
        else:
            _write(job, image, _ids(predictor, image, options.tile, job.image), predictor.palette)
        show(done, len(jobs))
    if skipped == len(jobs):
        raise InputError(
            f"none of the {skipped} images in {options.images} can be read: nothing was written"
        )
    print(f"{len(jobs) - skipped} images predicted, {skipped} skipped: {options.output}")


def plan(images: Path, output: Path) -> list[Job]:
    """What to write for every image below ``images``; relative paths are kept below ``output``.

    Raises:
        InputError: there is no image, or a file would be written twice or over an image.
    """
    if not images.is_dir():
        raise InputError(f"--images {images} is not a folder")
    if images.resolve() == output.resolve():
        raise InputError(f"--output {output} is the folder of the images: give another one")
    sources = find_images(images, output)
    originals = {source.resolve() for source in sources}
    made_of: dict[Path, Path] = {}
    jobs = []
    for source in sources:
        target = output / source.relative_to(images)
        job = Job(
            source,
            target.with_name(f"{target.stem}.png"),
            target.with_name(f"{target.stem}_overlay.png"),
        )
        for path in (job.ids, job.overlay):
            if path.resolve() in originals:
                raise InputError(
                    f"{path} is one of the images and would be overwritten: give another --output"
                )
            if path in made_of:
                raise InputError(
                    f"{made_of[path]} and {source} would both be written to {path}: "
                    "rename one of them"
                )
            made_of[path] = source
        jobs.append(job)
    return jobs


def find_images(folder: Path, output: Path) -> list[Path]:
    """Images in ``folder`` and below, sorted; not hidden files and what lies in ``output``.

    Raises:
        InputError: there is none.
    """
    from cac_fast.train.data.layouts import IMAGE_SUFFIXES

    found = []
    # An output folder inside the images' holds what an earlier run made of them.
    visited = {output.resolve()}
    for place, folders, names in os.walk(folder, followlinks=True):
        if Path(place).resolve() in visited:
            folders.clear()
            continue
        visited.add(Path(place).resolve())
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(place, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    if not found:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise InputError(f"no image was found in --images {folder} (looked for {kinds})")
    return sorted(found)


def _ids(predictor: Predictor, image: Image.Image, tile: int | None, path: Path) -> np.ndarray:
    from cac_fast.train.inference import out_of_memory

    try:
        return predictor.predict(image, tile)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        remedy = "--tile 1024" if tile is None else "a smaller --tile"
        raise InputError(
            f"image {path} ({image.width} x {image.height}) does not fit in memory: use {remedy}"
        ) from error


def _write(job: Job, image: Image.Image, ids: np.ndarray, palette: Sequence[Sequence[int]]) -> None:
    from PIL import Image

    indexed = Image.fromarray(ids)
    indexed.putpalette([value for color in palette for value in color])
    try:
        job.ids.parent.mkdir(parents=True, exist_ok=True)
        indexed.save(job.ids)
        Image.blend(image, indexed.convert("RGB"), OVERLAY_OPACITY).save(job.overlay)
    except OSError as error:
        raise InputError(f"{job.ids} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
