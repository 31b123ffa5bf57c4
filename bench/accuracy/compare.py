"""Supervised-only against CAC: same data, seeds, lists, iterations; a table, a curve, a JSON file.

    python bench/accuracy/compare.py --name camvid --dataset folder --data-dir DIR \\
        --shares 1/16 -- --backbone mobilenet_v2 --weights FILE --iterations 1500

What follows `--` goes to `train/main.py` as it is. `--arms` adds to the two what a gain has
to be seen against: `supervised_all`, supervised with the masks of all the images (the headroom),
and `control`, CAC with `--dc-weight 0` (batch statistics of the unlabeled crops alone).

The hours are planned first, from ten steps of each kind. A run that is already finished is not
repeated, and one that was interrupted goes on where it stopped. The record is written anew after
each run, with the commits and machines that each was trained with; a later call adds its seeds and
arms to it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.arguments import parse
from accuracy.arms import ARMS
from accuracy.outcome import plot, report, summarize
from accuracy.plan import plan
from accuracy.record import content_digests, former_record
from accuracy.runs import LISTS, list_folder, one_run, scored_parts, unfinished_run
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.lists import named
from cac_fast.train.distributed import run_command
from cac_fast.train.errors import InputError
from lib.measure import command_line, facts, write_record
from lib.running import RunError, programs


def compare(options: argparse.Namespace) -> int:
    """Run every arm, share and seed; write JSON, table and plot below `options.results`.

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
    commit = machine.pop("commit") or "unknown"
    options.note = {"commits": commit, "machines": machine}
    target = options.results / options.name
    target.parent.mkdir(parents=True, exist_ok=True)
    digests = content_digests(data, files)
    former = former_record(target, options, digests)
    commands = [*former.commands, command_line("bench/accuracy/compare.py", options.command)]
    record = {"command": " ; ".join(dict.fromkeys(commands)), "digests": former.digests | digests}
    found, hours = dict(former.runs), former.hours
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
            write_record(Path(f"{target}.json"), {**record, "runs": results})

    with programs.stopped_by_signals(), ThreadPoolExecutor(options.jobs) as pool:
        try:
            try:
                hours = hours | plan(jobs, options)
            except RunError as error:  # of settings that no run could use
                jobs = []
                failures.append(str(error))
            futures = {pool.submit(one_run, job, options): job for job in jobs}
            for future in as_completed(futures):
                job = futures[future]
                try:
                    result = future.result()
                except (RunError, InputError) as error:
                    failures.append(str(error))
                    continue
                # A folder of an older run does not say where it was trained, but its record does.
                known = former.runs.get(job, {}).get("machines", [])
                found[job] = result | {"machines": result["machines"] or known}
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


if __name__ == "__main__":
    sys.exit(run_command(lambda: compare(parse(sys.argv[1:], __doc__))))
