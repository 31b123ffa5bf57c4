"""The programs that a table of the paper starts, replaced by what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_folders import write_folder

from accuracy import runs, table_plan, tables
from accuracy.paper_tables import TABLES
from cac_fast.train import config
from lib.running import RunError

SMALL = "--network lraspp --backbone mobilenet_v2 --batch-size 2 --crop-size 32 --workers 0"
REST = [*SMALL.split(), "--device", "cpu", "--iterations", "4", "--warmup", "2"]


def val(iteration: int, miou: float) -> dict[str, Any]:
    return {"kind": "val", "iteration": iteration, "miou": miou}


class Programs:
    """In place of the programs: notes the calls and leaves what they leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.calls, self.fails = folder, [], ""
        data = write_folder(folder / "set", labeled=16, unlabeled=0)
        self.words = ["--dataset", "folder", "--data-dir", str(data), "--threads", "1"]
        self.words += ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
        monkeypatch.setattr(runs, "run", self.run)
        self.plot = tables.plot
        monkeypatch.setattr(tables, "plot", lambda number, record, path: None)
        monkeypatch.setattr(tables, "facts", lambda device: {"device": "here", "commit": "first"})

    def run(self, command: list[str], threads: int, label: str) -> None:
        self.calls.append((label, command))
        if self.fails and self.fails in label:
            raise RunError(f"{label} ended with code 1: boom")
        if command[0] == "train/classify.py":
            return
        settings = config.parse(command[1:])
        out = Path(str(settings.run.output))
        score = (100 + 10 * settings.run.seed + len(label)) / 1000
        lines = [val(2, score + 0.02), val(settings.optim.iterations, score)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (out / "config.json").write_text(json.dumps(settings.flat()))
        (out / "last.pt").touch()

    def fill(self, table: int, *words: str, rest: list[str] = REST) -> int:
        arguments = ["--table", str(table), *self.words, *words, "--", *rest]
        return tables.fill(tables.parse(arguments))

    def plan(self, table: int, *words: str, rest: list[str] = REST) -> list[table_plan.Cell]:
        options = tables.parse(["--table", str(table), *self.words, *words, "--", *rest])
        data = tables.open_data(options.dataset, options.folder)
        return table_plan.cells(TABLES[table], options, data)

    def record(self, table: int) -> dict[str, Any]:
        return json.loads((self.folder / f"results/table{table}-set.json").read_text())

    def text(self, table: int) -> str:
        return (self.folder / f"results/table{table}-set.md").read_text()
