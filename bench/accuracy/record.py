"""The record that a comparison adds to, and whether it is of the same experiment."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from accuracy.arguments import split_arguments
from accuracy.arms import ARMS
from accuracy.plan import Hours
from accuracy.runs import STATES, Job, is_finished, needed_run, run_folder, scored_parts
from cac_fast.train import config
from cac_fast.train.config import Config
from cac_fast.train.data.layouts import SegmentationData
from cac_fast.train.errors import InputError
from cac_fast.train.registry import LAYOUTS

FACTS = ("device", "architecture", "cpu", "cpu_capability", "python", "torch", "triton")
"""Where an older record says, for all its runs, what each run's `machines` say now."""


OF_SEED = " of seed "
"""In the name of a digest: what follows is the seed whose runs it concerns."""


class Former(NamedTuple):
    """What a record holds already.

    hours: those planned for a run of each arm. unfinished: the runs that have no result.
    """

    commands: list[str]
    runs: dict[Job, dict]
    digests: dict[str, str]
    hours: dict[str, Hours]
    unfinished: dict[Job, dict]


def former_record(target: Path, options: Namespace, digests: dict[str, str]) -> Former:
    """The record that this call adds to.

    Raises:
        InputError: its runs are of another experiment, or it does not say of which.
    """
    path = Path(f"{target}.json")
    if not path.is_file():
        return Former([], {}, {}, {}, {})
    asked, _ = split_arguments(options.command)
    here = config.parse([*options.data, *options.rest])
    different = []
    try:
        record = json.loads(path.read_text())
        commands = record["command"].split(" ; ")
        for command in commands:
            former, rest = split_arguments(shlex.split(command)[2:])
            there = config.parse(["--dataset", former.dataset, "--data-dir", ".", *rest])
            different += config.differences(here, there.flat())
            different += unlike(asked, here, former, there)
        known = record.get("digests", {})  # there were none at first
        different += [
            f"{key} have changed" for key in digests if key in known and known[key] != digests[key]
        ]
        machine = {name: record[name] for name in FACTS if name in record}
        runs = {_job(run): {"machines": [machine], **run} for run in record["runs"]}
        unfinished = {_job(run): run for run in record.get("unfinished", [])}
    except (AttributeError, KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(
            f"the record {path} cannot be compared with this call ({type(error).__name__}: "
            f"{error}): give another --name"
        ) from error
    if different:
        raise InputError(
            f"the record {path} is of runs with other settings or data "
            f"({'; '.join(dict.fromkeys(different))}): give another --name"
        )
    older = record.get("planned_hours_a_run", {})  # those of the whole run alone
    hours = {arm: Hours(whole, warm_up=None) for arm, whole in older.items()}
    hours |= {arm: Hours(**each) for arm, each in record.get("planned_hours", {}).items()}
    return Former(commands, runs, known, hours, unfinished)


def kept_runs(
    jobs: list[Job], former: Former, digests: dict[str, str], options: Namespace
) -> list[Job]:
    """Those of `jobs` that need no training: the record has their scores, of the data and lists
    that `digests` are of, and no folder is left that could go on.

    Not among them: what lacks a score that is asked for, what another run has to begin with, an
    adapted network whose source is there, and with `--restart` any.
    """
    if "--restart" in options.rest:
        return []
    scores = {f"{part}_{state}" for part in ("val", *scored_parts(options)) for state in STATES}
    kept: list[Job] = []
    for job in sorted(jobs, key=lambda job: needed_run(job) is not None):
        if job not in former.runs or not scores <= former.runs[job]["scores"].keys():
            continue
        of_job = {key for key in digests if key.partition(OF_SEED)[2] in ("", str(job[2]))}
        needed = needed_run(job)
        if ARMS[job[0]].adapts is not None:
            gone = needed in kept
        else:
            gone = not (run_folder(job, options) / "last.pt").is_file()
            gone = gone and (needed is None or needed in kept or is_finished(needed, options))
        if gone and of_job <= former.digests.keys():
            kept.append(job)
    begun_with = {
        needed_run(job)
        for job in jobs
        if job not in kept and (ARMS[job[0]].adapts is not None or not is_finished(job, options))
    }
    for job in begun_with.intersection(kept):
        print(f"{' '.join(map(str, job))}: trained anew, as another run begins with it")
    return [job for job in kept if job not in begun_with]


def _job(run: dict) -> Job:
    return run["method"], run["share"], run["seed"]


def content_digests(data: SegmentationData, files: dict[str, list[Path]]) -> dict[str, str]:
    """Short hashes of what the runs of one record share, wherever it lies.

    Of the names of the data's classes, images and masks, and of each entry of `files`.
    """

    def short(*texts: str) -> str:
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]

    images = [
        (split, [(item.name, item.mask is not None) for item in samples])
        for split, samples in sorted(data.splits.items())
    ]
    found = {"names of images and classes": short(repr((data.classes, images)))}
    return found | {key: short(*(p.read_text() for p in paths)) for key, paths in files.items()}


def unlike(here: Namespace, settings: Config, there: Namespace, former: Config) -> list[str]:
    """Data, lists and lengths in which a call of `compare.py` differs from a former one.

    `here` and `there` are the options before `--`, the others those behind it.
    """
    pairs: dict[str, tuple[Any, Any]] = {
        "--shrink": (here.shrink, there.shrink),
        "--data-dir": (_data_folder(here), _data_folder(there)),
    }
    pairs |= {
        name: (settings.flat()[name], former.flat()[name])
        for name in ("iterations", "labeled", "unlabeled")
    }
    for name, paths in (("lists", _lists_by_share), ("names", _names_by_part)):
        one, other = paths(here), paths(there)
        pairs |= {f"--{name} {key}": (one[key], other[key]) for key in one if key in other}
    return [
        f"{name}: {former!s} there, {now!s} here"
        for name, (now, former) in pairs.items()
        if now != former and not _may_be_one(now, former)
    ]


def _data_folder(options: Namespace) -> str | None:
    return options.data_dir or LAYOUTS.entry(options.dataset).made_in


def _lists_by_share(options: Namespace) -> dict[str, str | None]:
    if options.lists is not None:
        return {Path(options.lists).name: options.lists}
    return dict.fromkeys(options.shares.split(","))


def _names_by_part(options: Namespace) -> dict[str, str]:
    return {path.stem: str(path) for path in options.names}


def _may_be_one(one: Any, other: Any) -> bool:
    # Records keep of a path what lies in the project, and of others the last part.
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    parts = [
        [part for part in Path(os.path.normpath(path)).parts if part not in ("..", os.sep)]
        for path in (one, other)
    ]
    length = min(map(len, parts))
    return length == 0 or parts[0][-length:] == parts[1][-length:]
