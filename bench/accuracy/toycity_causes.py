"""Where CAC's gain on the toy city comes from: batch norm's statistics, the light or the context.

    python bench/accuracy/toycity_causes.py --runs runs/toycity

Takes the runs of the comparison on the toy city and scores their last states again: with
batch-norm statistics taken anew from the same unlabeled crops for both methods (in training only
CAC's see unlabeled images), and on further scenes in which context and light vary one at a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.arms import METHODS
from cac_fast.train import load
from cac_fast.train.adaptation import CROPS, cut, with_statistics_of
from cac_fast.train.data.augment import UnlabeledTransform
from cac_fast.train.data.toycity.dataset import SEED, plan
from cac_fast.train.data.toycity.scene import BEFORE, Scene, draw_scene
from cac_fast.train.evaluation import ConfusionMatrix
from cac_fast.train.inference import Predictor
from cac_fast.train.registry import LAYOUTS
from lib.measure import ROOT, command_line, facts, write_record

FURTHER = 60
"""Scenes a case."""
CASES = {
    "labeled ones' context, daylight": (True, False),
    "labeled ones' context, any light": (True, True),
    "free context, daylight": (False, False),
}


def further_scenes(misleading: bool, varied_light: bool) -> list[Scene]:
    """Scenes of no split, the same objects and rows for every light."""
    streets = tuple(BEFORE)
    return [
        draw_scene(
            np.random.default_rng([SEED, 3, number]),
            streets[number % len(streets)],
            misleading=misleading,
            varied_light=varied_light,
        )
        for number in range(FURTHER)
    ]


def miou(predictor: Predictor, scenes: list[Scene]) -> float:
    """mIoU over `scenes` in points."""
    confusion = ConfusionMatrix(len(predictor.classes), "cpu")
    for scene in scenes:
        labels = predictor.predict(Image.fromarray(scene.image))
        confusion.update(torch.from_numpy(scene.label), torch.from_numpy(labels))
    return 100 * confusion.miou


def unlabeled_crops() -> list[Tensor]:
    """Batches (8, 3, c, c) uint8 as the trainer cuts them, without photometric changes."""
    preset = LAYOUTS.entry("toycity").preset
    transform = UnlabeledTransform(
        preset["crop_size"], preset["unlabeled_scale"], photometric=False
    )
    scenes = [scene for scene in plan() if scene.split == "train" and not scene.misleading]
    images = (Image.fromarray(scene.draw().image) for scene in scenes[:CROPS])
    return list(cut(images, transform, np.random.default_rng(0)))


def main(arguments: list[str]) -> None:
    """Score all runs, print a table and write `--json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "runs" / "toycity",
        help="folder of the comparison's runs (default: runs/toycity)",
    )
    parser.add_argument("--seeds", default="0,1,2", help="of the runs (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    options = parser.parse_args(arguments)

    val = [scene.draw() for scene in plan() if scene.split == "val"]
    cases = {name: further_scenes(*case) for name, case in CASES.items()}
    crops = unlabeled_crops()
    scores: dict[str, dict[str, list[float]]] = {}
    for seed in options.seeds.split(","):
        for method in METHODS:
            predictor = load(options.runs / f"{method}-lists-seed{seed}" / "last.pt")
            row = {"val": miou(predictor, val)}
            row["val, statistics taken anew"] = miou(with_statistics_of(predictor, crops), val)
            row |= {name: miou(predictor, scenes) for name, scenes in cases.items()}
            print(f"seed {seed} {method}: " + ", ".join(f"{n} {v:.1f}" for n, v in row.items()))
            for name, score in row.items():
                scores.setdefault(name, {m: [] for m in METHODS})[method].append(score)

    print("| scored on | supervised | CAC | gain, by seed |\n|---|---|---|---|")
    for name, found in scores.items():
        supervised, cac = (found[method] for method in METHODS)
        gains = ", ".join(f"{b - a:+.1f}" for a, b in zip(supervised, cac, strict=True))
        print(
            f"| {name} | {statistics.mean(supervised):.1f} | {statistics.mean(cac):.1f} | {gains} |"
        )
    if options.json is not None:
        record = {
            "command": command_line("bench/accuracy/toycity_causes.py", arguments),
            **facts(torch.device("cpu")),
            "miou": scores,
        }
        write_record(options.json, record)


if __name__ == "__main__":
    main(sys.argv[1:])
