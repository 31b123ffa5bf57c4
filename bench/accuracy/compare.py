"""Supervised-only against CAC: same data, seeds, lists, iterations; a table, a curve, a JSON file.

    python bench/accuracy/compare.py --name camvid --dataset folder --data-dir DIR \\
        --shares 1/16 -- --backbone mobilenet_v2 --weights FILE --iterations 1500

What follows ``--`` goes to ``train/main.py`` as it is. ``--arms`` adds to the two what a gain has
to be seen against: ``supervised_all``, supervised with the masks of all the images (the headroom),
and ``control``, CAC with ``--dc-weight 0`` (batch statistics of the unlabeled crops alone).

The hours are planned first, from ten steps of each kind. A run that is already finished is not
repeated, and one that was interrupted goes on where it stopped. The record is written anew after
each run, with the commits that each was trained with; a later call adds its seeds and arms to it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.outcome import content_digests, plot, report, summarize, unlike
from accuracy.shrink import shrunken
from cac_fast.train import checkpoint, config
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.lists import named
from cac_fast.train.distributed import run_command
from cac_fast.train.errors import InputError
from cac_fast.train.log import read_metrics
from cac_fast.train.options import Parser
from lib.measure import ROOT, command_line, facts
from lib.running import RunError, programs, run

METHODS = ("supervised", "cac")
LISTS = ("labeled.txt", "unlabeled.txt")


class Arm(NamedTuple):
    """What a run does: a method, with the masks of all images or those of the list, and options."""

    method: str
    all_masks: bool = False
    more: tuple[str, ...] = ()


# Cheap ones first: where all masks gain nothing, the others need not run.
ARMS = {
    "supervised": Arm("supervised"),
    "supervised_all": Arm("supervised", all_masks=True),
    "control": Arm("cac", more=("--dc-weight", "0")),
    "cac": Arm("cac"),
}

Job = tuple[str, str, int]
"""Arm, share and seed."""


def note_commit(job: Job, options: argparse.Namespace) -> list[str]:
    """The commits that a run was trained with, oldest first, kept in its ``compare.json``.

    ``options.commit`` is one of them unless the run is finished; "unknown" stands for those of a
    run that was started without this file.

    Raises:
        InputError: as `is_finished`.
    """
    folder = run_folder(job, options)
    commits = []
    if (folder / "last.pt").is_file() and "--restart" not in options.rest:
        commits = noted_commits(folder)
        if is_finished(job, options):
            return commits
    if commits[-1:] != [options.commit]:
        commits = [*commits, options.commit]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", {"commits": commits})
    return commits


def noted_commits(folder: Path) -> list[str]:
    """The commits in a run's ``compare.json``."""
    path = folder / "compare.json"
    return json.loads(path.read_text())["commits"] if path.is_file() else ["unknown"]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file that is whole at any time."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(draft, path)


def scored_parts(options: argparse.Namespace) -> dict[str, list[str]]:
    """What is scored of test, by name, and the options of ``train/evaluate.py`` for it."""
    parts: dict[str, list[str]] = {"test": []} if options.test else {}
    return parts | {path.stem: ["--names", str(path)] for path in options.names}


def run_folder(job: Job, options: argparse.Namespace) -> Path:
    """Where a run lies."""
    arm, share, seed = job
    return options.runs / f"{arm}-{share.replace('/', '_')}-seed{seed}"


def list_folder(pattern: str, seed: int) -> Path:
    """The folder of labeled.txt and unlabeled.txt: for ``{list}`` the seed modulo their number.

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
    """The options of ``train/main.py`` that say which masks a run may see.

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


def one_run(job: Job, options: argparse.Namespace) -> dict:
    """Train one arm once; its last and best state on val and what is asked for of test.

    Raises:
        RunError: training or evaluation failed, or left no validation result.
        InputError: as `note_commit` and `list_folder`.
    """
    arm, share, seed = job
    folder = run_folder(job, options)
    label = f"{arm} {share} seed {seed}"
    data = options.data
    commits = note_commit(job, options)
    words = ["--method", ARMS[arm].method, *data_arguments(job, options), "--seed", str(seed)]
    words += ["--output", str(folder), *data, *options.rest, *ARMS[arm].more]
    run(["train/main.py", *words], options.threads, label)
    lines = read_metrics(folder / "metrics.jsonl")
    curve = [[line["iteration"], line["miou"]] for line in lines if line["kind"] == "val"]
    if not curve:
        raise RunError(f"{label} left no validation result in {folder / 'metrics.jsonl'}")
    scores = {"val_last": curve[-1][1], "val_best": max(miou for _, miou in curve)}
    iou = {}
    for name, more in scored_parts(options).items():
        for state in ("last", "best"):
            file = folder / f"{state}-{name}.json"
            where = ["--checkpoint", str(folder / f"{state}.pt"), "--split", "test", *more]
            run(["train/evaluate.py", *where, *data, "--json", str(file)], options.threads, label)
            result = json.loads(file.read_text())
            scores[f"{name}_{state}"], iou[f"{name}_{state}"] = result["miou"], result["iou"]
    names = {"method": arm, "share": share, "seed": seed, "commits": commits}
    return {**names, "scores": scores, "iou": iou, "curve": curve}


def unfinished_run(job: Job, options: argparse.Namespace) -> dict | None:
    """How far a run has come that has no result yet; None where its folder says nothing."""
    arm, share, seed = job
    folder = run_folder(job, options)
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        return None
    return {
        "method": arm,
        "share": share,
        "seed": seed,
        "commits": noted_commits(folder),
        "iteration": lines[-1]["iteration"],
        "curve": [[line["iteration"], line["miou"]] for line in lines if line["kind"] == "val"],
    }


def planned_hours(jobs: list[Job], options: argparse.Namespace) -> dict[str, float]:
    """Hours of a run of each arm, without evaluations, from ten steps of each kind.

    Raises:
        RunError: the steps could not be made.
        InputError: a setting cannot be used.
    """
    hours = {}
    # The dearest first: its measurement knows the steps of the others.
    arms = sorted({arm for arm, _, _ in jobs}, key=lambda arm: ARMS[arm].method)
    seconds: dict[str, float] = {}
    for arm in arms:
        job = next(job for job in jobs if job[0] == arm)
        words = ["--method", ARMS[arm].method, *data_arguments(job, options), *options.data]
        words += options.rest
        if not seconds:
            file = options.runs / "step_time.json"
            options.runs.mkdir(parents=True, exist_ok=True)
            run(["bench/lib/step_time.py", str(file), *words], options.threads, "ten steps")
            seconds = json.loads(file.read_text())
        settings = config.parse(words)
        alone = settings.iterations if settings.method == "supervised" else settings.num_warmup
        both = max(0, settings.iterations - alone) * (seconds["both"] or 0)
        hours[arm] = (min(alone, settings.iterations) * seconds["labeled"] + both) / 3600
    return hours


def is_finished(job: Job, options: argparse.Namespace) -> bool:
    """Whether a run has made the iterations that this call asks for.

    Raises:
        InputError: the run's ``last.pt`` cannot be read, or a setting cannot be used.
    """
    last = run_folder(job, options) / "last.pt"
    if "--restart" in options.rest or not last.is_file():
        return False
    wanted = config.parse([*options.data, *options.rest]).iterations
    return checkpoint.read(last)["iteration"] == wanted


def plan(jobs: list[Job], options: argparse.Namespace) -> dict[str, float]:
    """Say how many hours the runs that are not finished will take; those of each arm's runs."""
    left = [job for job in jobs if not is_finished(job, options)]
    if not left:
        return {}
    hours = planned_hours(left, options)
    total = sum(hours[arm] for arm, _, _ in left) / options.jobs
    parts = [
        f"{arm} {sum(job[0] == arm for job in left)} x {hours[arm]:.2f}"
        for arm in ARMS
        if arm in hours
    ]
    print(f"planned: {total:.1f} hours without evaluations ({', '.join(parts)})", flush=True)
    return hours


def former_record(
    target: Path, options: argparse.Namespace, digests: dict[str, str]
) -> tuple[list[str], dict[Job, dict], dict[str, str]]:
    """Commands, runs and digests of the record that this call adds to.

    Raises:
        InputError: its runs are of another experiment, or it does not say of which.
    """
    path = Path(f"{target}.json")
    if not path.is_file():
        return [], {}, {}
    asked, _ = split_arguments(options.command)
    here = config.parse([*options.data, *options.rest])
    different = []
    try:
        record = json.loads(path.read_text())
        commands = record["command"].split(" ; ")
        for command in commands:
            former, rest = split_arguments(shlex.split(command)[2:])
            there = config.parse(["--dataset", former.dataset, "--data-dir", ".", *rest])
            different += config.differences(here, dataclasses.asdict(there))
            different += unlike(asked, here, former, there)
        known = record.get("digests", {})  # there were none at first
        different += [
            f"{key} have changed" for key in digests if key in known and known[key] != digests[key]
        ]
        runs = {(run["method"], run["share"], run["seed"]): run for run in record["runs"]}
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
    return commands, runs, known


def compare(options: argparse.Namespace) -> int:
    """Run every arm, share and seed; write JSON, table and plot below ``options.results``.

    JSON and table are written after each run, the plot at the end. The JSON says how far the others
    have come, also when a signal stops them. 1 if a run failed, else 0.

    Raises:
        InputError: the data cannot be opened, a split that is scored has no image, a list is not
            there, or the record is of another experiment.
    """
    data = open_data(options.dataset, options.folder)  # toycity: written once, not by all runs
    for split in ("val", "test") if scored_parts(options) else ("val",):
        if not data.splits[split]:
            raise InputError(
                f"the {split} split of {data.root} holds no image, but runs are compared on it: "
                "add images and masks" + (" or leave out --test" if split == "test" else "")
            )
    files = {}
    for path in options.names:
        named(data.splits["test"], path)
        files[f"--names {path.stem}"] = [path]
    for seed in options.seeds if options.lists is not None else ():
        folder = list_folder(options.lists, seed)
        files[f"--lists {options.shares} of seed {seed}"] = [folder / name for name in LISTS]
    jobs = [
        (arm, share, seed)
        for seed in options.seeds
        for share in options.shares.split(",")
        for arm in ARMS
        if arm in options.arms
    ]
    # Taken now: results that are written below a commit's files make the tree differ from it.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = facts(device)
    options.commit = machine["commit"] or "unknown"
    target = options.results / options.name
    target.parent.mkdir(parents=True, exist_ok=True)
    digests = content_digests(data, files)
    commands, found, former_digests = former_record(target, options, digests)
    commands.append(command_line("bench/accuracy/compare.py", options.command))
    record = {"command": " ; ".join(dict.fromkeys(commands)), **machine}
    record["digests"] = former_digests | digests
    hours: dict[str, float] = {}
    failures = []
    scored_on = options.names[0].stem if options.names else "test" if options.test else "val"

    def ordered() -> list[dict]:
        shares = list(dict.fromkeys([*options.shares.split(","), *(job[1] for job in found)]))
        order = sorted(
            found, key=lambda job: (job[2], shares.index(job[1]), list(ARMS).index(job[0]))
        )
        return [found[job] for job in order]

    def write() -> None:
        results = ordered()
        others = [unfinished_run(job, options) for job in jobs if job not in found]
        record["unfinished"] = [run for run in others if run]
        record["planned_hours_a_run"] = hours
        if results:
            record["summary"] = summarize(results, options.title, scored_on)
        if results or record["unfinished"]:
            write_json(Path(f"{target}.json"), {**record, "runs": results})

    with programs.stopped_by_signals(), ThreadPoolExecutor(options.jobs) as pool:
        try:
            try:
                hours = plan(jobs, options)
            except RunError as error:  # of settings that no run could use
                jobs = []
                failures.append(str(error))
            futures = {pool.submit(one_run, job, options): job for job in jobs}
            for future in as_completed(futures):
                try:
                    found[futures[future]] = future.result()
                except (RunError, InputError) as error:
                    failures.append(str(error))
                    continue
                write()
                Path(f"{target}.md").write_text(report(ordered(), record["summary"]) + "\n")
        finally:
            # After an interrupt no further run starts.
            pool.shutdown(wait=False, cancel_futures=True)
            # Before those that run have saved, as who stops them may not wait so long.
            write()
            with contextlib.suppress(OSError):
                for run in record["unfinished"]:
                    name = f"{run['method']} {run['share']} seed {run['seed']}"
                    print(f"unfinished: {name} at iteration {run['iteration']}", flush=True)
    if found:
        results = ordered()
        plot(results, Path(f"{target}.png"))
        print(report(results, summarize(results, options.title, scored_on)))
        print(f"written: {target}.json, .md, .png")
        commits = {commit for result in results for commit in result["commits"]}
        if len(commits) > 1:
            print(f"warning: the runs were trained with several commits: {', '.join(commits)}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr, flush=True)
    return 1 if failures else 0


def numbers(text: str) -> list[int]:
    """Integers between commas."""
    return [int(word) for word in text.split(",")]


def arms(text: str) -> list[str]:
    """Names of ARMS between commas.

    Raises:
        InputError: one is not there.
    """
    names = text.split(",")
    for name in names:
        if name not in ARMS:
            raise InputError(f"--arms {text}: there is no {name!r}, choose of {', '.join(ARMS)}")
    return names


def split_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the arguments before ``--``; those behind it are for ``train/main.py``.

    Raises:
        InputError: an argument cannot be used.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="compare", help="name of the result files")
    parser.add_argument("--dataset", required=True, help="as train/main.py's")
    parser.add_argument("--data-dir", help="as train/main.py's")
    parser.add_argument(
        "--arms", type=arms, default=",".join(METHODS), help=f"of {', '.join(ARMS)} (%(default)s)"
    )
    parser.add_argument("--seeds", type=numbers, default="0,1,2")
    parser.add_argument(
        "--shares", default="1/8", help="labeled shares, or 'lists' for the data set's own lists"
    )
    parser.add_argument(
        "--lists",
        metavar="DIR",
        help="in place of shares: the folder of labeled.txt and unlabeled.txt; {list} in it stands "
        "for the seed modulo the number of such folders",
    )
    parser.add_argument("--test", action="store_true", help="evaluate on the test split as well")
    parser.add_argument(
        "--names",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="evaluate on these images of test by themselves, a NAME a line; the summary is of the "
        "first such FILE",
    )
    parser.add_argument(
        "--shrink", type=int, default=1, help="train on a copy of a folder set at 1/N of its size"
    )
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/NAME)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads a run")
    return parser.parse_args(arguments[:cut]), arguments[cut + 1 :]


def parse(arguments: list[str]) -> argparse.Namespace:
    """What a call asks for; a smaller copy of the data is made.

    Raises:
        InputError: as `split_arguments` and `shrunken`, or of a copy that cannot be made.
    """
    options, rest = split_arguments(arguments)
    options.command, options.rest = arguments, rest
    options.runs = (options.runs or ROOT / "runs" / options.name).resolve()
    options.folder = Path(options.data_dir).resolve() if options.data_dir else None
    options.title = options.folder.name if options.folder else options.dataset
    if options.lists is not None:
        options.shares = Path(options.lists).name
        options.lists = str(Path(options.lists).resolve())
    options.names = [path.resolve() for path in options.names]
    if options.dataset == "toycity" and options.folder is None:
        options.folder = ROOT / "data" / "toycity"
    if options.shrink < 1:
        raise InputError(f"--shrink {options.shrink} is no size: give 1 or more")
    if options.shrink > 1:
        if options.dataset != "folder":
            raise InputError(
                f"--shrink cannot copy the dataset {options.dataset}: leave it out, or use "
                "--dataset folder"
            )
        if options.folder is None:
            raise InputError("--shrink needs the folder that it copies: give --data-dir")
        options.folder = shrunken(options.folder, options.shrink)
    options.data = ["--dataset", options.dataset]
    if options.folder is not None:
        options.data += ["--data-dir", str(options.folder)]
    return options


if __name__ == "__main__":
    sys.exit(run_command(lambda: compare(parse(sys.argv[1:]))))
