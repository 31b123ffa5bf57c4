"""Adapt: `python train/adapt.py --checkpoint RUN --images DIR --output FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cac_fast.train import checkpoint, distributed
from cac_fast.train.adaptation import CROPS, unlabeled_crops, with_statistics_of
from cac_fast.train.config import Config
from cac_fast.train.data.opening import open_lists
from cac_fast.train.errors import InputError, fitting
from cac_fast.train.inference import load
from cac_fast.train.options import Parser
from cac_fast.train.predict import find_images
from cac_fast.train.progress import show_progress
from cac_fast.train.registry import LAYOUTS
from cac_fast.train.settings import FIELDS

_KEPT = ("backbone", "config", "classes", "palette", "iteration")
"""Of the checkpoint: all but the network's state, its score and what a training goes on from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Adapt; 0 at the end, 2 after one line about bad input."""
    parser = Parser(
        prog="train/adapt.py",
        description="Write a copy of a checkpoint whose batch-norm statistics are those of images "
        f"without masks: of {CROPS} crops of them. For images in another light, or of another "
        "camera, than those with masks. No weight changes; evaluate, predict and export take the "
        "copy as they take the checkpoint.",
    )
    parser.add_network_options()
    text = (
        "folder of images, image files, or a pattern as 'photos/**/*.jpg' [the unlabeled images "
        "that the run was given, or without any the labeled ones]"
    )
    parser.add_path("--images", "PATH", text, nargs="+")
    parser.add_path("--output", "FILE", "checkpoint to write", required=True, writable=True)
    return distributed.run_command(lambda: _adapt(parser.parse_args(arguments)))


def _adapt(options: argparse.Namespace) -> None:
    if distributed.world_size() > 1:
        raise InputError("adapt is a single process: start it with python, not with torchrun")
    source = checkpoint.find(options.checkpoint)
    _check_output(options.output, source)
    predictor = load(source, distributed.pick_device(options.device))
    state = checkpoint.read(source)
    # A newer version may have more settings; those that say how to crop are old.
    config = Config.of(**{key: state["config"][key] for key in FIELDS if key in state["config"]})
    if options.images is None:
        paths = _images_of_run(config)
    else:
        found, _ = find_images(options.images, options.output)
        paths = [path for path, _ in found]
    crops = unlabeled_crops(config, paths, show_progress("crops"))
    size = f"{config.data.crop_size} x {config.data.crop_size}"
    with fitting(f"8 crops of {size} do not fit in memory: use --device cpu, or more memory"):
        adapted = with_statistics_of(predictor, crops)
    kept = {name: state[name] for name in _KEPT if name in state}
    checkpoint.write(options.output, kept | {"network": adapted.network.state_dict()})
    print(f"{options.output}: batch statistics of {CROPS} crops drawn from {len(paths)} images")


def _images_of_run(config: Config) -> list[Path]:
    try:
        LAYOUTS.check_own(config.data.dataset)
        _, _, samples = open_lists(config)
    except InputError as error:
        raise InputError(
            f"the run's unlabeled images cannot be opened ({error}): give --images"
        ) from error
    return [sample.image for sample in samples]


def _check_output(output: Path, source: Path) -> None:
    of_a_run = output.name in ("best.pt", "last.pt") and (output.parent / "config.json").exists()
    if of_a_run or output.resolve() == source.resolve():
        raise InputError(f"--output {output} would overwrite a run's own state: give another file")
    if not output.exists():
        return
    try:
        former = checkpoint.read(output)
    except InputError as error:
        raise InputError(
            f"--output {output} is no checkpoint and would be overwritten: give another file"
        ) from error
    if "optimizer" in former:
        raise InputError(f"--output {output} is what a run goes on from: give another file")


if __name__ == "__main__":
    sys.exit(main())
