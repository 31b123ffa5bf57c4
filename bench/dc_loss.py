"""What the directional contrastive loss costs: every back end and baseline, loss and gradient.

    python bench/dc_loss.py [--json FILE] [--plot FILE.png]

A row is one direction of the loss on unit features; both directions are twice that, for everyone.
Every result is checked before it is timed; then all take turns. What would not fit into memory or
time is skipped, with the reason. On a CPU the whole run is made to end in less than 5 minutes.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cac_fast import backends, build_info
from lib import measure, report
from lib.cases import LABELS, Case, Check, Operands, make_operands, standard_cases
from lib.providers import Provider, find_providers
from lib.report import Row

REPEATS = {"cpu": 10, "cuda": 30}
# Share of the run's time that a provider may take for one row; more for what matters most.
ROW_SHARE = 0.015
LONG_ROWS = {"goal": 8.0, "dense labels": 8.0, "asked": 8.0, "Cityscapes": 3.0, "large": 4.0}
PROBE = Case("probe", 512, 4096, "voc", "float32")

progress = partial(measure.progress, end="")


class Bench:
    """Measures rows one after the other, and learns from each what a larger one would take."""

    def __init__(
        self, device: torch.device, providers: list[Provider], repeats: int, minutes: float
    ) -> None:
        self.device = device
        self.providers = providers
        self.repeats = repeats
        self.minutes = minutes
        self.begin = time.monotonic()
        # Seconds that the first turn of the present case will take.
        self.promised = 0.0
        # By provider and dtype: seconds a pair, bytes a pair that is held.
        self.rates: dict[tuple[str, str], float] = {}
        self.bytes: dict[tuple[str, str], float] = {}

    def row(self, case: Case) -> list[Row]:
        """All providers on one case: a dict each, `status` "ok" or the reason why not."""
        facts = report.describe(case)
        free = measure.free_bytes(self.device)
        reason = None if self._left() > 0 else self._over()
        # The arguments, a copy in float32 while they are made, one in float64 for the check.
        if free is not None and 4 * case.bytes > 0.8 * free:
            reason = f"its arguments take {case.bytes / 1e9:.3g} GB"
        if reason:
            progress(" skipped\n")
            return [
                {**facts, "provider": item.name, "status": f"skipped: {reason}"}
                for item in self.providers
            ]

        operands = make_operands(case, self.device)
        facts["admitted"] = operands.admitted
        check = Check(operands)
        budget = self._budget(case)
        calls, runs, found = {}, {}, {}
        self.promised = 0.0
        for item in self.providers:
            progress(f" {item.name}")
            found[item.name], call, first = self._first_run(item, case, operands, check)
            if call is not None:
                calls[item.name] = call
                runs[item.name] = self._runs(first, budget)
                self.promised += first
        progress(" ...\n")
        times = self._take_turns(calls, runs)
        state = measure.gpu_state(self.device)
        for name, values in times.items():
            found[name] |= report.time_columns(values, facts)
            self.rates[name, case.dtype] = float(np.median([t.wall for t in values])) / case.pairs
        rows = [{**facts, "provider": name, **row} for name, row in found.items()]
        report.add_ratios(rows)
        return [row | {"gpu": state} if state else row for row in rows]

    def _take_turns(
        self, calls: dict[str, Callable[[], Any]], runs: dict[str, int]
    ) -> dict[str, list[measure.Times]]:
        """Round-robin, so that what slows the machine down for a while hits all alike."""
        times: dict[str, list[measure.Times]] = {name: [] for name in calls}
        for turn in range(self.repeats):
            for name, call in calls.items():
                if turn < runs[name] and (turn == 0 or self._left() > 0):
                    times[name].append(measure.times(call, self.device))
        return times

    def _first_run(
        self, item: Provider, case: Case, operands: Operands, check: Check
    ) -> tuple[Row, Callable[[], Any] | None, float]:
        """Run once: is it affordable, does it run, is it right, what memory does it take.

        Returns the columns known so far, the call to be timed or None, and the seconds one takes.
        """
        try:
            if reason := self._why_not(item, case):
                return {"status": f"skipped: {reason}"}, None, 0.0
            call = item.prepare(operands)
            begin = time.monotonic()
            results, peak = measure.peak_extra_bytes(call, self.device)
            # The first run of compiled code may have compiled it anew; a smaller case then knows.
            took = min(time.monotonic() - begin, self.rates[item.name, case.dtype] * case.pairs)
        except Exception as error:  # whatever one provider raises, the others are still measured
            lines = str(error).strip().splitlines() or [""]
            return {"status": f"failed: {type(error).__name__}: {lines[0]}"}, None, 0.0
        if item.slack is None:
            return {"status": "ok"}, call, took
        if problem := check.problem(results, item.slack):
            return {"status": f"wrong: {problem}"}, None, 0.0
        return {"status": "ok", "peak_extra_mb": None if peak is None else peak / 1e6}, call, took

    def _why_not(self, item: Provider, case: Case) -> str | None:
        """Why a provider skips a case: it refuses, or by smaller ones it would cost too much."""
        if reason := item.refuses(case):
            return reason
        key = item.name, case.dtype
        if self._left() < self.promised:
            return self._over()
        if key not in self.rates:
            self._probe(item, case.dtype)
        free = measure.free_bytes(self.device)
        needed = self.bytes[key] * item.pairs_held(case)
        if free is not None and needed > 0.8 * free:
            return f"about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        # Once to check it and once to time it.
        expected, budget = 2 * self.rates[key] * case.pairs, self._budget(case)
        if expected > budget:
            return f"about {expected:.3g} s for two runs, limit {budget:.3g} s"
        return self._over() if expected + self.promised > self._left() else None

    def _probe(self, item: Provider, dtype: str) -> None:
        case = replace(PROBE, dtype=dtype)
        call = item.prepare(make_operands(case, self.device))
        call()  # compiles what is compiled at the first call
        _, peak = measure.peak_extra_bytes(call, self.device)
        _, wall = measure.host_and_wall(call, self.device)
        self.rates[item.name, dtype] = wall / case.pairs
        held = item.pairs_held(case)
        self.bytes[item.name, dtype] = (peak or 0) / held if held else 0.0

    def _runs(self, first: float, budget: float) -> int:
        """As many as fit into a sixth of the budget, but two where all of it allows two."""
        least = 2 if 3 * first <= budget else 1
        return min(self.repeats, max(least, int(budget / 6 / max(first, 1e-9))))

    def _budget(self, case: Case) -> float:
        return 60 * self.minutes * ROW_SHARE * LONG_ROWS.get(case.name, 1.0)

    def _left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.begin)

    def _over(self) -> str:
        return f"the {self.minutes:g} minutes of the run are over"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def names(*known: str) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            for name in text.split(","):
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
            return text.split(",")

        return read

    def sizes(text: str) -> list[tuple[int, int]]:
        return [(int(a), int(m)) for a, m in (size.split("x") for size in text.split(","))]

    known = dict.fromkeys([*backends(), *report.BASELINES])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = {"metavar": "NAME,..."}
    dtypes = names("float32", "bfloat16", "float16")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", default=devices[0], choices=devices)
    parser.add_argument(
        "--providers", type=names(*known), help="only these back ends and baselines", **several
    )
    parser.add_argument(
        "--sizes", type=sizes, metavar="AxM,...", help="in place of the standard ones"
    )
    parser.add_argument(
        "--labels", type=names(*LABELS), help="only these of " + ", ".join(LABELS), **several
    )
    parser.add_argument(
        "--dtypes", type=dtypes, help="only these of float32, bfloat16, float16", **several
    )
    parser.add_argument("--repeats", type=int, help="timed runs at most (10; on a GPU 30)")
    parser.add_argument("--minutes", type=float, default=4.5, help="for the run (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows, device, versions")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="time and memory against M")
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """The standard rows or the sizes asked for, in the labels and dtypes asked for."""
    cases = standard_cases(options.device)
    if options.sizes:
        main = next(case for case in cases if case.name == "goal")
        cases = [replace(main, name="asked", anchors=a, negatives=m) for a, m in options.sizes]
    cases = [
        replace(case, labels=labels, dtype=dtype)
        for case in cases
        for dtype in options.dtypes or [case.dtype]
        for labels in options.labels or [case.labels]
    ]
    return list(dict.fromkeys(cases))


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; 1 where a result was wrong."""
    options = parse(arguments)
    device = torch.device(options.device)
    providers = [
        item
        for item in find_providers(device)
        if options.providers is None or item.name in ("products", *options.providers)
    ]
    facts = measure.facts(device) | {"threads": torch.get_num_threads()}
    given = sys.argv[1:] if arguments is None else arguments
    command = measure.command_line("bench/dc_loss.py", given)
    record = {"command": command, **facts, "extension": build_info()}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(report.LEGEND, flush=True)
    for name, reason in backends().items():
        if reason is not None:
            print(f"no back end {name}: {reason}")
    bench = Bench(device, providers, options.repeats or REPEATS[options.device], options.minutes)
    rows = []
    for case in choose_cases(options):
        gc.collect()
        progress(f"{case}:")
        of_case = bench.row(case)
        print(f"\n{case}\n\n{report.table(of_case)}", flush=True)
        rows += of_case
        # After each case, as the run may be ended before its time.
        measure.write_record(options.json, {**record, "rows": rows})
    print("\n" + "\n".join(report.headlines(rows)))

    if options.plot:
        report.plot(rows, facts["device"], options.plot)
    return int(any(row["status"].startswith("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
