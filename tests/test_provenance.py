"""What a run folder says of the program and the device that it was trained with."""

from __future__ import annotations

import json

import pytest
import small_training
import torch

from cac_fast.train import provenance

CPU = torch.device("cpu")


def read(folder) -> dict[str, list[str]]:
    return json.loads((folder / "trained_with.json").read_text())


def test_starts_are_added_and_a_new_run_forgets_them(tmp_path, monkeypatch):
    for commit, device in (("one", "this"), ("two", "this"), ("one", "that"), (None, "that")):
        monkeypatch.setattr(provenance, "commit", lambda commit=commit: commit)
        monkeypatch.setattr(provenance, "device_name", lambda _, device=device: device)
        provenance.note(tmp_path, CPU, new=False)
    assert read(tmp_path) == {"commits": ["one", "two"], "devices": ["this", "that"]}
    provenance.note(tmp_path, CPU, new=True)
    assert read(tmp_path) == {"commits": [], "devices": ["that"]}


@pytest.mark.parametrize("content", ["{", "[]", '{"commits": 3}', '{"commits": [], "devices": 1}'])
def test_a_broken_note_ends_no_run(content, tmp_path, monkeypatch):
    (tmp_path / "trained_with.json").write_text(content)
    monkeypatch.setattr(provenance, "commit", lambda: "one")
    provenance.note(tmp_path, CPU, new=False)
    assert read(tmp_path) == {"commits": ["one"], "devices": [provenance.device_name(CPU)]}


def test_a_training_notes_them(folder_data, tmp_path):
    small_training.run(folder_data, tmp_path / "run", "--method", "supervised")
    commits, devices = read(tmp_path / "run").values()
    assert commits == [provenance.commit()] if provenance.commit() else commits == []
    assert devices == [provenance.device_name(CPU)] and devices[0]
