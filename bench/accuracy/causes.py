"""What a comparison's networks know that their scores do not tell.

    python bench/accuracy/causes.py --runs runs/camvid [--names FILE] [--json FILE]

For every run of `compare.py`: how many classes are known, and val and test again, with batch-norm
statistics taken anew from the same unlabeled crops for both methods. `--names` scores these images
of test in place of both. For those of CAC also the strength of its loss beside the cross entropy,
and, where the unlabeled images have masks, how well both ends of the pairs that it learns from know
the truth: it can gain no more than what the positives know better.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cac_fast import overlap_from_crops
from cac_fast.loss import _active, _cells, _confidence, _partner_rows
from cac_fast.train import checkpoint, load
from cac_fast.train.adaptation import unlabeled_crops, with_statistics_of
from cac_fast.train.config import Config
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.data.lists import named
from cac_fast.train.data.opening import open_lists
from cac_fast.train.data.stream import Stream
from cac_fast.train.distributed import World, run_command
from cac_fast.train.evaluation import evaluate
from cac_fast.train.methods import build_method
from cac_fast.train.methods.cac import CAC
from cac_fast.train.networks import build_network
from cac_fast.train.registry import LAYOUTS
from lib.measure import command_line, facts, progress, write_record

ALONE = World(0, 1, torch.device("cpu"))
NUM_BATCHES = 16
"""Batches of pairs."""
KNOWN_FROM_IOU = 0.1
"""IoU from which on a class counts as known."""


def taught(method: CAC, stream: Stream, known: bool) -> dict[str, float]:
    """What the contrastive loss has to teach in 16 steps, and how hard it pulls.

    pairs: of cells at one place of the image. active: of these, those that the loss learns from.
    strength: norm of the loss's gradient, times lambda, by that of the cross entropy's: root mean
    squares over the steps, of the network's weights (the projector has no cross entropy). Where the
    truth is known also anchor and positive: of the active pairs with a truth, those where this
    end's prediction is it; agree: those where both ends predict one class.
    """
    method.train()
    forward = method.joint_forward if method.joint else method.separate_forward
    weights = list(method.network.parameters())
    pairs, active, squares = 0, 0, torch.zeros(2)
    shares = torch.zeros(4, dtype=torch.int64)
    contrast, views = method.contrast, []

    def kept(*arguments: Any) -> Any:
        views[:] = arguments[:2]
        return contrast(*arguments)

    method.contrast = kept
    for step in stream.steps(0, NUM_BATCHES, with_unlabeled=True):
        loss_ce, finish, _ = forward(step.labeled, step.unlabeled)
        dc = finish()
        for place, loss in enumerate((loss_ce, method.weight * dc.loss)):
            gradient = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            squares[place] += sum(part.square().sum() for part in gradient if part is not None)
        pairs, active = pairs + int(dc.pairs), active + int(dc.active)
        if known:
            shares += _right(method, [logits.detach() for _, logits in views], step.unlabeled)
    found = {
        "pairs": pairs,
        "active": active / max(pairs, 1),
        "strength": float((squares[1] / squares[0]).sqrt()),
    }
    if known:
        of, *parts = shares.tolist()
        names = ("anchor", "positive", "agree")
        found |= {name: part / max(of, 1) for name, part in zip(names, parts, strict=True)}
    return found


def _right(method: CAC, logits: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Active cells whose pair has a truth; of these: anchor right, positive right, both alike."""
    geometry = (batch[name] for name in ("offset", "flip1", "flip2", "valid1", "valid2"))
    overlap = overlap_from_crops(*geometry, size=logits[0].shape[-2:])
    confidence, labels = _confidence(torch.cat([_cells(view) for view in logits]))
    truth = torch.cat([batch[name].flatten() for name in ("truth1", "truth2")])
    partner, paired = _partner_rows(overlap)
    loss = method.dc_loss
    active = _active(confidence, confidence[partner], loss.threshold, loss.directional)
    active &= paired & (truth != 255)
    right = labels == truth
    parts = active, active & right, active & right[partner], active & (labels == labels[partner])
    return torch.stack([mask.sum() for mask in parts])


def scored_parts(data: SegmentationData, names: Path | None) -> dict[str, list[Sample]]:
    """The images that are scored, by part: of val and of test, or of test those in a file.

    Raises:
        InputError: the file names an image that test does not have.
    """
    if names is not None:
        return {names.stem: named(data.splits["test"], names)}
    return {split: data.splits[split] for split in ("val", "test") if data.splits.get(split)}


def causes(run: Path, data_dir: Path | None, names: Path | None = None) -> dict[str, Any]:
    """What one run's last state knows; names: as of `scored_parts`, whose errors it raises."""
    state = checkpoint.read(run / "last.pt")
    moved = {} if data_dir is None else {"data_dir": str(data_dir)}
    config = Config.of(**state["config"] | {"workers": 0, "cache": None} | moved)
    LAYOUTS.check_own(config.data.dataset)
    data, labeled, unlabeled = open_lists(config)
    truth = all(sample.mask is not None for sample in unlabeled)
    config = config.changed(false_negatives=truth)
    predictor = load(run / "last.pt")
    crops = unlabeled_crops(config, [sample.image for sample in unlabeled])
    anew = with_statistics_of(predictor, crops)
    found: dict[str, Any] = {"run": run.name}
    for part, samples in scored_parts(data, names).items():
        for name, network in ((part, predictor.network), (f"{part} anew", anew.network)):
            result = evaluate(network, samples, data, ALONE, workers=0)
            found[name] = 100 * result["miou"]
            if name == "val" or (names is not None and name == names.stem):
                found["classes known"] = sum((iou or 0) > KNOWN_FROM_IOU for iou in result["iou"])
    if config.loss.method != "cac":
        return found
    # As it learned, with dropout, which a loaded network is without.
    network = build_network(
        config.model.network, config.model.backbone, len(data.classes), dropout=config.model.dropout
    )
    method = build_method(config, lambda: network, ALONE, torch.float32)
    checkpoint.load_model(method, state["method"], run / "last.pt")
    stream = Stream(config, ALONE, data, labeled, unlabeled)
    return found | taught(method, stream, known=truth)


def main(arguments: list[str]) -> None:
    """Print a line for every run below `--runs`, and write `--json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of the comparison's runs")
    parser.add_argument("--data-dir", type=Path, help="where the data are now, if they were moved")
    parser.add_argument("--names", type=Path, help="images of test to score, a NAME a line")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    options = parser.parse_args(arguments)
    record = {"command": command_line("bench/accuracy/causes.py", arguments), **facts(ALONE.device)}
    found = []
    # What `adapt.py` has written has no settings of its own, and new statistics already.
    folders = sorted(path.parent for path in options.runs.glob("*/config.json"))
    for run in (folder for folder in folders if (folder / "last.pt").is_file()):
        progress(f"scoring {run.name}")
        found.append(causes(run, options.data_dir, options.names))
        numbers = {name: value for name, value in found[-1].items() if name != "run"}
        print(f"{run.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        write_record(options.json, {**record, "runs": found})


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
