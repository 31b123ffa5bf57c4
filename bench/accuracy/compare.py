"""Supervised-only against CAC, or many methods: same data, seeds, lists, iterations; a table, a
curve, a JSON file.

    python bench/accuracy/compare.py --name camvid --dataset folder --data-dir DIR \\
        --shares 1/16 -- --backbone mobilenet_v2 --weights FILE --iterations 1500

What follows `--` goes to `train/main.py` as it is. `--arms` adds to the two what a gain has
to be seen against: `supervised_all`, supervised with the masks of all the images (the headroom),
`control`, CAC with `--dc-weight 0` (batch statistics of the unlabeled crops alone), and
`supervised_adapted` and `cac_adapted`, these networks with the batch statistics of the unlabeled
images taken anew after training (`train/adapt.py`).

    python bench/accuracy/compare.py --methods all --name methods --dataset toycity --shares lists

`--methods` compares methods of the trainer, all or some names between commas. What their gain has
to be seen against comes with them. The cheapest ones begin, and a method that needs a teacher
begins when the supervised run of its seed is over. A second table has the score after equal steps
and after equal time, and the cost of each, and is sorted by what `--sort-by` says; the plot has val
mIoU against hours too, and a sheet shows what the methods say of the same images.

The hours are planned first, from ten steps of each kind. A run that is already finished is not
repeated, also when its folder is gone and the record has its scores; one that was interrupted goes
on where it stopped. The record is written anew after each run, with the commits and machines that
each was trained with; a later call adds its seeds and arms to it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy.arguments import parse
from accuracy.arms import ARMS, needed_arm
from accuracy.methods_outcome import TWO_METHODS, methods_table, plot_methods, rank, to_do
from accuracy.methods_sheet import draw_sheet
from accuracy.outcome import plot, report, summarize
from accuracy.pace import Pace, paces
from accuracy.plan import cheapest_first, plan, planned_hours
from accuracy.record import OF_SEED, content_digests, former_record, kept_runs
from accuracy.runs import (
    LISTS,
    Job,
    list_folder,
    needed_run,
    one_run,
    scored_parts,
    unfinished_run,
)
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
        files[f"--lists {options.shares}{OF_SEED}{seed}"] = [folder / name for name in LISTS]
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
    asked, kept = jobs, kept_runs(jobs, former, digests, options)
    for arm, share, seed in kept:
        print(f"{arm} {share} seed {seed}: not in {options.runs}, its scores stay in the record")
    jobs = [job for job in jobs if job not in kept]
    failures = []
    scored_on = options.names[0].stem if options.names else "test" if options.test else "val"

    def ordered() -> list[dict]:
        shares = list(dict.fromkeys([*options.shares.split(","), *(job[1] for job in found)]))
        order = sorted(
            found, key=lambda job: (job[2], shares.index(job[1]), list(ARMS).index(job[0]))
        )
        return [found[job] for job in order]

    def known_paces() -> dict[str, Pace]:
        arms = [arm for arm in ARMS if arm in {job[0] for job in [*jobs, *found]}]
        return paces(arms, hours, options)

    def text() -> str:
        parts = [report(ordered(), record["summary"])]
        if "methods" in record:
            parts.append(methods_table(record["methods"], options.sort_by))
        elif missing := to_do([job for job in jobs if job not in found], known_paces()):
            parts.append(missing)
        return "\n\n".join(parts)

    def write() -> None:
        results = ordered()
        others = dict(former.unfinished)
        others |= {job: run for job in jobs if (run := unfinished_run(job, options))}
        record["unfinished"] = [run for job, run in others.items() if job not in found]
        record["planned_hours"] = {arm: each._asdict() for arm, each in hours.items()}
        if results:
            record["summary"] = summarize(results, options.title, scored_on)
        missing = [job for job in jobs if job not in found]
        rows = rank(results, options.title, scored_on, known_paces(), missing, options.sort_by)
        if rows:
            record["methods"] = rows
        if results or record["unfinished"]:
            write_record(Path(f"{target}.json"), {**record, "runs": results})

    def write_table() -> str:
        table = text()
        Path(f"{target}.md").write_text(table + "\n")
        return table

    with programs.stopped_by_signals(), ThreadPoolExecutor(options.jobs) as pool:
        try:
            failed: dict[str, str] = {}  # arms whose settings no run can use
            hours = hours | plan(jobs, asked, options, failed)
            # Finished runs have a cost in the table of the methods too.
            unknown = {job[0] for job in asked} - {*hours, *failed}
            if unknown and not {job[0] for job in [*asked, *found]} <= TWO_METHODS:
                hours = hours | planned_hours(asked, options, failed)
            if options.methods:
                jobs = cheapest_first(jobs, hours)
            # Behind all others, so that none waits for the run that it adapts.
            jobs.sort(key=lambda job: ARMS[job[0]].adapts is not None)
            # What all others are compared with, and what some learn from.
            jobs = [
                job
                for job in jobs
                if not failed.keys() & {job[0], "supervised", needed_arm(job[0])}
            ]
            failures += failed.values()
            futures: dict[Job, Future] = {}
            for job in jobs:
                # Begun before this one, as the pool takes them in order: no two wait for another.
                before = [futures[needed]] if (needed := needed_run(job)) else []
                futures[job] = pool.submit(one_run, job, options, before)
            names = {future: job for job, future in futures.items()}
            for future in as_completed(names):
                job = names[future]
                try:
                    result = future.result()
                except (RunError, InputError) as error:
                    failures.append(str(error))
                    continue
                # A folder of an older run does not say where it was trained, but its record does.
                known = former.runs.get(job, {}).get("machines", [])
                found[job] = result | {"machines": result["machines"] or known}
                write()
                write_table()
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
        if options.methods:
            plot_methods(results, Path(f"{target}.png"), known_paces())
        else:
            plot(results, Path(f"{target}.png"))
        print(write_table())
        print(f"written: {target}.json, .md, .png")
        commits = {commit for result in results for commit in result["commits"]}
        if len(commits) > 1:
            print(f"warning: the runs were trained with several commits: {', '.join(commits)}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr, flush=True)
    if found and options.methods:  # last, as a network that cannot be read ends it
        done = [(run["method"], run["share"], run["seed"]) for run in ordered()]
        draw_sheet(done, options, Path(f"{target}-sheet.png"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: compare(parse(sys.argv[1:], __doc__))))
