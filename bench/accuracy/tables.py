"""Tables 1 to 5 of the paper as runs: Markdown with its numbers beside ours, JSON, a plot.

    python bench/accuracy/tables.py --table 3 --dataset toycity --dry-run
    python bench/accuracy/tables.py --table 3 --dataset folder --data-dir DIR --rows VIII,IV \\
        --iterations 1500 -- --backbone mobilenet_v2 --weights FILE

What follows `--` goes to `train/main.py` and wins over a table's network and backbone, but not
over what makes a row that row. In `--weights`, {backbone} stands for the row's backbone. A run is
known by a hash of its settings, so that tables share runs: one that is over is not repeated, and
one that was interrupted goes on where it stopped. All runs that are over are shown, whatever
`--rows` and `--columns` ask to train. `--dry-run` trains nothing: it measures ten steps of each
kind and says how long the rest will take; the exit status is 1 if the steps of some kind fail.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import runs as folders
from accuracy.arguments import add_shared, data_options, find_data, refuse
from accuracy.paper_tables import TABLES, Table
from accuracy.table_classify import words_of
from accuracy.table_hours import show_plan
from accuracy.table_outcome import differences, markdown, orderings, plot, result_of, summary_of
from accuracy.table_plan import (
    Cell,
    Run,
    cells,
    check_weights,
    is_done,
    labels,
    ordered,
)
from cac_fast.train.data.layouts import open_data
from cac_fast.train.distributed import run_command
from cac_fast.train.errors import InputError, did_you_mean
from cac_fast.train.options import Parser
from lib.measure import ROOT, command_line, facts, shown, write_record
from lib.running import RunError, programs

FIXED = frozenset(
    "--dataset --data-dir --method --output --seed --restart --teacher --pseudo-labels".split()
)
"""Options of `train/main.py` that a call cannot give behind `--`."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """What a call asks for.

    Raises:
        InputError: an argument cannot be used.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, choices=sorted(TABLES), required=True)
    add_shared(parser)
    parser.add_argument("--rows", help="train these alone, names between commas")
    parser.add_argument("--columns", help="train these alone, names between commas")
    parser.add_argument("--iterations", help="as train/main.py's")
    parser.add_argument(
        "--lists",
        metavar="DIR",
        help="the folder of labeled.txt and unlabeled.txt; {share} in it stands for 1_8 and so on, "
        "{list} for the number of the data list",
    )
    parser.add_argument("--image-labels", metavar="FILE", help="of Table 5, as train/classify.py's")
    parser.add_argument(
        "--classify",
        metavar="OPTIONS",
        help="of Table 5: options of train/classify.py as one text, as '--learning-rate 0.001 "
        "--epochs 20'",
    )
    parser.add_argument("--dry-run", action="store_true", help="plan, and train nothing")
    parser.add_argument("--name", help="of the result files (default: tableN-DATA)")
    options = parser.parse_args(arguments[:cut])
    options.command, options.rest = arguments, arguments[cut + 1 :]
    if options.iterations is not None:
        options.rest = [*options.rest, "--iterations", options.iterations]
    refuse(options.rest, FIXED, "tables.py")
    find_data(options)
    options.data = data_options(options)
    if options.classify is not None and not TABLES[options.table].weakly:
        raise InputError(f"--classify is of Table 5: leave it out with --table {options.table}")
    options.classify = [] if options.classify is None else words_of(options.classify, options.data)
    options.name = options.name or f"table{options.table}-{options.title}"
    options.runs = (options.runs or ROOT / "runs" / "tables").resolve()
    if options.lists is not None:
        options.lists = str(Path(options.lists).resolve())
    return options


def _chosen(all_cells: list[Cell], options: argparse.Namespace) -> list[Cell]:
    """The cells that are to be trained.

    Raises:
        InputError: there is no row or column of a name.
    """
    for kind, text in (("row", options.rows), ("column", options.columns)):
        if text is None:
            continue
        there = list(dict.fromkeys(getattr(cell, kind) for cell in all_cells))
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in there:
                raise InputError(
                    f"--{kind}s {text}: Table {options.table} has no {kind} {name!r}"
                    f"{did_you_mean(name, there)} (choose of {', '.join(there)})"
                )
        all_cells = [cell for cell in all_cells if getattr(cell, kind) in names]
    return all_cells


def _do(each: Run, name: str, before: list[Future], options: argparse.Namespace) -> None:
    """One run, behind those that it needs."""
    folders.wait_for(before, name)
    folder = each.folder(options)
    if is_done(each, options):
        return
    folders.note_run(folder, options.note, (folder / "compare.json").is_file())
    if each.settings is not None:
        folders.trained(each.command(options), folder, options.threads, name)
        return
    folders.run([each.program, *each.command(options)], options.threads, name)
    write_record(folder / "finished.json", {"words": list(each.words)})


def fill(options: argparse.Namespace) -> int:
    """Train what is left of a table and write it below `options.results`; 1 if a run failed.

    Raises:
        InputError: the data, a list, a name or a setting cannot be used.
    """
    table: Table = TABLES[options.table]
    data = open_data(options.dataset, options.folder)
    if not data.splits["val"]:
        raise InputError(
            f"the val split of {data.root} holds no image, but tables are scored on it: add some"
        )
    all_cells = cells(table, options, data)
    runs = ordered(_chosen(all_cells, options), options.seeds)
    names = labels(all_cells)
    for cell in all_cells:
        if cell.note and options.dry_run:
            print(f"{cell.row} {cell.column}: {cell.note}")
    with programs.stopped_by_signals():
        if options.dry_run:
            return show_plan(runs, names, options)
        check_weights(runs, names, options)
        return _fill(table, all_cells, runs, names, options)


def _fill(
    table: Table,
    all_cells: list[Cell],
    runs: dict[str, Run],
    names: dict[str, str],
    options: argparse.Namespace,
) -> int:
    machine = facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options.note = {"commits": machine.pop("commit") or "unknown", "machines": machine}
    target = options.results / options.name
    record: dict[str, Any] = {
        "command": command_line("bench/accuracy/tables.py", options.command),
        "table": options.table,
        "data": options.dataset,
        "paper_data": table.dataset,
        "title": options.title,
        "differences": differences(table, all_cells, options),
    }
    everything = ordered(all_cells, options.seeds)

    def write() -> str:
        found = {key: got for key, run in everything.items() if (got := result_of(run, options))}
        record["cells"] = [summary_of(cell, found, options.seeds) for cell in all_cells]
        record["orderings"] = orderings(table, record["cells"])
        record["runs"] = [
            {
                "name": names[key],
                "key": key,
                "settings": {
                    name: shown(value) if isinstance(value, str) else value
                    for name, value in everything[key].settings.flat().items()
                },
                **folders.read_note(everything[key].folder(options)),
                **result,
            }
            for key, result in found.items()
        ]
        write_record(Path(f"{target}.json"), record)
        text = markdown(options.table, table, record)
        Path(f"{target}.md").write_text(text)
        return text

    failures = []
    write()
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            futures: dict[str, Future] = {}
            for key, each in runs.items():
                # Begun before this one, as the pool takes them in order: no two wait for another.
                before = [futures[first.key] for _, first, _ in each.needs]
                futures[key] = pool.submit(_do, each, names[key], before, options)
            for future in as_completed(futures.values()):
                try:
                    future.result()
                except (RunError, InputError) as error:
                    failures.append(str(error))
                    continue
                write()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            text = write()
    plot(options.table, record, Path(f"{target}.png"))
    print(text)
    print(f"written: {target}.json, .md, .png")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: fill(parse(sys.argv[1:]))))
