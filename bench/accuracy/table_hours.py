"""The plan of a table: how far its runs are, and how long what is left will take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from accuracy.plan import hours_of, is_alone, step_seconds
from accuracy.table_plan import Run, is_done, iteration_of
from lib.running import RunError


def training_hours(
    runs: Mapping[str, Run], options: argparse.Namespace, failed: dict[str, str]
) -> dict[str, float]:
    """Hours of each training without evaluations, from ten steps of each kind of them.

    What needs another run that is not over is measured without it, self-training with labels that
    are made up.

    failed: takes, by key, what is wrong with the runs whose steps could not be made.
    """
    seconds: dict[str, dict[str, float | None]] = {}
    errors: dict[str, str] = {}

    def kind_of(run: Run) -> str:
        """What is the same in runs whose steps take the same time; its steps are measured once."""
        assert run.settings is not None
        over = all(is_done(first, options) for _, first, _ in run.needs)
        flat: dict[str, Any] = {**run.settings.flat(), "iterations": 1, "seed": 0, "data_list": 0}
        flat |= dict.fromkeys(("labeled", "unlabeled", "labeled_share", "warmup"))
        kind = json.dumps([flat, [option for option, _, _ in run.needs], over], default=str)
        if kind not in seconds and kind not in errors:
            words = run.command(options)[:-2] if over else list(run.words)
            try:
                seconds[kind] = step_seconds(words, options)
            except RunError as error:
                errors[kind] = str(error)
        return kind

    hours = {}
    for key, run in runs.items():
        if run.settings is None:
            continue
        kind = kind_of(run)
        if kind in errors:
            failed[key] = errors[kind]
        else:
            found = hours_of(run.settings, seconds[kind], is_alone(run.settings.loss.method))
            hours[key] = found.whole
    return hours


def show_plan(
    runs: Mapping[str, Run], names: Mapping[str, str], options: argparse.Namespace
) -> int:
    """Print each run, how far it is, and the hours that are left; 1 if the steps of some run could
    not be made."""
    left = {key: run for key, run in runs.items() if not is_done(run, options)}
    failed: dict[str, str] = {}
    hours = training_hours(left, options, failed)
    for key, run in runs.items():
        state = "finished"
        if key in left:
            at = iteration_of(run, options)
            state = f"at iteration {at}" if at else "new"
            state += f", {hours[key]:.2f} h" if key in hours else ", not estimated"
            state += f": {failed[key]}" if key in failed else ""
        print(f"{names[key]}: {state} ({run.folder(options).name})")
    total = sum(hours.values()) / options.jobs
    others = len(left) - len(hours) - len(failed)
    counts = {"of train/classify.py": others, "not estimated": len(failed)}
    missing = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    more = f" and without {missing}" if missing else ""
    print(
        f"planned: {total:.1f} hours without evaluations{more}, {len(left)} of {len(runs)} runs "
        "left"
    )
    return 1 if failed else 0
