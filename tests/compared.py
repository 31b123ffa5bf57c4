"""A small folder data set, and a trainer in place of the commands that a comparison runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_folders import write_folder

from accuracy import compare, runs
from cac_fast.train import checkpoint
from lib.running import RunError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "here" / "set", labeled=1, unlabeled=0)


class Trainer:
    """In place of the commands: leaves what they leave in a run folder; fails where told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Path, output: Path) -> None:
        self.output, self.iteration = output, 4
        self.fails: str | None = None
        self.commit, self.device = "first", "here"
        self.trained: list[str] = []
        words = "--dataset folder --shares 1/2 --seeds 0,1 --threads 1"
        folders = ["--runs", output / "runs", "--results", output / "results"]
        self.words = [*words.split(), "--data-dir", str(source), *map(str, folders)]
        self.options = compare.parse([*self.words, "--", "--iterations", "4"])
        monkeypatch.setattr(runs, "run", self.run)
        monkeypatch.setattr(compare, "plot", lambda results, path: None)
        monkeypatch.setattr(compare, "plan", lambda jobs, asked, options, failed: {})
        monkeypatch.setattr(compare, "planned_hours", lambda jobs, options, failed: {})
        monkeypatch.setattr(
            compare, "facts", lambda device: {"device": self.device, "commit": self.commit}
        )

    def run(self, command: list[str], threads: int, label: str) -> None:
        if command[0] == "train/evaluate.py":
            checkpoint_path = Path(command[command.index("--checkpoint") + 1])
            assert checkpoint_path.name == "best.pt" or checkpoint_path.is_file()
            miou = self.scored(command)
            result = {"miou": miou, "iou": [miou, miou]}
            Path(command[command.index("--json") + 1]).write_text(json.dumps(result))
            return
        if label == self.fails:
            self.trained.append(label)
            raise RunError(f"{label} ended with code 1: boom")
        folder = Path(command[command.index("--output") + 1])
        if command[0] == "train/adapt.py":
            source = Path(command[command.index("--checkpoint") + 1])
            folder.write_bytes(source.with_name("last.pt").read_bytes())
            return
        self.trained.append(label)
        lines = [{"kind": "val", "iteration": step, "miou": step / 10} for step in (2, 4)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "itera')
        config = {"iterations": 4}
        checkpoint.write(folder / "last.pt", {"iteration": self.iteration, "config": config})

    def scored(self, command: list[str]) -> float:
        """What an evaluation finds; replaced where it matters."""
        return 0.5

    def record(self) -> dict:
        path = self.output / "results/compare.json"
        return json.loads(path.read_text()) if path.is_file() else {"runs": []}

    def commits(self) -> list[list[str]]:
        return [run["commits"] for run in self.record()["runs"]]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> Trainer:
    return Trainer(monkeypatch, source, tmp_path)


def scoring(monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> list[list[str]]:
    """Keep the words of the trainer's commands, but for evaluations."""
    train, commands = trainer.run, []

    def run(command: list[str], threads: int, label: str) -> None:
        if command[0] != "train/evaluate.py":
            commands.append(command)
        train(command, threads, label)

    monkeypatch.setattr(runs, "run", run)
    return commands
