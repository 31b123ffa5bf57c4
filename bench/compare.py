"""Supervised-only against CAC: same data, seeds, lists, iterations; a table, a curve, a JSON file.

    python bench/compare.py --name camvid --dataset folder --data-dir DIR --shares 1/16 -- \\
        --backbone mobilenet_v2 --weights FILE --iterations 1500

What follows ``--`` goes to ``train/main.py`` as it is. A run that is already finished is not
repeated, and one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measure import ROOT, can_plot, command_line, facts
from shrink import shrunken

from cac_fast.train.errors import InputError

METHODS = ("supervised", "cac")
COLOURS = {"supervised": "tab:gray", "cac": "tab:blue"}


def run(command: list[str], threads: int, label: str) -> None:
    """Run one command of the project to its end; pass its lines on, each behind ``label``."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    line = ""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            print(f"{label} | {line}", end="", flush=True)
    if process.returncode:
        sys.exit(f"{label} ended with code {process.returncode}: {line.strip()}")


def one_run(method: str, share: str, seed: int, options: argparse.Namespace) -> dict:
    """Train one method once; its last and best state on val and, if asked for, test."""
    folder = options.runs / f"{method}-{share.replace('/', '_')}-seed{seed}"
    label = f"{method} {share} seed {seed}"
    data = options.data
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
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [[line["iteration"], line["miou"]] for line in lines if line["kind"] == "val"]
    scores = {"val_last": curve[-1][1], "val_best": max(miou for _, miou in curve)}
    if options.test:
        for state in ("last", "best"):
            file = folder / f"{state}-test.json"
            where = ["--checkpoint", str(folder / f"{state}.pt"), "--split", "test"]
            run(["train/evaluate.py", *where, *data, "--json", str(file)], options.threads, label)
            scores[f"test_{state}"] = json.loads(file.read_text())["miou"]
    return {"method": method, "share": share, "seed": seed, "scores": scores, "curve": curve}


def table(results: list[dict]) -> str:
    """Mean and spread over the seeds in points of mIoU, and CAC's gain, as Markdown."""
    columns = list(results[0]["scores"])
    rows = ["| share | method | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for share in dict.fromkeys(result["share"] for result in results):
        means: dict[str, list[float]] = {}
        for method in METHODS:
            chosen = [
                item for item in results if item["share"] == share and item["method"] == method
            ]
            if not chosen:
                continue
            cells = []
            means[method] = []
            for column in columns:
                values = [100 * item["scores"][column] for item in chosen]
                means[method].append(statistics.mean(values))
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{means[method][-1]:.1f}{spread}")
            rows.append(f"| {share} | {method} | " + " | ".join(cells) + " |")
        if len(means) == len(METHODS):
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
            if not curves or not curves[0]:
                continue
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=COLOURS[method], alpha=0.3, linewidth=1)
            iterations = [point[0] for point in curves[0]]
            mean = [
                statistics.mean(curve[index][1] for curve in curves)
                for index in range(len(iterations))
            ]
            axis.plot(
                iterations, mean, color=COLOURS[method], label=f"{method} (mean of {len(curves)})"
            )
        axis.set(
            title="labelled by list" if share == "lists" else f"{share} labelled",
            xlabel="iteration",
            ylabel="val mIoU",
        )
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def compare(options: argparse.Namespace) -> list[dict]:
    """Run every method, share and seed; write JSON, table and plot below ``options.results``."""
    jobs = [
        (method, share, seed)
        for seed in options.seeds.split(",")
        for share in options.shares.split(",")
        for method in METHODS
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: one_run(job[0], job[1], int(job[2]), options), jobs))
    target = options.results / options.name
    target.parent.mkdir(parents=True, exist_ok=True)
    command = command_line("bench/compare.py", options.command)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"command": command, **facts(device), "runs": results}
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(results) + "\n")
    plot(results, target.with_suffix(".png"))
    print(table(results))
    print(f"written: {target}.json, .md, .png")
    return results


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
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--shares", default="1/8", help="labelled shares, or 'lists' for the data set's own lists"
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
    compare(parse(sys.argv[1:]))
