"""The hours that a dry run of a table tells."""

from __future__ import annotations

from pathlib import Path

import pytest
from tabled import Programs

from accuracy import table_hours
from lib.running import RunError


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Programs:
    return Programs(monkeypatch, tmp_path)


def test_a_dry_run_starts_nothing(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        table_hours, "step_seconds", lambda words, options: {"labeled": 360.0, "both": 720.0}
    )
    assert programs.fill(3, "--dry-run", "--rows", "SupOnly,VIII", "--seeds", "0,1") == 0
    assert programs.calls == []
    assert sorted(path.name for path in programs.folder.iterdir()) == ["set"]
    out = capsys.readouterr().out
    # Four steps of 360 s; two of them and two of 720 s, after a warm-up of two.
    assert out.count(": new, 0.40 h") == 2 and out.count(": new, 0.60 h") == 2
    assert "planned: 2.0 hours without evaluations, 4 of 4 runs left" in out
    assert programs.fill(3, "--rows", "SupOnly", "--seeds", "0") == 0
    programs.fill(3, "--dry-run", "--rows", "SupOnly,VIII", "--seeds", "0,1", "--jobs", "2")
    out = capsys.readouterr().out
    assert "SupOnly mIoU seed 0: finished" in out
    assert "planned: 0.8 hours without evaluations, 3 of 4 runs left" in out


def test_steps_that_fail_leave_the_rest_of_the_plan(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []

    def step_seconds(words: list[str], options: object) -> dict[str, float]:
        measured.append(words)
        if "supervised" in words:
            raise RunError("ten steps ended with code 2: boom")
        return {"labeled": 360.0, "both": 720.0}

    monkeypatch.setattr(table_hours, "step_seconds", step_seconds)
    assert programs.fill(3, "--dry-run", "--rows", "SupOnly,VIII", "--seeds", "0,1") == 1
    assert len(measured) == 2  # one of each kind, though two seeds of one fail
    out = capsys.readouterr().out
    said = "new, not estimated: ten steps ended with code 2: boom (supervised-seed"
    for seed in (0, 1):
        assert f"SupOnly mIoU seed {seed}: {said}{seed}-" in out
        assert f"VIII mIoU seed {seed}: new, 0.60 h (cac-" in out
    assert "planned: 1.2 hours without evaluations and without 2 not estimated, 4 of 4 runs" in out


def test_self_training_is_measured_with_made_up_labels(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []

    def step_seconds(words: list[str], options: object) -> dict[str, float]:
        measured.append(words)
        return {"labeled": 360.0, "both": 540.0 if "self_training" in words else 720.0}

    monkeypatch.setattr(table_hours, "step_seconds", step_seconds)
    assert programs.fill(3, "--dry-run", "--rows", "ST", "--seeds", "0") == 0
    assert len(measured) == 2 and not any("--teacher" in words for words in measured)
    out = capsys.readouterr().out
    # Two of four steps are warm-up: two of 360 s, two of 540 s.
    assert "ST mIoU seed 0: new, 0.50 h" in out and "planned: 0.9 hours" in out


def test_classifications_are_told_beside_the_hours(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        table_hours, "step_seconds", lambda words, options: {"labeled": 360.0, "both": 720.0}
    )
    words = ["--dry-run", "--seeds", "0", "--image-labels", "from-masks"]
    assert programs.fill(5, *words) == 0
    assert (
        "hours without evaluations and without 1 of train/classify.py, " in capsys.readouterr().out
    )
