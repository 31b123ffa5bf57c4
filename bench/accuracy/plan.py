"""How long the runs of a comparison will take."""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

from accuracy.arms import ARMS
from accuracy.runs import Job, data_arguments, is_finished
from cac_fast.train import config, registry
from cac_fast.train.config import Config
from lib.running import RunError, run


class Hours(NamedTuple):
    """Of a run without evaluations.

    warm_up: those of it before the unlabeled images take part. supervised: those of a supervised
        run that were measured in the same call, as another call may find a busier machine. None
        where they were not measured.
    """

    whole: float
    warm_up: float | None = 0.0
    supervised: float | None = None


def is_alone(method: str) -> bool:
    """Whether a method sees no unlabeled images."""
    return not registry.METHODS.load(method).views


def planned_hours(
    jobs: list[Job], options: argparse.Namespace, failed: dict[str, str]
) -> dict[str, Hours]:
    """Hours of a run of each arm, from ten steps of each.

    failed: takes what is wrong with the arms whose steps could not be made.

    Raises:
        InputError: a setting cannot be used.
    """
    hours = {}
    there = {arm for arm, _, _ in jobs}
    # CAC's before those without unlabeled images: its warm-up is their step.
    arms = sorted((arm for arm in ARMS if arm in there), key=lambda arm: is_alone(ARMS[arm].method))
    labeled: dict[str, float | None] = {}
    for arm in arms:
        method = ARMS[arm].method
        if ARMS[arm].adapts is not None:
            hours[arm] = Hours(0.0)
            continue
        job = next(job for job in jobs if job[0] == arm)
        words = ["--method", method, *data_arguments(job, options), *options.data]
        words += [*options.rest, *ARMS[arm].more]
        alone = is_alone(method)
        seconds = labeled
        if not (labeled and alone):
            try:
                seconds = step_seconds(words, options)
            except RunError as error:
                failed[arm] = f"{arm}: {error}"
                continue
            if alone or method == "cac":
                labeled = seconds
        hours[arm] = hours_of(config.parse(words), seconds, alone)
    beside = hours["supervised"].whole if "supervised" in hours else None
    return {arm: each._replace(supervised=beside) for arm, each in hours.items()}


def step_seconds(
    words: list[str], options: argparse.Namespace, program: str = "step_time.py"
) -> dict[str, float | None]:
    """Seconds of a step of `train/main.py` with the options `words`, as `step_time.py` has them, or
    what another such program of `bench/lib` finds.

    Raises:
        RunError: the steps could not be made.
    """
    file = options.runs / "step_time.json"
    options.runs.mkdir(parents=True, exist_ok=True)
    run([f"bench/lib/{program}", str(file), *words], options.threads, "ten steps")
    return json.loads(file.read_text())


def hours_of(settings: Config, seconds: dict[str, float | None], alone: bool) -> Hours:
    """Hours of a run; alone: its method sees no unlabeled images."""
    total = settings.optim.iterations
    if alone:
        return Hours(total * seconds["labeled"] / 3600)
    first = min(settings.num_warmup, total)
    warm_up = first * seconds["labeled"] / 3600
    return Hours(warm_up + (total - first) * (seconds["both"] or 0) / 3600, warm_up)


def cheapest_first(jobs: list[Job], hours: dict[str, Hours]) -> list[Job]:
    """Jobs by the hours of their arms: all of an arm together, supervised before all others, as
    some begin with what it has learned."""
    names = list(ARMS)

    def place(job: Job) -> tuple[bool, float, int]:
        arm = job[0]
        return arm != "supervised", hours.get(arm, Hours(0.0)).whole, names.index(arm)

    return sorted(jobs, key=place)


def plan(
    jobs: list[Job], asked: list[Job], options: argparse.Namespace, failed: dict[str, str]
) -> dict[str, Hours]:
    """Say how many hours those of `jobs` that are not finished will take.

    Returns the hours of all arms that are asked for, as their costs are compared; none if no job
    is left. failed: as of `planned_hours`, which it calls.
    """
    left = [job for job in jobs if not is_finished(job, options)]
    if not left:
        return {}
    hours = planned_hours(asked, options, failed)
    total = sum(hours[arm].whole for arm, _, _ in left if arm in hours) / options.jobs
    parts = [
        f"{arm} {sum(job[0] == arm for job in left)} x {hours[arm].whole:.2f}"
        for arm in ARMS
        if arm in hours and any(job[0] == arm for job in left)
    ]
    print(f"planned: {total:.1f} hours without evaluations ({', '.join(parts)})", flush=True)
    return hours
