"""The training loop: golden losses, warm-up, switches, guards."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from small_training import assert_same_bits, losses, run, weights
from tiny_scenes import write_scenes

from cac_fast.backend import BACKENDS
from cac_fast.train import checkpoint, engine
from cac_fast.train.errors import InputError

# Without batch statistics of 2 x 2 maps, in which rounding would grow from step to step.
SMOOTH = "--no-dropout --freeze-bn --batch-size 4 --learning-rate 0.01".split()
# So that nobody's resize has a part in the losses.
WHOLE_PIXELS = "--labeled-scale 1,1 --unlabeled-scale 1,1".split()
# From a run of the reference back end in float32; other processors round differently.
GOLDEN = [
    *(1.098335, 1.091864, 1.076507, 1.080733, 1.436074),
    *(1.439473, 1.432854, 1.391956, 1.296868, 0.945051),
]


@pytest.mark.parametrize(
    "backend",
    [
        name
        for name, backend in ((name, entry.load()) for name, entry in BACKENDS.items())
        if not backend.unavailable() and not backend.refuses(torch.empty(0, 128))
    ],
)
def test_golden_losses(folder_data, tmp_path, backend):
    lines = run(folder_data, tmp_path / "run", *SMOOTH, *WHOLE_PIXELS, "--dc-backend", backend)
    assert losses(lines) == pytest.approx(GOLDEN, rel=1e-3)
    assert losses(lines, "loss_dc")[:2] == [0, 0] and min(losses(lines, "loss_dc")[4:9]) > 3


def test_run_folder(folder_data, tmp_path):
    lines = run(folder_data, tmp_path / "run", "--eval-every", "5", "--false-negatives")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "metrics.jsonl", "last.pt", "best.pt", "tensorboard", "samples", "lock",
        "trained_with.json",
    }  # fmt: skip
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    assert [line["iteration"] for line in train] == list(range(1, 11))
    assert [line["iteration"] for line in val] == [5, 10]
    wanted = (
        "kind iteration loss loss_ce loss_dc active negatives lr images_per_s data_s "
        "peak_memory_mb positive_cosine"
    )
    assert set(wanted.split()) <= set(train[-1])
    assert set(val[0]) == {"kind", "iteration", "miou", "pixel_accuracy", "iou"}
    assert len(val[0]["iou"]) == 3 and 0 <= val[0]["miou"] <= 1
    assert train[0]["active"] == 0 and train[-1]["active"] > 0
    assert train[-1]["negatives"] <= 2 * 2 * 16
    for line in train:
        assert line["loss"] == pytest.approx(line["loss_ce"] + 0.1 * line["loss_dc"], rel=1e-5)
        assert line["lr"] == pytest.approx(0.001 * (1 - (line["iteration"] - 1) / 10) ** 0.9)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["crop_size"] == 32
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


def test_supervised_ignores_unlabeled_images(folder_data, tmp_path):
    lines = run(folder_data, tmp_path / "run", "--method", "supervised")
    assert all(
        line["loss"] == line["loss_ce"] and line["loss_dc"] == 0
        for line in lines
        if line["kind"] == "train"
    )
    assert not any(name.startswith("projector") for name in weights(tmp_path / "run" / "last.pt"))


def test_methods_share_the_warm_up(folder_data, tmp_path):
    """Until the contrastive loss starts, CAC is supervised training to the bit."""
    supervised = run(folder_data, tmp_path / "a", "--method", "supervised", "--deterministic")
    cac = run(folder_data, tmp_path / "b", "--deterministic", "--warmup", "4")
    assert losses(cac)[:4] == losses(supervised)[:4]
    assert losses(cac)[4:] != losses(supervised)[4:]


def test_projector_keeps_its_weights_in_the_warm_up(folder_data, tmp_path):
    run(folder_data, tmp_path / "a", "--iterations", "1", "--warmup", "1")
    run(folder_data, tmp_path / "b", "--iterations", "4", "--warmup", "4")
    one, four = weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "b" / "last.pt")
    assert torch.equal(one["projector.0.weight"], four["projector.0.weight"])
    assert not torch.equal(one["network.classifier.1.weight"], four["network.classifier.1.weight"])


@pytest.mark.parametrize(
    "switches",
    [
        "--no-negative-sampling --no-directional --no-positive-filtering --no-contrastive",  # I
        "--no-negative-sampling --no-directional --no-positive-filtering",  # II
        "--no-negative-sampling --no-positive-filtering",  # III
        "--no-positive-filtering",  # IV
        "--no-directional",  # V
        "--no-context",  # VI
        "--no-projector",  # VII
        "--normalization active --negatives-per-view 20 --bank-past-steps 1",  # the authors'
        "--base-size 64 --jitter-labeled",  # their resize and jitter
        "--network pspnet --batch-size 4",
        "--network lraspp",
    ],
)
def test_every_switch_trains(folder_data, tmp_path, switches):
    lines = run(folder_data, tmp_path / "run", "--iterations", "4", *switches.split())
    assert all(math.isfinite(loss) for loss in losses(lines))
    assert losses(lines, "loss_dc")[-1] > 0
    if "negatives-per-view" in switches:
        assert losses(lines, "negatives")[-1] <= 2 * 2 * 20


def test_precision_bf16_starts_where_fp32_does(folder_data, tmp_path):
    options = [*SMOOTH, "--iterations", "1", "--warmup", "0"]
    (exact,) = losses(run(folder_data, tmp_path / "a", *options))
    (rounded,) = losses(run(folder_data, tmp_path / "b", *options, "--precision", "bf16"))
    assert rounded == pytest.approx(exact, rel=1e-3) and rounded != exact


# ---- guards


def test_not_finite_loss_stops_and_keeps_the_last_checkpoint(folder_data, tmp_path, monkeypatch):
    step = engine.Trainer._train_step

    def poisoned(self, *batch):
        if self.iteration == 7:
            with torch.no_grad():
                self.network.classifier[1].bias.fill_(math.nan)
        step(self, *batch)

    monkeypatch.setattr(engine.Trainer, "_train_step", poisoned)
    with pytest.raises(
        InputError, match=r"not finite at iteration 8, batch: .*0\d.*last\.pt"
    ) as error:
        run(folder_data, tmp_path / "run", "--save-every", "5", "--log-every", "50")
    assert "\n" not in str(error.value)
    kept = checkpoint.read(tmp_path / "run" / "last.pt")
    assert kept["iteration"] == 5
    assert all(
        value.isfinite().all() for value in kept["method"].values() if value.is_floating_point()
    )


def test_weights_that_are_not_finite_are_not_kept(folder_data, tmp_path, monkeypatch):
    step = engine.Trainer._train_step

    def poisoned(self, *batch):
        step(self, *batch)
        if self.iteration == 3:
            with torch.no_grad():
                self.method.projector[0].bias.fill_(math.inf)  # no loss shows it in the warm-up

    monkeypatch.setattr(engine.Trainer, "_train_step", poisoned)
    with pytest.raises(InputError, match="not finite at iteration 4"):
        run(folder_data, tmp_path / "run", "--save-every", "2", "--warmup", "10")
    assert checkpoint.read(tmp_path / "run" / "last.pt")["iteration"] == 2
    assert not (tmp_path / "run" / "best.pt").exists()


def test_file_that_breaks_in_the_middle_keeps_what_was_trained(tmp_path, monkeypatch):
    data = write_scenes(tmp_path / "data", {"train": (8, 0)})
    victim = data / "images" / "train" / "03.png"
    step = engine.Trainer._train_step

    def breaking(self, batch):
        step(self, batch)
        if self.iteration == 5:
            victim.write_bytes(victim.read_bytes()[:200])

    monkeypatch.setattr(engine.Trainer, "_train_step", breaking)
    with pytest.raises(InputError, match=victim.name):
        run(data, tmp_path / "run", "--iterations", "30")
    assert 5 <= checkpoint.read(tmp_path / "run" / "last.pt")["iteration"] < 30


@pytest.mark.parametrize("iterations", ["2", "4"])  # the last evaluation, and one before
def test_failing_evaluation_loses_nothing(folder_data, tmp_path, monkeypatch, iterations):
    options = ["--iterations", iterations, "--eval-every", "2", "--save-every", "50"]
    run(folder_data, tmp_path / "whole", *options, "--deterministic")

    def full(*_, **__):
        raise InputError("image too large")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "evaluate", full)
        for _ in range(2):
            with pytest.raises(InputError, match="too large"):
                run(folder_data, tmp_path / "run", *options, "--deterministic")
            assert checkpoint.read(tmp_path / "run" / "last.pt")["iteration"] == 2
    lines = run(folder_data, tmp_path / "run", *options, "--deterministic")
    scored = [line["iteration"] for line in lines if line["kind"] == "val"]
    assert scored == list(range(2, int(iterations) + 1, 2))
    assert_same_bits(weights(tmp_path / "run" / "last.pt"), weights(tmp_path / "whole" / "last.pt"))


def test_evaluation_that_is_cut_off_is_logged_once(folder_data, tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(engine.Trainer, "_write_best", lambda _: 1 / 0)  # after the line
        with pytest.raises(ZeroDivisionError):
            run(folder_data, tmp_path / "run", "--iterations", "2")
    lines = run(folder_data, tmp_path / "run", "--iterations", "2")
    assert [line["iteration"] for line in lines if line["kind"] == "val"] == [2]


def test_finished_run_without_validation_has_its_best_state(tmp_path):
    data = write_scenes(tmp_path / "data", {"train": (2, 0)})
    for _ in range(2):
        run(data, tmp_path / "run", "--iterations", "1")
        best = tmp_path / "run" / "best.pt"
        assert checkpoint.read(best)["iteration"] == 1
        best.unlink()  # as if killed before it was written


def test_signal_after_the_last_step_stops_nothing(folder_data, tmp_path, monkeypatch):
    step = engine.Trainer._train_step

    def interrupted(self, *batch):
        step(self, *batch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.Trainer, "_train_step", interrupted)
    lines = run(folder_data, tmp_path / "run", "--iterations", "1")
    assert [line["kind"] for line in lines] == ["train", "val"]


def test_full_disk(tmp_path, monkeypatch):
    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    checkpoint.write(tmp_path / "last.pt", {"iteration": 1})
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"last.pt cannot be written .*No space"):
        checkpoint.write(tmp_path / "last.pt", {"iteration": 2})
    assert checkpoint.read(tmp_path / "last.pt")["iteration"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_corrupt_unlabeled_image_is_skipped_and_counted(tmp_path):
    data = write_scenes(tmp_path / "data", {"train": (2, 4)})
    (data / "images" / "train" / "04.png").write_bytes(b"no image")
    lines = run(data, tmp_path / "run", "--iterations", "8", "--warmup", "0")
    assert losses(lines, "skipped_images")[-1] >= 1
    assert (
        checkpoint.read(tmp_path / "run" / "best.pt")["iteration"] == 8
    )  # no val split: the last state


def test_no_active_pixel(folder_data, tmp_path):
    lines = run(folder_data, tmp_path / "run", "--iterations", "4", "--threshold", "1")
    assert losses(lines, "active") == [0] * 4 and losses(lines, "loss_dc") == [0] * 4
