"""Which sizes of tiles are fastest on this GPU: the line to propose for kernels/configs.py.

    python bench/tiles.py [--json FILE]

Tries lines around the present one, of plain Triton and, where there is one, of the Gluon table, on
the dense-label goal row. Each is compiled and checked against float64 in a process of its own, all
side by side, so that one that fails costs its row alone; those that are right then take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measure
import report
import torch
from cases import Case, Check, make_operands, standard_cases
from providers import backend_provider, works_on
from report import three_digits
from side_by_side import side_by_side

from cac_fast import backends
from cac_fast.kernels import configs

REPEATS = 20
# Until all must be compiled and checked.
SECONDS = 25.0
LEGEND = """
median, p20, p80: milliseconds for loss and gradient, on a GPU without the host's; TFLOP/s:
effective ones, active x M x 4 D / median; registers, spills, shared: of the inner kernel, shared
memory in bytes."""

Line = Any  # of one of the tables: a NamedTuple
Row = dict[str, Any]


class Candidate(NamedTuple):
    """backend: whose table. line: what is to stand there in place of the present one."""

    backend: str
    line: Line

    def __str__(self) -> str:
        return f"{self.backend}: {', '.join(map(str, self.line))}"


def table_of(backend: str, case: Case, device: torch.device) -> tuple[dict[int, Line], int]:
    """The table that a back end takes its line for a case from, and the line's key."""
    if backend == "triton":
        family = configs.describe(device).family
        table = configs.TABLE[family][configs.precision(getattr(torch, case.dtype), family)]
    else:
        table = configs.GLUON
    return table, min(size for size in table if size >= case.channels)


def around(present: Line) -> list[Line]:
    """The present line first, then lines that differ from it a little."""
    stages, half = present.stages, {"block": present.block // 2}
    changes: list[dict[str, int]] = [{}, {"stages": stages - 1}]
    if hasattr(present, "registers"):
        # Not more of either: what there is is dealt out, and a kernel that asks for more may hang.
        changes += [{"stages": stages - 2}, half, half | {"stages": 2 * stages}]
        changes += [{"registers": present.registers - less} for less in (8, 16)]
    else:
        # Twice as many programs of half the size do not wait for each other.
        small = {"tile": present.tile // 2, "warps": present.warps // 2}
        small |= {"programs": 2 * present.programs}
        changes += [{"stages": stages + 1}, half, half | {"stages": stages + 1}]
        changes += [small | {"stages": stages - 1}, small, small | half]
    least = {"tile": 16, "block": 16, "warps": 1, "stages": 1}
    return [
        line
        for line in dict.fromkeys(present._replace(**change) for change in changes)
        if all(getattr(line, name, size) >= size for name, size in least.items())
    ]


@contextmanager
def in_its_table(candidate: Candidate, case: Case, device: torch.device) -> Iterator[None]:
    """The candidate's line where the present one stands."""
    table, key = table_of(candidate.backend, case, device)
    present, table[key] = table[key], candidate.line
    try:
        yield
    finally:
        table[key] = present


def resources() -> Row:
    """Of the inner kernels compiled in this process the largest numbers, as far as they tell."""
    kernels = [
        kernel
        for name, module in sys.modules.items()
        if name.startswith("cac_fast.kernels.")
        for caches in getattr(
            getattr(module, "dc_loss_partial", None), "device_caches", {}
        ).values()
        for kernel in caches[0].values()
    ]
    columns = {
        "registers": [getattr(kernel, "n_regs", None) for kernel in kernels],
        "spills": [getattr(kernel, "n_spills", None) for kernel in kernels],
        "shared": [kernel.metadata.shared for kernel in kernels],
    }
    known = {name: [n for n in numbers if n is not None] for name, numbers in columns.items()}
    return {name: max(numbers) for name, numbers in known.items() if numbers}


def try_out(candidate: Candidate, case: Case, device: torch.device) -> Row:
    """Compile and check: the columns known so far, `status` "ok" or what is wrong."""
    try:
        operands = make_operands(case, device)
        with in_its_table(candidate, case, device):
            results = backend_provider(candidate.backend, device).prepare(operands)()
        problem = Check(operands).problem(results)
    except Exception as error:  # compilers and drivers may raise anything
        lines = str(error).strip().splitlines() or [""]
        return {"status": f"failed: {type(error).__name__}: {lines[0][:200]}"}
    return {"status": f"wrong: {problem}" if problem else "ok", **resources()}


def take_turns(
    candidates: list[Candidate], case: Case, device: torch.device
) -> dict[Candidate, list[float]]:
    """Seconds of each, round-robin, so that what slows the GPU down for a while hits all alike."""
    operands = make_operands(case, device)
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in candidates}
    for turn in range(REPEATS + 1):
        for candidate, values in times.items():
            with in_its_table(candidate, case, device):
                call = backend_provider(candidate.backend, device).prepare(operands)
                took = measure.times(call, device).device
            if turn:  # the first time a kernel is loaded
                values.append(took)
    return times


def try_all(backends: list[str], case: Case, device: torch.device) -> dict[Candidate, Row]:
    """The candidates of all tables, each compiled and checked in a process of its own."""
    tables = {name: table_of(name, case, device) for name in backends}
    candidates = [
        Candidate(name, line)
        for name, (table, key) in tables.items()
        for line in around(table[key])
    ]
    answers = side_by_side([partial(try_out, each, case, device) for each in candidates], SECONDS)
    rows = [row if row else {"status": f"failed: {reason}"} for row, reason in answers]
    for each, row in zip(candidates, rows, strict=True):
        row |= {"name": str(each), "backend": each.backend, "line": each.line._asdict()}
    return dict(zip(candidates, rows, strict=True))


def time_those(tried: dict[Candidate, Row], case: Case, device: torch.device) -> str:
    """Add the times of one back end's candidates; a line of text proposes one for its table."""
    right = [candidate for candidate, row in tried.items() if row["status"] == "ok"]
    flop = 4 * round(case.share * case.anchors) * case.negatives * case.channels
    for candidate, times in take_turns(right, case, device).items():
        row = tried[candidate]
        row |= measure.percentiles(times)
        row["effective_tflops"] = flop / row["median_ms"] / 1e9
    backend = next(iter(tried)).backend
    if not right:
        return f"{backend}: no line works"
    best = list(tried)[fastest(list(tried.values()))].line
    table, key = table_of(backend, case, device)
    written = f"{key}: {type(best).__name__}({', '.join(map(str, best))}),"
    return f"{backend}: {'keep' if best == table[key] else 'propose'} {written}"


def fastest(rows: list[Row]) -> int:
    """Which row; the first, the present line's, where another is not faster beyond its spread."""
    measured = [index for index, row in enumerate(rows) if "median_ms" in row]
    best = min(measured, key=lambda index: rows[index]["median_ms"])
    by_chance = 0 in measured and rows[best]["p80_ms"] >= rows[0]["p20_ms"]
    return 0 if by_chance else best


def show(rows: list[Row]) -> str:
    """The rows as Markdown, then what failed."""
    columns = "median_ms p20_ms p80_ms effective_tflops registers spills shared".split()
    lines = [["", "median", "p20", "p80", "TFLOP/s", "registers", "spills", "shared"]]
    lines += [
        [row["name"], *(three_digits(row.get(name)) for name in columns)]
        for row in rows
        if "median_ms" in row
    ]
    failed = [f"- {row['name']}: {row['status']}\n" for row in rows if row["status"] != "ok"]
    return (report.aligned(lines) if len(lines) > 1 else "") + "".join(failed)


def backends_here(device: torch.device) -> list[str]:
    """Of the back ends that have a table those that can be used."""
    return [
        name
        for name in ("triton", "triton:gluon")
        if backends()[name] is None and works_on(name, device)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; 1 where a result was wrong or a back end has no line that works."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows, device, versions")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = backends_here(device)
    if not names:
        print(f"error: no back end with tiles to choose works on this {device}", file=sys.stderr)
        return 1
    case = standard_cases("cuda")[0]
    facts = measure.facts(device)
    given = sys.argv[1:] if arguments is None else arguments
    record = {"command": measure.command_line("bench/tiles.py", given), **facts, "case": str(case)}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{LEGEND}\n\n{case}\n", flush=True)
    tried = try_all(names, case, device)
    rows = list(tried.values())
    proposals: list[str] = []
    for name in names:
        of_name = {each: row for each, row in tried.items() if each.backend == name}
        proposals.append(time_those(of_name, case, device))
        print(show(list(of_name.values())), flush=True)
        found = {"gpu": measure.gpu_state(device), "proposals": proposals, "rows": rows}
        measure.write_record(options.json, record | found)
    print("\n".join(proposals))
    wrong = any(row["status"].startswith("wrong") for row in rows)
    return int(wrong or any(line.endswith("no line works") for line in proposals))


if __name__ == "__main__":
    sys.exit(main())
