"""The bench of the training step: its baseline, its check, its parts, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_step
from cac_fast.train.profiling import phase
from lib import measure, train_step_case
from lib.train_step_baseline import BaselineStep
from lib.train_step_contenders import TIMES

ROOT = Path(__file__).resolve().parents[1]

CPU = torch.device("cpu")
# Two views of 64 locations each: 48 random ones of each view, two steps.
SMALL = train_step_case.Case("deeplabv3plus", "mobilenet_v2", 4, 32, 192, "fp32", CPU)
OPTIONS = "--backbone mobilenet_v2 --batch-size 4 --crop-size 32 --device cpu".split()


def test_baseline_equals_trainer() -> None:
    assert train_step_case.problem(SMALL) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_baseline_equals_trainer_on_a_gpu() -> None:
    assert train_step_case.problem(replace(SMALL, device=torch.device("cuda"))) is None


class OtherLoss(BaselineStep):
    def contrastive_loss(self, *arguments):
        return 1.0002 * super().contrastive_loss(*arguments)


class OtherGradient(BaselineStep):
    def contrastive_loss(self, views, unlabeled):
        loss = super().contrastive_loss(views, unlabeled)
        return loss + 0.1 * (loss - loss.detach())


@pytest.mark.parametrize(("other", "named"), [(OtherLoss, "loss_dc"), (OtherGradient, "gradient")])
def test_another_step_is_found(monkeypatch, other, named: str) -> None:
    monkeypatch.setattr(train_step_case, "BaselineStep", other)
    assert named in train_step_case.problem(SMALL)


def test_negatives_over_steps() -> None:
    def split(negatives: int) -> tuple[int, int]:
        return replace(SMALL, negatives=negatives).per_view_and_steps

    assert split(2) == (1, 1)
    assert split(128) == (64, 1)  # all of a step
    assert split(130) == (13, 5)  # 65 a view are one too many, and 2 to 4 steps cannot share them
    assert split(192) == (48, 2)
    with pytest.raises(ValueError, match="even"):
        split(97)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--negatives", "7"], "make it even"), (["--", "--no-such"], "--no-such")],
)
def test_bad_options(capsys, options: list[str], message: str) -> None:
    assert train_step.main([*OPTIONS, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("failing", ["problem", "make", "warm-up", "second turn"])
def test_what_does_not_fit_fails_alone(monkeypatch, tmp_path, capsys, failing: str) -> None:
    seen, records = [], []

    def fail_at(*stages: str) -> None:
        if failing in stages:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore")

    def make(fragile: bool):
        def of_case(case):
            calls = ["warm-up", "warm-up", "first turn", "second turn"]

            def call():
                with phase("loss"):
                    fail_at(calls.pop(0) if fragile else "none")
                return {}

            fail_at("make" if fragile else "none")
            seen.append(fragile)
            return case, call, lambda: (torch.ones(1),)

        return of_case

    keep = measure.write_record
    monkeypatch.setattr(
        measure, "write_record", lambda *given: records.append(given[1]["rows"]) or keep(*given)
    )
    monkeypatch.setattr(train_step, "problem", lambda case: fail_at("problem"))
    monkeypatch.setattr(train_step, "trainer_step", make(False))
    monkeypatch.setattr(train_step, "plain_heads_step", make(False))
    monkeypatch.setattr(train_step, "baseline_step", make(True))
    file = tmp_path / "x.json"
    assert train_step.main([*OPTIONS, "--baseline", "--steps=2", f"--json={file}"]) == 0
    assert seen.count(True) == (failing in ("warm-up", "second turn"))
    # Three warm-ups, two turns and the end.
    assert [row["runs"] for rows in records for row in rows[:1]] == [0, 0, 0, 1, 2, 2]
    trainer, heads, baseline = json.loads(file.read_text())["rows"]
    assert trainer["status"] == heads["status"] == "ok" and heads["time_over_first"] > 0
    assert baseline["status"] == "failed: CUDA out of memory. Tried to allocate 9 GiB."
    assert baseline["runs"] == 0 and all(baseline[name] is None for name in TIMES)
    assert f"- baseline, M 25,600: {baseline['status']}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_command(tmp_path) -> None:
    options = "--negatives 40 --sweep-negatives 0.02k --baseline --steps 1 --json".split()
    command = [sys.executable, "bench/train_step.py", *OPTIONS, *options, str(tmp_path / "x.json")]
    done = subprocess.run(
        [*command, "--", "--momentum", "0.8"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["command"].startswith("python bench/train_step.py --backbone mobilenet_v2")
    found = [(row["provider"], row["negatives"], row["precision"]) for row in record["rows"]]
    names = [("trainer", 40), ("plain heads", 40), ("baseline", 40), ("trainer", 20)]
    assert found == [(*name, "fp32") for name in names]
    parts = ["forward labeled", "forward unlabeled", "loss", "backward", "optimizer"]
    for row in record["rows"]:
        assert sorted(row["parts_ms"]) == sorted(parts)
        assert all(value > 0 for value in row["parts_ms"].values())
        assert sum(row["parts_ms"].values()) <= row["median_ms"]
        assert row["images_per_s"] == pytest.approx(8e3 / row["median_ms"])
        # At least weights, gradients and momentum of the 5 million parameters.
        assert row["peak_mb"] is None or row["peak_mb"] > 3 * 4 * 5
    assert "- baseline, M 40: " in done.stdout
