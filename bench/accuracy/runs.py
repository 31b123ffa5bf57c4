"""The runs of a comparison: where they lie, what they see, and what comes of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accuracy.arms import ARMS, needed_arm
from cac_fast.train import checkpoint, config
from cac_fast.train.errors import InputError
from cac_fast.train.log import read_metrics
from lib.measure import write_record
from lib.running import RunError, run

LISTS = ("labeled.txt", "unlabeled.txt")
STATES = ("last", "best")

Job = tuple[str, str, int]
"""Arm, share and seed."""


def note_call(job: Job, options: argparse.Namespace) -> dict[str, list]:
    """The commits and machines that a run was trained with, oldest first, from `read_note`.

    Those of this call, `options.note`, are among them unless the run is finished. Of a network that
    is adapted they are the only ones, as every call does that anew.

    Raises:
        InputError: as `is_finished`.
    """
    folder = run_folder(job, options)
    if ARMS[job[0]].adapts is not None:
        return note_run(folder, options.note, begun=False)
    begun = (folder / "last.pt").is_file() and "--restart" not in options.rest
    if begun and is_finished(job, options):
        return read_note(folder)
    return note_run(folder, options.note, begun)


def note_run(folder: Path, now: dict[str, Any], begun: bool) -> dict[str, list]:
    """Add the commit and machine of `now` to a run's note, of one that has `begun` before, or
    write its first note; the note."""
    note = read_note(folder) if begun else {"commits": [], "machines": []}
    for key, value in now.items():
        if note[key][-1:] != [value]:
            note[key].append(value)
    write_record(folder / "compare.json", note)
    return note


def read_note(folder: Path) -> dict[str, list]:
    """What a run's `compare.json` says; a run that was started without it has unknown commits."""
    path = folder / "compare.json"
    noted = json.loads(path.read_text()) if path.is_file() else {"commits": ["unknown"]}
    return {"machines": [], **noted}


def scored_parts(options: argparse.Namespace) -> dict[str, list[str]]:
    """What is scored of test, by name, and the options of `train/evaluate.py` for it."""
    parts: dict[str, list[str]] = {"test": []} if options.test else {}
    return parts | {path.stem: ["--names", str(path)] for path in options.names}


def run_folder(job: Job, options: argparse.Namespace) -> Path:
    """Where a run lies."""
    arm, share, seed = job
    return options.runs / f"{arm}-{share.replace('/', '_')}-seed{seed}"


def list_folder(pattern: str, seed: int) -> Path:
    """The folder of labeled.txt and unlabeled.txt: for `{list}` the seed modulo their number.

    Raises:
        InputError: there is no such folder.
    """
    number = 0
    if "{list}" in pattern:
        while Path(pattern.replace("{list}", str(number))).is_dir():
            number += 1
    folder = Path(pattern.replace("{list}", str(seed % max(1, number))))
    for name in LISTS:
        if not (folder / name).is_file():
            raise InputError(f"--lists {pattern}: {folder / name} does not exist: correct it")
    return folder


def data_arguments(job: Job, options: argparse.Namespace) -> list[str]:
    """The options of `train/main.py` that say which masks a run may see.

    Raises:
        InputError: as `list_folder`.
    """
    arm, share, seed = job
    all_masks = ARMS[arm].all_masks
    if options.lists is not None:
        folder = list_folder(options.lists, seed)
        if not all_masks:
            names = ("labeled", "unlabeled")
            return [word for name in names for word in (f"--{name}", str(folder / f"{name}.txt"))]
        both = run_folder(job, options) / "labeled.txt"
        texts = [(folder / name).read_text() for name in LISTS]
        both.parent.mkdir(parents=True, exist_ok=True)
        both.write_text("\n".join(text.rstrip("\n") for text in texts) + "\n")
        return ["--labeled", str(both)]
    if all_masks:
        return ["--labeled-share", "full"]
    return [] if share == "lists" else ["--labeled-share", share, "--data-list", str(seed)]


def needed_run(job: Job) -> Job | None:
    """The run that another one begins with, as it learns from it or adapts it."""
    arm, share, seed = job
    needed = needed_arm(arm)
    return None if needed is None else (needed, share, seed)


def wait_for(before: Iterable[Future], name: str) -> None:
    """Wait until the runs that a run needs are over.

    Raises:
        RunError: one failed.
    """
    for future in before:
        if future.exception() is not None:
            raise RunError(f"{name} not begun, as a run that it needs failed")


def one_run(job: Job, options: argparse.Namespace, before: Iterable[Future] = ()) -> dict:
    """Train one arm once, after the runs `before`, or adapt one of these; its last and best state
    on val and what is asked for of test.

    Raises:
        RunError: training or evaluation failed, or left no validation result, or one `before` did.
        InputError: as `note_call` and `list_folder`.
    """
    arm, share, seed = job
    folder = run_folder(job, options)
    label = f"{arm} {share} seed {seed}"
    wait_for(before, label)
    data = options.data
    note = note_call(job, options)
    needed = needed_run(job)

    def score(part: str, state: str, *where: str) -> dict:
        file = folder / f"{state}-{part}.json"
        words = ["--checkpoint", str(folder / f"{state}.pt"), *where, *data, "--json", str(file)]
        run(["train/evaluate.py", *words], options.threads, label)
        return json.loads(file.read_text())

    if ARMS[arm].adapts is not None:
        iteration = adapted(run_folder(needed, options), folder, options.threads, label)
        scores = {f"val_{state}": score("val", state)["miou"] for state in STATES}
        curve = [[iteration, scores["val_last"]]]
    else:
        words = ["--method", ARMS[arm].method, *data_arguments(job, options), "--seed", str(seed)]
        words += ["--output", str(folder), *data, *options.rest, *ARMS[arm].more]
        if needed is not None:
            words += ["--teacher", str(run_folder(needed, options))]
        curve = trained(words, folder, options.threads, label)
        scores = val_scores(curve)
    iou = {}
    for part, more in scored_parts(options).items():
        for state in STATES:
            result = score(part, state, "--split", "test", *more)
            scores[f"{part}_{state}"], iou[f"{part}_{state}"] = result["miou"], result["iou"]
    names = {"method": arm, "share": share, "seed": seed, **note}
    return {**names, "scores": scores, "iou": iou, "curve": curve}


def trained(words: list[str], folder: Path, threads: int, label: str) -> list[list]:
    """Train with the options `words` of `train/main.py` into `folder`; its `val_curve`.

    Raises:
        RunError: the training failed, or left no validation result.
    """
    run(["train/main.py", *words], threads, label)
    curve = val_curve(read_metrics(folder / "metrics.jsonl"))
    if not curve:
        raise RunError(f"{label} left no validation result in {folder / 'metrics.jsonl'}")
    return curve


def adapted(source: Path, folder: Path, threads: int, label: str) -> int:
    """Write the states of the run `source` with the batch statistics of its unlabeled images into
    `folder`; the iteration of its last state.

    Raises:
        RunError: a state is not there, or cannot be adapted.
    """
    for state in STATES:
        words = ["--checkpoint", str(source / f"{state}.pt"), "--output"]
        run(["train/adapt.py", *words, str(folder / f"{state}.pt")], threads, label)
    return checkpoint.read(folder / "last.pt")["iteration"]


def val_curve(lines: list[dict]) -> list[list]:
    """Iteration and mIoU of each evaluation in the lines of a metrics.jsonl."""
    return [[line["iteration"], line["miou"]] for line in lines if line["kind"] == "val"]


def val_scores(curve: list[list]) -> dict[str, float]:
    """The last and the best mIoU of a `val_curve`."""
    return {"val_last": curve[-1][1], "val_best": max(miou for _, miou in curve)}


def unfinished_run(job: Job, options: argparse.Namespace) -> dict | None:
    """How far a run has come that has no result yet; None where it has not begun."""
    arm, share, seed = job
    folder = run_folder(job, options)
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines and not (folder / "config.json").is_file():
        return None
    return {
        "method": arm,
        "share": share,
        "seed": seed,
        "commits": read_note(folder)["commits"],
        "iteration": lines[-1]["iteration"] if lines else 0,
        "curve": val_curve(lines),
    }


def is_finished(job: Job, options: argparse.Namespace) -> bool:
    """Whether a run has made the iterations that this call asks for.

    Raises:
        InputError: the run's `last.pt` cannot be read, or a setting cannot be used.
    """
    last = run_folder(job, options) / "last.pt"
    if "--restart" in options.rest or not last.is_file():
        return False
    wanted = config.parse([*options.data, *options.rest]).optim.iterations
    return checkpoint.read(last)["iteration"] == wanted
