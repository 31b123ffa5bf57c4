"""The hours that a dry run of a table tells."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tabled import REST, Programs

from accuracy import table_hours
from cac_fast.train.batch import Batch, Step
from cac_fast.train.log import read_metrics
from lib import classify_time, step_time
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
    assert (
        "planned: 1.2 hours without evaluations and without 2 that are not estimated, 4 of 4" in out
    )


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


def test_the_hours_of_table_5_hold_the_classification_and_the_extra_classifier(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []

    def step_seconds(
        words: list[str], options: object, program: str = "step_time.py"
    ) -> dict[str, float]:
        measured.append((program, words))
        if program == "classify_time.py":
            return {"step": 36.0, "steps": 20}
        return {"labeled": 360.0, "both": 900.0 if "--pseudo-labels" in words else 720.0}

    monkeypatch.setattr(table_hours, "step_seconds", step_seconds)
    words = ["--dry-run", "--seeds", "0", "--rows", "CAC R50", "--image-labels", "from-masks"]
    assert programs.fill(5, *words) == 0
    out = capsys.readouterr().out
    assert "for CAC R50 weakly seed 0: new, 0.20 h (classify-" in out
    # Two of four steps are warm-up.
    assert "CAC R50 semi seed 0: new, 0.60 h" in out and "CAC R50 weakly seed 0: new, 0.70 h" in out
    said = "planned: 1.5 hours without evaluations and without the pseudo masks, 3 of 3 runs left"
    assert said in out
    labels = [words[-1] for _, words in measured if "--pseudo-labels" in words]
    assert labels == ["made-up"]
    # Masks that are there are those of the ten steps.
    assert programs.fill(5, *words[1:], "--columns", "weakly") == 0
    measured.clear()
    (folder,) = programs.folder.glob("runs/cac-*")
    (folder / "last.pt").unlink()
    assert programs.fill(5, *words, "--columns", "weakly") == 0
    ((program, found),) = measured
    assert program == "step_time.py" and found[-1].endswith("/masks") and "made-up" not in found
    assert "hours without evaluations, 1 of 2 runs left" in capsys.readouterr().out


def run_main(module: object, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *words])
    module.main()


def test_ten_steps_of_a_weakly_row_have_the_extra_classifier(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "STEPS", 1)
    monkeypatch.setattr(step_time, "WARM_UP", 1)
    found, optimize = [], step_time.Trainer.optimize

    def kept(trainer: step_time.Trainer, step: Step) -> Batch:
        found.append(optimize(trainer, step))
        return found[-1]

    monkeypatch.setattr(step_time.Trainer, "optimize", kept)
    file = str(tmp_path / "time.json")
    rest = [*programs.words[:4], *REST, "--method", "cac", "--labeled-share", "1/4"]
    run_main(step_time, monkeypatch, file, *rest)
    assert not any("loss_weak" in scalars for scalars in found)
    found.clear()
    run_main(step_time, monkeypatch, file, *rest, "--pseudo-labels", "made-up")
    # The steps with unlabeled images are the last ones, at the end of a run: the full weight.
    assert ["loss_weak" in scalars for scalars in found] == [False, False, True, True]
    assert all(float(scalars["weak_weight"]) == pytest.approx(0.4) for scalars in found[2:])
    assert float(found[-1]["loss_weak"]) > 0
    assert json.loads(Path(file).read_text())["both"] > 0


def test_ten_steps_of_a_classification(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many there are, and how many a whole one has: epochs of all images with labels."""
    noted, runs = [], []

    def read(path: Path) -> list[dict[str, float]]:
        noted[:] = read_metrics(path)
        return [{"images_per_s": 0.01}, {"images_per_s": 12.0}, {"images_per_s": 4.0}]

    class Kept(classify_time.ClassifierRun):
        def train(self) -> object:
            runs.append(self)
            return super().train()

    monkeypatch.setattr(classify_time, "read_metrics", read)
    monkeypatch.setattr(classify_time, "ClassifierRun", Kept)
    file = tmp_path / "time.json"
    text = "--backbone mobilenet_v2 --workers 0 --crop-size 32 --image-labels from-masks"
    text += " --batch-size 6 --labeled-share 1/4 --device cpu"
    words = [str(file), *programs.words[:4], *text.split()]
    run_main(classify_time, monkeypatch, *words, "--epochs", "3")
    found = json.loads(file.read_text())
    assert found["steps"] == 8  # three times 16 images by 6
    # The first line, of the two steps before those that are timed, does not count.
    assert found["step"] == pytest.approx((6 / 12 + 6 / 4) / 2)
    assert [(line["kind"], line["iteration"]) for line in noted] == [
        ("train", iteration) for iteration in range(2, 13, 2)
    ]
    assert runs[0].scored == [] and runs[0].config.data.crop_size == 32
    monkeypatch.setattr(classify_time, "STEPS", 2)
    run_main(classify_time, monkeypatch, *words, "--iterations", "700")
    assert json.loads(file.read_text())["steps"] == 700
    run_main(classify_time, monkeypatch, *words)
    assert json.loads(file.read_text())["steps"] == 14  # five epochs
