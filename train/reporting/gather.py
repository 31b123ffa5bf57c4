"""What run folders hold of their runs. What is missing there is named and ends nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cac_fast.train import provenance
from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.errors import InputError
from cac_fast.train.inference import Predictor
from cac_fast.train.log import read_metrics
from cac_fast.train.settings import FIELDS

_FILES = "config.json", "metrics.jsonl", "best.pt", "last.pt"


@dataclass
class Scored:
    """A network over the val images of a run's data.

    file: the checkpoint's name. miou: of the set. counts: (K, K) int64, rows are the true classes.
    scores: of each image the mean IoU over its true classes, None where all is ignored. ious: of
    each image the IoU of its true classes, None for the others.
    """

    predictor: Predictor
    data: SegmentationData
    file: str
    miou: float
    counts: Tensor
    scores: list[float | None]
    ious: list[list[float | None]]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The images."""
        return self.data.splits["val"]

    @property
    def mean_over_images(self) -> float:
        """Mean of `scores`."""
        scores = [score for score in self.scores if score is not None]
        return sum(scores) / len(scores)


@dataclass
class Run:
    """One run.

    settings: by name; empty if there is no `config.json`. train, val: the lines of
    `metrics.jsonl`. commits, devices: of all starts, as `trained_with.json` says.
    classes: names of the classes; () if nothing says them. gaps: one sentence for each thing that
    is missing. scored: what the network does on val, None if it could not be run.
    """

    name: str
    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    gaps: list[str] = field(default_factory=list)
    scored: Scored | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of `best.pt`: the first one with the highest mIoU."""
        scored = [line for line in self.val if number(line.get("miou")) is not None]
        return max(scored, key=lambda line: line["miou"], default=None)

    @property
    def iterations(self) -> int | None:
        """The last iteration that `metrics.jsonl` knows of."""
        return max((line["iteration"] for line in (*self.train, *self.val)), default=None)

    @property
    def iou(self) -> list[float | None]:
        """IoU of each class at the best evaluation; None for a class that does not occur."""
        values = self.best.get("iou") if self.best else None
        return [number(value) for value in values] if isinstance(values, list) else []


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the folders of runs.

    Raises:
        InputError: one is no run folder, or is given twice.
    """
    places = Counter(path.resolve() for path in paths)
    (place, times), *_ = places.most_common(1)
    if times > 1:
        raise InputError(f"{place} is given {times} times: name each run once")
    names = Counter(place.name for place in places)
    return [
        _read_run(path, place.name if names[place.name] == 1 else str(place))
        for path, place in zip(paths, places, strict=True)
    ]


def defaults() -> Run:
    """The defaults of all settings, in the form of a run."""
    values = {name: one.default for name, one in FIELDS.items()}
    lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    return Run("default", Path(), settings=values | lists)


def setting(run: Run, name: str) -> Any:
    """A setting of a run: a run made before it was there did what is the default now."""
    return run.settings.get(name, defaults().settings.get(name))


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that differ between the runs; of a single run from the defaults."""
    known = [run for run in runs if run.settings]
    compared = [*known, defaults()] if len(runs) == 1 else known
    return [
        name
        for name in all_settings(known)
        if name != "output" and len({json.dumps(setting(run, name)) for run in compared}) > 1
    ]


def all_settings(runs: Sequence[Run]) -> list[str]:
    """Names of all settings of the runs, in their files' order."""
    return list(dict.fromkeys(name for run in runs for name in run.settings))


def _read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the folder that a run wrote (--output)")
    if not any((path / file).is_file() for file in _FILES):
        raise InputError(
            f"{path} is not a run folder, as it holds none of {', '.join(_FILES)}: "
            "give the folder that a run wrote (--output)"
        )
    run = Run(name, path)
    run.settings = _read_json(path / "config.json", run.gaps)
    if not run.settings:
        run.gaps.append("There is no config.json: settings are missing.")
    for line in _read_lines(path / "metrics.jsonl", run.gaps):
        (run.train if line["kind"] == "train" else run.val).append(line)
    if run.train and not run.val:
        run.gaps.append("metrics.jsonl holds no evaluation: scores on val are missing.")
    if run.val and not run.train:
        run.gaps.append("metrics.jsonl holds no line of the training: losses are missing.")
    note = _read_json(path / provenance.FILE, run.gaps)
    run.commits = [str(commit) for commit in _list(note.get("commits"))]
    run.devices = [str(device) for device in _list(note.get("devices"))]
    return run


def _read_json(path: Path, gaps: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        gaps.append(f"{path.name} cannot be read: {error}.")
        return {}
    return content if isinstance(content, dict) else {}


def _read_lines(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    """The lines that have a known kind and an iteration."""
    if not path.is_file():
        gaps.append("There is no metrics.jsonl: curves, scores and speed are missing.")
        return []
    try:
        lines, total = read_metrics(path), len(path.read_text().splitlines())
    except (OSError, ValueError) as error:
        gaps.append(f"metrics.jsonl cannot be read: {error}.")
        return []
    if not total:
        gaps.append("metrics.jsonl is empty: curves, scores and speed are missing.")
    elif len(lines) < total:
        gaps.append(f"metrics.jsonl breaks off in line {len(lines) + 1} of {total}.")
    good = [line for line in lines if _is_line(line)]
    if len(good) < len(lines):
        gaps.append(f"{len(lines) - len(good)} lines of metrics.jsonl have another form.")
    return good


def _is_line(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and line.get("kind") in ("train", "val")
        and isinstance(line.get("iteration"), int)
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
