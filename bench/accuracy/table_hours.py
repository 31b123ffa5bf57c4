"""The plan of a table: how far its runs are, and how long what is left will take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from accuracy.plan import hours_of, is_alone, step_seconds
from accuracy.table_plan import Run, is_done, iteration_of
from lib.made_up import MADE_UP
from lib.running import RunError


def run_hours(
    runs: Mapping[str, Run], options: argparse.Namespace, failed: dict[str, str]
) -> dict[str, float]:
    """Hours of each training without evaluations, and of each classification without its masks,
    from ten steps of each kind of them.

    What needs another run that is not over is measured without it, with labels that are made up.

    failed: takes, by key, what is wrong with the runs whose steps could not be made.
    """
    seconds: dict[str, dict[str, float | None]] = {}
    errors: dict[str, str] = {}
    hours = {}
    for key, run in runs.items():
        over = all(is_done(first, options) for _, first, _ in run.needs)
        kind = _kind_of(run, over)
        if kind not in seconds and kind not in errors:
            try:
                seconds[kind] = _seconds_of(run, over, options)
            except RunError as error:
                errors[kind] = str(error)
        if kind in errors:
            failed[key] = errors[kind]
        elif run.settings is None:
            hours[key] = seconds[kind]["step"] * seconds[kind]["steps"] / 3600
        else:
            found = hours_of(run.settings, seconds[kind], is_alone(run.settings.loss.method))
            hours[key] = found.whole
    return hours


def _kind_of(run: Run, over: bool) -> str:
    """What is the same in runs whose steps take the same time; over: what they need is there."""
    if run.settings is None:
        return run.key
    flat: dict[str, Any] = {**run.settings.flat(), "iterations": 1, "seed": 0, "data_list": 0}
    flat |= dict.fromkeys(("labeled", "unlabeled", "labeled_share", "warmup"))
    return json.dumps([flat, [option for option, _, _ in run.needs], over], default=str)


def _seconds_of(run: Run, over: bool, options: argparse.Namespace) -> dict[str, float | None]:
    if run.settings is None:
        return step_seconds(list(run.words), options, "classify_time.py")
    if over:
        return step_seconds(run.command(options)[:-2], options)
    words = list(run.words)
    if "--pseudo-labels" in [option for option, _, _ in run.needs]:
        words += ["--pseudo-labels", MADE_UP]
    return step_seconds(words, options)


def show_plan(
    runs: Mapping[str, Run], names: Mapping[str, str], options: argparse.Namespace
) -> int:
    """Print each run, how far it is, and the hours that are left; 1 if the steps of some run could
    not be made."""
    left = {key: run for key, run in runs.items() if not is_done(run, options)}
    failed: dict[str, str] = {}
    hours = run_hours(left, options, failed)
    for key, run in runs.items():
        state = "finished"
        if key in left:
            at = iteration_of(run, options)
            state = f"at iteration {at}" if at else "new"
            more = f"{hours[key]:.2f} h" if key in hours else f"not estimated: {failed[key]}"
            state += f", {more}"
        print(f"{names[key]}: {state} ({run.folder(options).name})")
    total = sum(hours.values()) / options.jobs
    missing = ["evaluations"]
    if any(run.settings is None for run in left.values()):
        missing.append("the pseudo masks")
    if failed:
        missing.append(f"{len(failed)} that are not estimated")
    print(
        f"planned: {total:.1f} hours without {' and without '.join(missing)}, {len(left)} of "
        f"{len(runs)} runs left"
    )
    return 1 if failed else 0
