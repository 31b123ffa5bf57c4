"""Export: `python train/export.py --checkpoint RUN --format onnx --output FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch

from cac_fast.train import distributed
from cac_fast.train.data.images import read_image
from cac_fast.train.errors import InputError
from cac_fast.train.exporting import FORMATS, RESULTS, check_packages, describe, export
from cac_fast.train.inference import load
from cac_fast.train.options import Parser


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
    text = "an image to compare on as well as on made-up ones"
    parser.add_path("--image", "FILE", text)
    return distributed.run_command(lambda: _export(parser.parse_args(arguments)))


def _export(options: argparse.Namespace) -> int:
    if distributed.world_size() > 1:
        raise InputError("export is a single process: start it with python, not with torchrun")
    check_packages(options.format)
    images = [] if options.image is None else [read_image(options.image)]
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    predictor = load(options.checkpoint)
    about = describe(options.checkpoint, predictor, options.result)
    difference = export(predictor, about, options.output, options.format, pixels)
    if not difference.is_rounding:
        print(
            f"error: what {options.format} makes of the network is not the network: {difference}; "
            "the file was deleted",
            file=sys.stderr,
        )
        return 1
    size = options.output.stat().st_size / 1e6
    print(f"{options.output}: {size:.1f} MB, run and compared with PyTorch: {difference}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
