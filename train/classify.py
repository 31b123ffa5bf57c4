"""Image-level labels: `python train/classify.py --dataset voc --data-dir DIR --output DIR`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cac_fast.train import distributed
from cac_fast.train.config import FIELDS, Config, add_settings, check_values
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.opening import open_lists
from cac_fast.train.data.pseudo import with_masks, write_about
from cac_fast.train.errors import InputError, check_crop
from cac_fast.train.options import Parser, add_data_options, at_least
from cac_fast.train.weak import cam
from cac_fast.train.weak.labels import FROM_MASKS, ImageLabels, find_labels
from cac_fast.train.weak.masks import CamSettings, MaskWriter
from cac_fast.train.weak.report import as_table, describe_masks
from cac_fast.train.weak.training import ClassifierRun

EPOCHS = 5
SETTINGS: dict[str, Any] = {
    name: FIELDS[name].default
    for name in (
        "labeled unlabeled labeled_share data_list workers crop_size labeled_scale base_size "
        "backbone weights iterations batch_size learning_rate head_learning_rate_factor momentum "
        "weight_decay seed device restart eval_every save_every log_every"
    ).split()
}
# CCT's, with a momentum of 0.9 in place of none and a tenth of its rates, which is the same step.
SETTINGS |= {
    "crop_size": 512,
    "labeled_scale": (0.5, 1.0),
    "base_size": 640,
    "iterations": None,
    "batch_size": 16,
    "learning_rate": 0.01,
}
PRESETS: dict[str, dict[str, Any]] = {
    "toycity": {
        "backbone": "resnet18",
        "crop_size": 56,
        "labeled_scale": (0.9, 1.7),
        "base_size": None,
        "iterations": 200,
        "batch_size": 8,
    }
}
"""By data set, in place of the defaults."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write masks; 0 at the end, 2 after one line about bad input."""
    return distributed.run_command(lambda: _classify(parse(arguments)))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options; settings that are not given are not there.

    Raises:
        InputError: an option is not there or its value cannot be used.
    """
    parser = Parser(
        prog="train/classify.py",
        description="Train a classification network on image-level labels; write pseudo masks of "
        "its class activation maps into DIR/masks, and what there is to say of them.",
        epilog="In place of the defaults: "
        + "; ".join(
            f"{key}: " + ", ".join(f"{name} {value}" for name, value in preset.items())
            for key, preset in PRESETS.items()
        ),
        argument_default=argparse.SUPPRESS,
    )
    add_data_options(parser)
    text = (
        f"a file of lines `NAME class class ...`, or {FROM_MASKS}: the classes in the masks, for "
        "experiments (voc, without it: the objects in Annotations)"
    )
    parser.add_argument("--image-labels", metavar="FILE", default=None, help=text)
    parser.add_path("--output", "DIR", "folder for network and masks", required=True)
    text = f"passes over the images, in place of --iterations [{EPOCHS}]"
    parser.add_argument("--epochs", type=at_least(1), metavar="N", default=None, help=text)
    for name, default, text in (
        ("foreground", cam.FOREGROUND, "above it a pixel is of the class of the largest map"),
        ("background", cam.BACKGROUND, "up to it a pixel is background, if the data has one"),
    ):
        kind = partial(_share, f"--cam-{name}")
        parser.add_argument(
            f"--cam-{name}", type=kind, default=default, metavar="X", help=f"{text} [{default}]"
        )
    text = f"of the image, each also mirrored [{','.join(f'{scale:g}' for scale in cam.SCALES)}]"
    parser.add_argument(
        "--cam-scales", type=_scales, default=cam.SCALES, metavar="S,S,...", help=text
    )
    add_settings(parser, SETTINGS)
    return parser.parse_args(arguments)


def _classify(options: argparse.Namespace) -> None:
    if distributed.world_size() > 1:
        raise InputError("classify is a single process: start it with python, not with torchrun")
    limits = limits_of(options)
    config, data, labels = open_all(options)
    with distributed.world(config.run.device) as world:
        run = ClassifierRun(config, world, data, labels)
        network, digest = run.train(), run.digest()
        writer = MaskWriter(network, digest, labels, data, limits, options.output)
        unreadable = writer.write()
    about = {
        "image_labels": options.image_labels or "annotations",
        "labels_read_from_masks": labels.from_masks,
        "settings": asdict(limits),
        "checkpoint": digest,
        "unreadable": unreadable,
    }
    found = describe_masks(labels, writer.paths, data)
    write_about(options.output, about | found)
    print(as_table(found))
    if labels.from_masks:
        print(f"the labels of {labels.from_masks} images were read from their masks")
    print(f"pseudo masks of {len(labels.samples) - unreadable} images: {options.output / 'masks'}")


def limits_of(options: argparse.Namespace) -> CamSettings:
    """How maps become masks.

    Raises:
        InputError: the limits exclude each other.
    """
    limits = CamSettings(options.cam_foreground, options.cam_background, options.cam_scales)
    if limits.background > limits.foreground:
        raise InputError(
            f"--cam-background {limits.background} is above --cam-foreground {limits.foreground}: "
            "lower it"
        )
    return limits


def open_all(options: argparse.Namespace) -> tuple[Config, SegmentationData, ImageLabels]:
    """What a training needs: settings, iterations among them, data, and labels of its images.

    Raises:
        InputError: as `settings_of`, or data, lists or labels cannot be used.
    """
    config, iterations = settings_of(options)
    data, labeled, unlabeled = open_lists(config)
    samples = _distinct([*labeled, *unlabeled])
    with_masks(options.output / "masks", samples)  # before hours of training
    labels = find_labels(options.image_labels, samples, data)
    if iterations is None:
        epochs = EPOCHS if options.epochs is None else options.epochs
        iterations = math.ceil(epochs * len(labels.samples) / config.optim.batch_size)
    return config.changed(iterations=iterations), data, labels


def settings_of(options: argparse.Namespace) -> tuple[Config, int | None]:
    """The settings, and how many iterations if it is said.

    Raises:
        InputError: settings exclude each other or have values that cannot be used.
    """
    given = {name: value for name, value in vars(options).items() if name in FIELDS}
    if options.epochs is not None and given.get("iterations") is not None:
        raise InputError("both --epochs and --iterations are given: give one of them")
    values = SETTINGS | PRESETS.get(options.dataset, {}) | given
    if options.epochs is not None:
        values["iterations"] = None
    iterations = values.pop("iterations")
    check_values(values | {"iterations": iterations})
    check_crop(values["crop_size"], 8)
    values["data_dir"] = str(options.data_dir) if "data_dir" in given else None
    values["output"] = str(options.output)
    # Statistics of weights that were loaded are kept.
    frozen = values["weights"] is not None
    return Config.of(**values, method="classify", freeze_bn=frozen), iterations


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    found: dict[Path, Sample] = {}
    for sample in samples:
        found.setdefault(sample.image, sample)
    return list(found.values())


def _share(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"{option} {text}: expected a number from 0 to 1")
    return value


def _scales(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < value <= 8 for value in values):
        raise InputError(f"--cam-scales {text}: expected positive numbers, as 1,0.5,1.5,2")
    return values


if __name__ == "__main__":
    sys.exit(main())
