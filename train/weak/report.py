"""What pseudo masks hold, and how right they are where there is truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.layouts import SegmentationData
from cac_fast.train.evaluation import ConfusionMatrix
from cac_fast.train.weak.labels import ImageLabels
from cac_fast.train.weak.masks import confusion, truth_of


def describe_masks(
    labels: ImageLabels, paths: Sequence[Path], data: SegmentationData
) -> dict[str, Any]:
    """What `pseudo.json` says of finished masks; images without a file are left out.

    Of each class: `images` and `image_share` with its label, `pixels` in the masks, and `precision`
    of these. `covered`: share of pixels that are not 255. Where there is truth (`with_truth`
    images): `miou` and `pixel_accuracy` of covered pixels, irn's figure (every pixel decided at
    0.15), and what a mask of the most frequent true class alone would have, on the same pixels and
    on all. None where there is no truth.
    """
    classes = data.num_classes
    pixels, known = np.zeros(256, np.int64), np.zeros(classes, np.int64)
    counts, irn = np.zeros((2, classes, classes), np.int64)
    with_truth = 0
    for sample, path in zip(labels.samples, paths, strict=True):
        if not path.is_file():
            continue
        with Image.open(path) as file:
            mask, text = np.array(file), file.info.get("irn")
        pixels += np.bincount(mask.ravel(), minlength=256)
        truth = truth_of(sample, data)
        if truth is None:
            continue
        with_truth += 1
        known += np.bincount(truth.ravel(), minlength=256)[:classes]
        counts += confusion(truth, mask, classes)
        for true, given, number in json.loads(text or "[]"):
            irn[true, given] += number
    found = counts.sum(0)
    images = [sum(index in ids for ids in labels.labels) for index in range(classes)]
    frequent = int(known.argmax())
    return {
        "images": len(labels.samples),
        "with_truth": with_truth,
        "covered": float(1 - pixels[IGNORE] / max(1, pixels.sum())),
        "classes": [
            {
                "name": name,
                "images": images[index],
                "image_share": images[index] / len(labels.samples),
                "pixels": int(pixels[index]),
                "precision": float(counts[index, index] / found[index]) if found[index] else None,
            }
            for index, name in enumerate(data.classes)
        ],
        "masks": _scores(counts),
        "irn": _scores(irn),
        "most_frequent": {
            "class": data.classes[frequent] if with_truth else None,
            "covered_pixels": _scores(_constant(counts.sum(1), frequent)),
            "all_pixels": _scores(_constant(known, frequent)),
        },
    }


def as_table(about: dict[str, Any]) -> str:
    """The same for people to read."""
    names = [item["name"] for item in about["classes"]]
    width = max(map(len, (*names, "class")))
    rows = [f"{'class':<{width}}  images   share  of pixels  precision"]
    total = max(1, sum(item["pixels"] for item in about["classes"]))
    for item in about["classes"]:
        rows.append(
            f"{item['name']:<{width}}  {item['images']:>6}  {item['image_share']:>6.1%}  "
            f"{item['pixels'] / total:>9.1%}  {_number(item['precision']):>9}"
        )
    rows.append(f"covered: {about['covered']:.1%} of the pixels, the others are {IGNORE}")
    if about["with_truth"]:
        constant = about["most_frequent"]
        lines = {
            "pseudo masks, covered pixels": about["masks"],
            "decided at 0.15 (irn's figure)": about["irn"],
            f"{constant['class']} alone, covered pixels": constant["covered_pixels"],
            f"{constant['class']} alone, all pixels": constant["all_pixels"],
        }
        rows.append(f"against the true masks of {about['with_truth']} images:")
        width = max(map(len, lines))
        for name, scores in lines.items():
            rows.append(
                f"{name:<{width}}  mIoU {_number(scores['miou'])}  "
                f"pixel accuracy {_number(scores['pixel_accuracy'])}"
            )
    return "\n".join(rows)


def _constant(known: np.ndarray, index: int) -> np.ndarray:
    """The confusion matrix of a mask of one class, given the true pixels of each."""
    counts = np.zeros((len(known), len(known)), np.int64)
    counts[:, index] = known
    return counts


def _scores(counts: np.ndarray) -> dict[str, float | None]:
    if not counts.any():
        return {"miou": None, "pixel_accuracy": None}
    matrix = ConfusionMatrix(len(counts), "cpu")
    matrix.counts = torch.from_numpy(counts)
    return {"miou": matrix.miou, "pixel_accuracy": matrix.pixel_accuracy}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
