"""The scaling bench: its ratios, and the command from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import scaling

from cac_fast.train.log import train_line


def test_efficiency_is_relative_to_one_process():
    times = {(1, 4): [1.0, 1.2, 1.1], (1, 8): [2.0], (2, 8): [1.375], (2, 4): [], (4, 16): [2.2]}
    found = {(row["processes"], row["batch"]): row for row in scaling.rows(times)}
    assert found.keys() == times.keys() - {(2, 4)}
    assert found[2, 8]["weak"] == pytest.approx(1.1 / 1.375)
    assert found[2, 8]["strong"] == pytest.approx(2.0 / 1.375 / 2)
    assert found[1, 8]["strong"] == found[1, 8]["weak"] == 1
    assert found[4, 16]["weak"] == pytest.approx(0.5) and found[4, 16]["strong"] is None


def test_seconds_are_those_of_a_step(monkeypatch):
    def trained(command, **_):
        folder = Path(command[command.index("--output") + 1])
        means = {"loss": 1.0, "loss_ce": 1.0, "loss_dc": 1.0}
        reading = {
            "means": means,
            "images": 12,
            "steps_per_s": 4.0,
            "data_s": 0,
            "peak_memory_mb": 0,
        }
        line = train_line([reading | {"skipped": 0}], rate=0.1, reductions={})
        text = json.dumps({"kind": "train", "iteration": 5, **line})
        (folder / "metrics.jsonl").write_text(f"{text}\n{text}\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(scaling.subprocess, "run", trained)
    options = scaling.parse([])
    assert scaling.step_times((2, 6), options) == pytest.approx([0.25])


def test_command(folder_data, tmp_path, capsys):
    file = tmp_path / "rows.json"
    trainer = f"--dataset folder --data-dir {folder_data} --crop-size 32 --backbone mobilenet_v2"
    options = f"--processes 2 --images 2 --steps 10 --turns 1 --json {file} -- {trainer}"
    scaling.main([*options.split(), "--device", "cpu"])
    record = json.loads(file.read_text())
    sizes = [(row["processes"], row["batch"]) for row in record["rows"]]
    assert sizes == [(1, 2), (1, 4), (2, 4)]
    for row in record["rows"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert {"torch", "cpu", "commit", "command"} <= record.keys()
    assert "| processes" in capsys.readouterr().out
