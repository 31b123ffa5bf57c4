"""The scaling bench: its ratios, and the command from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import scaling


def test_efficiency_is_relative_to_one_process():
    times = {(1, 4): [1.0, 1.2, 1.1], (1, 8): [2.0], (2, 8): [1.375], (2, 4): [], (4, 16): [2.2]}
    found = {(row["processes"], row["batch"]): row for row in scaling.rows(times)}
    assert found.keys() == times.keys() - {(2, 4)}
    assert found[2, 8]["weak"] == pytest.approx(1.1 / 1.375)
    assert found[2, 8]["strong"] == pytest.approx(2.0 / 1.375 / 2)
    assert found[1, 8]["strong"] == found[1, 8]["weak"] == 1
    assert found[4, 16]["weak"] == pytest.approx(0.5) and found[4, 16]["strong"] is None


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
