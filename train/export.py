"""Export: `python train/export.py --checkpoint RUN --format onnx --output FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cac_fast.train import checkpoint, distributed
from cac_fast.train.data.images import read_image
from cac_fast.train.data.layouts import open_data
from cac_fast.train.errors import InputError
from cac_fast.train.exporting import FORMATS, RESULTS, check_packages, describe, export
from cac_fast.train.inference import load
from cac_fast.train.options import Parser
from cac_fast.train.registry import LAYOUTS

MOST = 1024
"""Pixels a side of an image that nobody named: a photograph may be too large for the memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; 0 at the end, 1 if the file differs from the network, 2 after one line about bad
    input."""
    parser = Parser(
        prog="train/export.py",
        description="Write the network of a run into one file that needs nothing of this program: "
        "RGB images (B, 3, H, W) uint8 of any size in, class ids or logits of every pixel out. "
        "The file is run and compared with PyTorch; one that differs is deleted.",
    )
    text = "a run folder, or its best.pt or last.pt"
    parser.add_path("--checkpoint", "RUN", text, required=True)
    text = "onnx (for onnxruntime and others) or torch (for torch.export.load)"
    parser.add_argument("--format", choices=FORMATS, required=True, help=text)
    parser.add_path("--output", "FILE", "file to write", required=True, writable=True)
    text = "labels: class ids (B, H, W) uint8; logits: (B, K, H, W) float32 [labels]"
    parser.add_argument("--result", choices=RESULTS, default="labels", help=text)
    text = "an image to compare on as well as on made-up ones [one of the run's data]"
    parser.add_path("--image", "FILE", text)
    return distributed.run_command(lambda: _export(parser.parse_args(arguments)))


def _export(options: argparse.Namespace) -> int:
    if distributed.world_size() > 1:
        raise InputError("export is a single process: start it with python, not with torchrun")
    check_packages(options.format)
    asked = None if options.image is None else (options.image, _pixels(options.image))
    predictor = load(options.checkpoint)
    chosen = asked or _image_of_run(options.checkpoint)
    about = describe(options.checkpoint, predictor, options.result)
    pixels = [] if chosen is None else [chosen[1]]
    difference = export(predictor, about, options.output, options.format, pixels)
    if not difference.is_rounding:
        print(
            f"error: what {options.format} makes of the network is not the network: {difference}; "
            "the file was deleted",
            file=sys.stderr,
        )
        return 1
    size = options.output.stat().st_size / 1e6
    on = "made-up images alone (--image FILE adds one)" if chosen is None else chosen[0]
    print(f"{options.output}: {size:.1f} MB, run and compared with PyTorch on {on}: {difference}")
    return 0


def _pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)


def _image_of_run(run: Path) -> tuple[Path, Tensor] | None:
    """An image of the data that a run learned from, of val if there is one, and its pixels
    (3, H, W), of a large one the middle; None where the data are gone or cannot be opened."""
    config = checkpoint.read(checkpoint.find(run))["config"]
    folder, dataset = config.get("data_dir"), config.get("dataset")
    with suppress(InputError, OSError):  # a folder that may not be entered raises too
        if folder is None or not Path(folder).is_dir():
            return None
        LAYOUTS.check_own(dataset)
        splits = open_data(dataset, Path(folder)).splits
        for sample in [*splits.get("val", ()), *splits["train"]][:1]:
            pixels = _pixels(sample.image)
            top, left = (max(0, side - MOST) // 2 for side in pixels.shape[1:])
            return sample.image, pixels[:, top : top + MOST, left : left + MOST]
    return None


if __name__ == "__main__":
    sys.exit(main())
