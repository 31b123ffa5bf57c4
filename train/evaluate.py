"""Evaluate: `python train/evaluate.py --checkpoint FILE --dataset voc --data-dir DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cac_fast.train import distributed
from cac_fast.train.errors import InputError
from cac_fast.train.options import Parser, add_data_options, add_device_option, at_least


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print the table; 0 at the end, 2 after one line about bad input."""
    return distributed.run_command(lambda: _evaluate(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train/evaluate.py",
        description="IoU of each class, mIoU and pixel accuracy of a checkpoint, in float32, over "
        "images in their original size. Under torchrun the images are shared out over the "
        "processes.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="RUN",
        help="a run folder, or its best.pt or last.pt",
    )
    add_data_options(parser)
    parser.add_argument(
        "--split",
        choices=("val", "test", "train"),
        default="val",
        help="images to evaluate on [val]",
    )
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="only these images of the split, a NAME or path a line",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result to this file too"
    )
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=2,
        metavar="N",
        help="processes that read images, per rank [2]",
    )
    add_device_option(parser)
    return parser.parse_args(arguments)


def _evaluate(options: argparse.Namespace) -> None:
    # Imported late, so that a mistyped option is answered at once.
    from cac_fast.train.data.layouts import open_data
    from cac_fast.train.data.lists import named
    from cac_fast.train.evaluation import evaluate
    from cac_fast.train.inference import load
    from cac_fast.train.progress import show_progress

    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise InputError(f"--json {options.json}: give a file in a folder that exists")
    with distributed.world(options.device) as world:
        # toycity may be written on the way, once.
        data = world.on_main(lambda: open_data(options.dataset, options.data_dir))
        predictor = load(options.checkpoint, world.device)
        _check_classes(predictor.classes, data.classes, options.checkpoint)
        samples = data.splits[options.split]
        if not samples:
            raise InputError(
                f"the {options.split} split of {data.root} holds no image: choose another --split"
            )
        if options.names is not None:
            samples = named(samples, options.names)
        result = evaluate(
            predictor.network,
            samples,
            data,
            world,
            workers=options.workers,
            progress=show_progress("images") if world.is_main else None,
        )
        if not world.is_main:
            return
        print(_table(data.classes, result))
        if options.json is not None:
            about = {
                "checkpoint": str(options.checkpoint),
                "dataset": options.dataset,
                "split": options.split,
                "names": None if options.names is None else options.names.name,
                "images": len(samples),
                "classes": list(data.classes),
            }
            _write_json(options.json, about | result)


def _check_classes(trained: Sequence[str], given: Sequence[str], path: Path) -> None:
    if len(trained) != len(given):
        raise InputError(
            f"checkpoint {path} knows {len(trained)} classes but the data has {len(given)}: "
            "give the --dataset and --data-dir it was trained for"
        )
    for index, (theirs, ours) in enumerate(zip(trained, given, strict=True)):
        if theirs != ours:
            raise InputError(
                f"class {index} is '{theirs}' in checkpoint {path} but '{ours}' in the data: "
                "give the --dataset and --data-dir it was trained for"
            )


def _table(classes: Sequence[str], result: dict[str, Any]) -> str:
    """Names and numbers; `-` for a class that is neither in a mask nor in a prediction."""
    rows = [
        (name, "-" if iou is None else f"{iou:.4f}")
        for name, iou in zip(classes, result["iou"], strict=True)
    ]
    summary = [
        ("mIoU", f"{result['miou']:.4f}"),
        ("pixel accuracy", f"{result['pixel_accuracy']:.4f}"),
    ]
    width = max(len(name) for name, _ in rows + summary)
    lines = [f"{name:<{width}}  {value:>6}" for name, value in [("class", "IoU"), *rows, *summary]]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1 : 1 + len(rows)], rule, *lines[1 + len(rows) :]])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
