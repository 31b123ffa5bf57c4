"""How far a run is after so many hours, from the hours that were planned for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from accuracy.arms import ARMS, needed_arm
from accuracy.plan import Hours, is_alone
from cac_fast.train import config


class Pace(NamedTuple):
    """Knots of the line between iterations done and hours used, evaluations left out.

    iterations: the first is 0, the last that of the whole run. hours: begin with those of the run
        that this one needs.
    """

    iterations: tuple[int, ...]
    hours: tuple[float, ...]

    def hours_at(self, iteration: float) -> float:
        """Hours used when so many iterations are done."""
        return float(np.interp(iteration, self.iterations, self.hours))

    def iteration_at(self, hours: float) -> float:
        """Iterations done when so many hours are used, at most those of a whole run."""
        return float(np.interp(hours, self.hours, self.iterations))


def paces(
    arms: Sequence[str], hours: dict[str, Hours], options: argparse.Namespace
) -> dict[str, Pace]:
    """The paces of those arms whose hours are known; none before those of supervised are.

    hours: of a run of each arm, without those of the run that it begins with. Where those of the
        warm-up are not known, its steps take as long as supervised's. All paces are those of the
        machine as it was when supervised was measured.
    """
    found: dict[str, Pace] = {}
    for arm in arms:
        needed = needed_arm(arm)
        if not {"supervised", arm, needed or arm} <= hours.keys():
            continue
        words = ["--method", ARMS[arm].method, *options.data, *options.rest, *ARMS[arm].more]
        settings = config.parse(words)
        total = settings.optim.iterations
        first = 0 if is_alone(ARMS[arm].method) else min(settings.num_warmup, total)
        whole, warm_up = _at_one_speed(hours[arm], hours["supervised"])
        if warm_up is None:
            warm_up = min(hours["supervised"].whole * first / total, whole)
        before = 0.0
        if needed is not None:
            before, _ = _at_one_speed(hours[needed], hours["supervised"])
        steps, times = [0], [before]
        if 0 < first < total:
            steps.append(first)
            times.append(before + warm_up)
        found[arm] = Pace((*steps, total), (*times, before + whole))
    return found


def _at_one_speed(hours: Hours, supervised: Hours) -> tuple[float, float | None]:
    # As if they had been measured in the same call as those of supervised.
    factor = supervised.whole / hours.supervised if hours.supervised else 1.0
    return factor * hours.whole, None if hours.warm_up is None else factor * hours.warm_up


def val_at(curve: Sequence[Sequence[float]], iteration: float) -> float | None:
    """Val mIoU between the evaluations of a run, [iteration, mIoU] each, on the line through both
    neighbors; None before the first."""
    steps, values = zip(*curve, strict=True)
    return None if iteration < steps[0] else float(np.interp(iteration, steps, values))
