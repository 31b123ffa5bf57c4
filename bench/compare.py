"""Supervised-only against CAC: same data, seeds, lists, iterations; a table, a curve, a JSON file.

    python bench/compare.py --name camvid --dataset folder --data-dir DIR --shares 1/16 -- \\
        --backbone mobilenet_v2 --weights FILE --iterations 1500

What follows ``--`` goes to ``train/main.py`` as it is. A run that is already finished is not
repeated, and one that was interrupted goes on where it stopped. The results are written anew after
each run, with the commits that each was trained with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, can_plot, command_line, facts
from shrink import shrunken

from cac_fast.train import checkpoint
from cac_fast.train.data.layouts import open_data
from cac_fast.train.distributed import run_command
from cac_fast.train.errors import InputError
from cac_fast.train.log import read_metrics

METHODS = ("supervised", "cac")
COLORS = {"supervised": "tab:gray", "cac": "tab:blue"}


class RunError(Exception):
    """A command of a run failed; what it said last is in the message."""


class Programs:
    """The programs that run, and the signal that stops them.

    They have sessions of their own, so that a signal comes to them from here alone, and once:
    trainings save at the first one and end at once at a second.
    """

    def __init__(self) -> None:
        # A signal's handler may interrupt the thread that holds it.
        self._lock = threading.RLock()
        self._running: set[subprocess.Popen] = set()
        self._stopped: float | None = None

    @contextlib.contextmanager
    def start(self, command: list[str], threads: int) -> Iterator[subprocess.Popen]:
        """One that says its lines to ``stdout``, until it ends.

        Raises:
            RunError: no more programs are to start.
        """
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with self._lock:
            if self._stopped is not None:
                raise RunError("not begun")
            process = subprocess.Popen(
                [sys.executable, str(ROOT / command[0]), *command[1:]],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            with process:
                yield process
        finally:
            with self._lock:
                self._running.discard(process)

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Pass Ctrl-C, SIGTERM and the terminal's end on to what runs; start nothing more."""

        def stop(number: int, _: Any) -> None:
            now = time.monotonic()
            if self._stopped is not None and now - self._stopped < 1:
                return  # the same one, sent to the process and to its group
            self._stopped = now
            with self._lock:
                for process in self._running:
                    # Trainings save at these two.
                    process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)
            with contextlib.suppress(OSError):
                os.write(2, b"stopping: waiting until what runs has saved\n")
            sys.exit(128 + number)

        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        former = {number: signal.getsignal(number) for number in numbers}
        for number, handler in former.items():
            if handler != signal.SIG_IGN:  # as `nohup` asks
                signal.signal(number, stop)
        try:
            yield
        finally:
            self._stopped = None
            for number, handler in former.items():
                signal.signal(number, handler)


programs = Programs()


def run(command: list[str], threads: int, label: str) -> None:
    """Run one program of the project to its end; pass its lines on, each behind ``label``.

    Raises:
        RunError: it ended with another code than 0.
    """
    line = ""
    with programs.start(command, threads) as process:
        for line in process.stdout:
            with contextlib.suppress(OSError):  # the terminal may be gone, and the run must save
                print(f"{label} | {line}", end="", flush=True)
    if process.returncode:
        raise RunError(f"{label} ended with code {process.returncode}: {line.strip()}")


def note_commit(folder: Path, commit: str, restart: bool) -> list[str]:
    """The commits that a run was trained with, oldest first, kept in its ``compare.json``.

    ``commit`` is one of them unless the run is finished; "unknown" stands for those of a run that
    was started without this file.

    Raises:
        InputError: the run's ``last.pt`` cannot be read.
    """
    last, path = folder / "last.pt", folder / "compare.json"
    commits = []
    if last.is_file() and not restart:
        commits = json.loads(path.read_text())["commits"] if path.is_file() else ["unknown"]
        state = checkpoint.read(last)
        if state["iteration"] == state["config"]["iterations"]:
            return commits
    if commits[-1:] != [commit]:
        commits = [*commits, commit]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"commits": commits})
    return commits


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file that is whole at any time."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(draft, path)


def run_folder(method: str, share: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a run is kept."""
    return options.runs / f"{method}-{share.replace('/', '_')}-seed{seed}"


def one_run(method: str, share: str, seed: int, options: argparse.Namespace) -> dict:
    """Train one method once; its last and best state on val and, if asked for, test.

    Raises:
        RunError: training or evaluation failed, or left no validation result.
        InputError: as `note_commit`.
    """
    folder = run_folder(method, share, seed, options)
    label = f"{method} {share} seed {seed}"
    data = options.data
    commits = note_commit(folder, options.commit, "--restart" in options.rest)
    lists = [] if share == "lists" else ["--labeled-share", share, "--data-list", str(seed)]
    run(
        [
            "train/main.py",
            "--method",
            method,
            *lists,
            "--seed",
            str(seed),
            "--output",
            str(folder),
            *data,
            *options.rest,
        ],
        options.threads,
        label,
    )
    lines = read_metrics(folder / "metrics.jsonl")
    curve = [[line["iteration"], line["miou"]] for line in lines if line["kind"] == "val"]
    if not curve:
        raise RunError(f"{label} left no validation result in {folder / 'metrics.jsonl'}")
    scores = {"val_last": curve[-1][1], "val_best": max(miou for _, miou in curve)}
    if options.test:
        for state in ("last", "best"):
            file = folder / f"{state}-test.json"
            where = ["--checkpoint", str(folder / f"{state}.pt"), "--split", "test"]
            run(["train/evaluate.py", *where, *data, "--json", str(file)], options.threads, label)
            scores[f"test_{state}"] = json.loads(file.read_text())["miou"]
    names = {"method": method, "share": share, "seed": seed, "commits": commits}
    return {**names, "scores": scores, "curve": curve}


def unfinished_run(method: str, share: str, seed: int, options: argparse.Namespace) -> dict | None:
    """How far a run has come that has no result yet; None where its folder says nothing."""
    folder = run_folder(method, share, seed, options)
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        return None
    commits = folder / "compare.json"
    return {
        "method": method,
        "share": share,
        "seed": seed,
        "commits": json.loads(commits.read_text())["commits"] if commits.is_file() else ["unknown"],
        "iteration": lines[-1]["iteration"],
        "curve": [[line["iteration"], line["miou"]] for line in lines if line["kind"] == "val"],
    }


def table(results: list[dict]) -> str:
    """Mean and spread over the seeds in points of mIoU, and CAC's gain, as Markdown.

    The gain is left out as long as the methods have not run with the same seeds.
    """
    columns = list(results[0]["scores"])
    rows = ["| share | method | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for share in dict.fromkeys(result["share"] for result in results):
        means: dict[str, list[float]] = {}
        seeds = []
        for method in METHODS:
            chosen = [
                item for item in results if item["share"] == share and item["method"] == method
            ]
            if not chosen:
                continue
            seeds.append({item["seed"] for item in chosen})
            cells = []
            means[method] = []
            for column in columns:
                values = [100 * item["scores"][column] for item in chosen]
                means[method].append(statistics.mean(values))
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{means[method][-1]:.1f}{spread}")
            rows.append(f"| {share} | {method} | " + " | ".join(cells) + " |")
        if len(seeds) == len(METHODS) and seeds[0] == seeds[1]:
            gains = [
                f"{b - a:+.1f}" for a, b in zip(means["supervised"], means["cac"], strict=True)
            ]
            rows.append(f"| {share} | gain | " + " | ".join(gains) + " |")
    return "\n".join(rows)


def plot(results: list[dict], path: Path) -> None:
    """Validation mIoU against the iteration: a thin line a run, a thick one for the mean."""
    if not can_plot():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = list(dict.fromkeys(result["share"] for result in results))
    figure, axes = pyplot.subplots(
        1, len(shares), figsize=(6 * len(shares), 4), squeeze=False, layout="constrained"
    )
    for axis, share in zip(axes[0], shares, strict=True):
        for method in METHODS:
            curves = [
                item["curve"]
                for item in results
                if item["share"] == share and item["method"] == method
            ]
            if not curves:
                continue
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=COLORS[method], alpha=0.3, linewidth=1)
            iterations = [point[0] for point in curves[0]]
            mean = [
                statistics.mean(curve[index][1] for curve in curves)
                for index in range(len(iterations))
            ]
            axis.plot(
                iterations, mean, color=COLORS[method], label=f"{method} (mean of {len(curves)})"
            )
        axis.set(
            title="labeled by list" if share == "lists" else f"{share} labeled",
            xlabel="iteration",
            ylabel="val mIoU",
        )
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def compare(options: argparse.Namespace) -> int:
    """Run every method, share and seed; write JSON, table and plot below ``options.results``.

    JSON and table are written after each run, the plot at the end. The JSON says how far the others
    have come, also when a signal stops them. 1 if a run failed, else 0.

    Raises:
        InputError: the data cannot be opened, or a split that is scored has no image.
    """
    data = open_data(options.dataset, options.folder)  # toycity: written once, not by all runs
    for split in ("val", "test") if options.test else ("val",):
        if not data.splits[split]:
            raise InputError(
                f"the {split} split of {data.root} holds no image, but runs are compared on it: "
                "add images and masks" + (" or leave out --test" if split == "test" else "")
            )
    jobs = [
        (method, share, seed)
        for seed in options.seeds
        for share in options.shares.split(",")
        for method in METHODS
    ]
    # Taken now: results that are written below a commit's files make the tree differ from it.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = facts(device)
    options.commit = machine["commit"] or "unknown"
    record = {"command": command_line("bench/compare.py", options.command), **machine}
    target = options.results / options.name
    target.parent.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str, int], dict] = {}
    failures = []

    def write() -> list[dict]:
        results = [found[job] for job in jobs if job in found]
        others = [unfinished_run(*job, options) for job in jobs if job not in found]
        record["runs"], record["unfinished"] = results, [run for run in others if run]
        if results or record["unfinished"]:
            write_json(Path(f"{target}.json"), record)
        return results

    with programs.stopped_by_signals(), ThreadPoolExecutor(options.jobs) as pool:
        try:
            futures = {pool.submit(one_run, *job, options): job for job in jobs}
            for future in as_completed(futures):
                try:
                    found[futures[future]] = future.result()
                except (RunError, InputError) as error:
                    failures.append(str(error))
                    continue
                Path(f"{target}.md").write_text(table(write()) + "\n")
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
        results = [found[job] for job in jobs if job in found]
        plot(results, Path(f"{target}.png"))
        print(table(results))
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


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments before ``--``; keep the rest for ``train/main.py``.

    Raises:
        InputError: as `shrunken`, or a copy of another size is asked for that cannot be made.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="compare", help="name of the result files")
    parser.add_argument("--dataset", required=True, help="as train/main.py's")
    parser.add_argument("--data-dir", help="as train/main.py's")
    parser.add_argument("--seeds", type=numbers, default="0,1,2")
    parser.add_argument(
        "--shares", default="1/8", help="labeled shares, or 'lists' for the data set's own lists"
    )
    parser.add_argument("--test", action="store_true", help="evaluate on the test split as well")
    parser.add_argument(
        "--shrink", type=int, default=1, help="train on a copy of a folder set at 1/N of its size"
    )
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/NAME)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads a run")
    options = parser.parse_args(arguments[:cut])
    options.command, options.rest = arguments, arguments[cut + 1 :]
    options.runs = (options.runs or ROOT / "runs" / options.name).resolve()
    options.folder = Path(options.data_dir).resolve() if options.data_dir else None
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
