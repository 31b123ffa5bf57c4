"""Evaluate: `python train/evaluate.py --checkpoint FILE --dataset voc --data-dir DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cac_fast.train import distributed
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.lists import named
from cac_fast.train.errors import InputError
from cac_fast.train.evaluation import evaluate
from cac_fast.train.inference import load
from cac_fast.train.options import Parser, add_data_options, at_least, write_json
from cac_fast.train.progress import show_progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print the table; 0 at the end, 2 after one line about bad input."""
    parser = Parser(
        prog="train/evaluate.py",
        description="IoU of each class, mIoU and pixel accuracy of a checkpoint, in float32, over "
        "images in their original size. Under torchrun the images are shared out over the "
        "processes.",
    )
    parser.add_network_options()
    add_data_options(parser)
    splits = "val", "test", "train"
    parser.add_argument(
        "--split", choices=splits, default="val", help="images to evaluate on [val]"
    )
    parser.add_path("--names", "FILE", "only these images of the split, a NAME or path a line")
    parser.add_path("--json", "FILE", "write the result to this file too", writable=True)
    text = "processes that read images, per rank [2]"
    parser.add_argument("--workers", type=at_least(0), default=2, metavar="N", help=text)
    return distributed.run_command(lambda: _evaluate(parser.parse_args(arguments)))


def _evaluate(options: argparse.Namespace) -> None:
    with distributed.world(options.device) as world:
        # toycity may be written on the way, once.
        data = world.on_main(lambda: open_data(options.dataset, options.data_dir))
        predictor = load(options.checkpoint, world.device)
        check_classes(predictor.classes, data.classes, options.checkpoint)
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
        about = {
            "checkpoint": str(options.checkpoint),
            "dataset": options.dataset,
            "split": options.split,
            "names": None if options.names is None else options.names.name,
            "images": len(samples),
            "classes": list(data.classes),
        }
        write_json(options.json, about | result)


def check_classes(trained: Sequence[str], given: Sequence[str], path: Path) -> None:
    """Raise InputError if the classes of checkpoint `path` are not those of the data."""
    if tuple(trained) == tuple(given):
        return
    if len(trained) != len(given):
        found = f"checkpoint {path} knows {len(trained)} classes but the data has {len(given)}"
    else:
        pairs = enumerate(zip(trained, given, strict=True))
        index, (theirs, ours) = next(item for item in pairs if len(set(item[1])) > 1)
        found = f"class {index} is '{theirs}' in checkpoint {path} but '{ours}' in the data"
    raise InputError(f"{found}: give the --dataset and --data-dir it was trained for")


def _table(classes: Sequence[str], result: dict[str, Any]) -> str:
    """Names and numbers; `-` for a class that is neither in a mask nor in a prediction."""
    names = *classes, "mIoU", "pixel accuracy"
    values = *result["iou"], result["miou"], result["pixel_accuracy"]
    cells = ["-" if value is None else f"{value:.4f}" for value in values]
    width = max(map(len, names))
    head = f"{'class':<{width}}  {'IoU':>6}"
    rows = [f"{name:<{width}}  {cell:>6}" for name, cell in zip(names, cells, strict=True)]
    rule = "-" * len(head)
    return "\n".join([head, rule, *rows[:-2], rule, *rows[-2:]])


if __name__ == "__main__":
    sys.exit(main())
