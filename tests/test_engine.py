"""The training loop: golden losses, resume, processes, warm-up, guards."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_scenes import write_scenes

from cac_fast.dispatch import BACKENDS
from cac_fast.train import checkpoint, config, engine
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.log import read_metrics
from cac_fast.train.optimizer import start_momentum

ROOT = Path(__file__).resolve().parents[1]

CPU = World(0, 1, torch.device("cpu"))
SMALL = (
    "--backbone mobilenet_v2 --batch-size 2 --crop-size 32 --iterations 10 --warmup 2 --workers 0 "
    "--device cpu --eval-every 100 --log-every 1 --learning-rate 0.001 --threshold 0.3"
).split()


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    lists = [] if "--labeled-share" in more else ["--labeled-share", "full"]
    return [
        "--dataset",
        "folder",
        "--data-dir",
        str(data),
        "--output",
        str(output),
        *SMALL,
        *lists,
        *more,
    ]


def run(data: Path, output: Path, *more: str) -> list[dict]:
    """Train in this process; return the lines of metrics.jsonl."""
    engine.train(config.parse(arguments(data, output, *more)), CPU)
    return read_metrics(output / "metrics.jsonl")


def losses(lines: list[dict], name: str = "loss") -> list[float]:
    return [line[name] for line in lines if line["kind"] == "train"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(path)["method"]


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


# Without batch statistics of 2 x 2 maps, in which rounding would grow from step to step.
SMOOTH = "--no-dropout --freeze-bn --batch-size 4 --learning-rate 0.01".split()
# From a run of the reference back end in float32; other processors round differently.
GOLDEN = [
    *(1.098191, 1.080977, 1.042164, 1.132151, 1.055537),
    *(1.033483, 1.011771, 1.448785, 1.383347, 1.359723),
]


@pytest.mark.parametrize(
    "backend",
    [
        name
        for name, backend in BACKENDS.items()
        if not backend.missing() and not backend.refuses(torch.empty(0, 128))
    ],
)
def test_golden_losses(folder_data, tmp_path, backend):
    lines = run(folder_data, tmp_path / "run", *SMOOTH, "--dc-backend", backend)
    assert losses(lines) == pytest.approx(GOLDEN, rel=1e-3)
    assert losses(lines, "loss_dc")[:2] == [0, 0] and min(losses(lines, "loss_dc")[7:]) > 3


def test_run_folder(folder_data, tmp_path):
    lines = run(folder_data, tmp_path / "run", "--eval-every", "5", "--false-negatives")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "metrics.jsonl", "last.pt", "best.pt", "tensorboard", "samples"
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


# ---- resume


def test_interrupted_run_ends_with_the_same_bits(folder_data, tmp_path):
    """SIGKILL at several moments; the same command goes on and ends as one that never stopped."""
    options = (
        "--deterministic --iterations 24 --save-every 3 --eval-every 8 --bank-past-steps 1"
    ).split()
    run(folder_data, tmp_path / "whole", *options)
    command = [
        sys.executable,
        str(ROOT / "train" / "main.py"),
        *arguments(folder_data, tmp_path / "killed", *options),
    ]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for target in (2, 10, 17):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 120
        while len(losses(read_metrics(metrics))) < target and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming" in finished.stdout
    assert_same_bits(
        weights(tmp_path / "killed" / "last.pt"), weights(tmp_path / "whole" / "last.pt")
    )
    assert losses(read_metrics(metrics)) == losses(
        read_metrics(tmp_path / "whole" / "metrics.jsonl")
    )
    best = [checkpoint.read(tmp_path / name / "best.pt") for name in ("killed", "whole")]
    assert best[0]["best"] == best[1]["best"]


def test_sigterm_saves_and_the_rest_is_the_same(folder_data, tmp_path, monkeypatch):
    run(folder_data, tmp_path / "whole", "--deterministic")
    step = engine.Trainer._train_step

    def interrupted(self, *batch):
        step(self, *batch)
        if self.iteration == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.Trainer, "_train_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(folder_data, tmp_path / "stopped", "--deterministic")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoint.read(tmp_path / "stopped" / "last.pt")["iteration"] == 5
    monkeypatch.undo()
    run(folder_data, tmp_path / "stopped", "--deterministic")
    assert_same_bits(
        weights(tmp_path / "stopped" / "last.pt"), weights(tmp_path / "whole" / "last.pt")
    )


def test_restart_and_other_settings(folder_data, tmp_path):
    run(folder_data, tmp_path / "run", "--iterations", "2")
    with pytest.raises(InputError, match="crop_size: 32 there, 40 here"):
        run(folder_data, tmp_path / "run", "--iterations", "2", "--crop-size", "40")
    lines = run(
        folder_data, tmp_path / "run", "--iterations", "3", "--crop-size", "40", "--restart"
    )
    assert len(losses(lines)) == 3


def test_restart_leaves_nothing_of_the_former_run(folder_data, tmp_path):
    run(folder_data, tmp_path / "run", "--iterations", "1")
    again = arguments(folder_data, tmp_path / "run", "--iterations", "1", "--restart")
    trainer = engine.Trainer(config.parse(again), CPU)
    trainer.folder.prepare(new=True)
    left = sorted(path.name for path in (tmp_path / "run").rglob("*.p*"))
    assert left == [] and trainer.iteration == 0


def test_restart_by_torchrun_goes_on(folder_data, tmp_path, monkeypatch):
    run(folder_data, tmp_path / "run", "--iterations", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = arguments(folder_data, tmp_path / "run", "--iterations", "2", "--restart")
    assert engine.Trainer(config.parse(again), CPU).iteration == 2


def test_restart_by_torchrun_starts_over_if_the_first_try_did_not(
    folder_data, tmp_path, monkeypatch
):
    run(folder_data, tmp_path / "run", "--iterations", "2")
    again = arguments(folder_data, tmp_path / "run", "--iterations", "2", "--restart")
    with monkeypatch.context() as first:
        first.setattr(engine, "build_network", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.Trainer(config.parse(again), CPU)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    second = engine.Trainer(config.parse(again), CPU)
    assert second.iteration == 0
    second.run()
    assert engine.Trainer(config.parse(again), CPU).iteration == 2


def test_momentum_of_another_memory_format(folder_data, tmp_path):
    trainer = engine.Trainer(config.parse(arguments(folder_data, tmp_path / "run")), CPU)
    weight = trainer.network.head.decoder[0][0].weight
    stored = torch.rand(weight.shape).contiguous(memory_format=torch.channels_last)
    state = trainer.optimizer.state_dict()
    number = len(trainer.optimizer.param_groups[0]["params"]) + [
        item is weight for item in trainer.optimizer.param_groups[1]["params"]
    ].index(True)
    state["state"][number]["momentum_buffer"] = stored
    for group in state["param_groups"]:
        group["fused"] = None
    trainer.optimizer.load_state_dict(state)
    start_momentum(trainer.optimizer)
    before, rate = weight.detach().clone(), trainer.optimizer.param_groups[1]["lr"]
    decay, momentum = trainer.config.weight_decay, trainer.config.momentum
    weight.grad = torch.zeros_like(weight)
    trainer.optimizer.step()
    expected = before - rate * (momentum * stored + decay * before)
    assert torch.allclose(weight, expected, atol=1e-7)
    assert all(group["fused"] for group in trainer.optimizer.param_groups)


def test_finished_run_is_left_alone(folder_data, tmp_path):
    run(folder_data, tmp_path / "run", "--iterations", "2")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    lines = run(folder_data, tmp_path / "run", "--iterations", "2")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert len(losses(lines)) == 2


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


# ---- processes


def torchrun(data: Path, output: Path, *more: str, script: Path = ROOT / "train" / "main.py"):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments(data, output, *more)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )


@pytest.mark.parametrize(
    ("statistics", "more"),
    [
        ("--freeze-bn", "--accumulate 2 --checkpoint-activations"),
        # Standing still: with so few values to a statistic float32 leaves gradients three digits,
        # in one process too. test_sync_batch_norm compares them, in float64.
        ("--sync-bn --learning-rate 1e-9", ""),
    ],
)
def test_two_processes_give_the_curve_of_one(folder_data, tmp_path, statistics, more):
    # So early all pseudo labels are one: only without negative sampling is there a contrast.
    options = (
        "--no-dropout --batch-size 4 --iterations 8 --eval-every 8 --deterministic "
        "--no-negative-sampling"
    ).split()
    options += statistics.split()
    one = run(folder_data, tmp_path / "one", *options)
    # Where statistics are frozen, slices change nothing but rounding; the cache does nowhere.
    cache = tmp_path / "cache"
    options += [*more.split(), "--cache", str(cache)]
    finished = torchrun(folder_data, tmp_path / "two", *options)
    assert finished.returncode == 0, finished.stderr
    assert any(cache.iterdir())
    two = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for name in ("loss", "loss_ce", "loss_dc", "active", "negatives", "positive_cosine"):
        # The first two iterations are warm-up, where there is no positive.
        assert losses(two, name)[2:] == pytest.approx(losses(one, name)[2:], rel=1e-4, abs=1e-6), (
            name
        )
    assert min(losses(one, "loss_dc")[2:]) > 0
    assert two[-1]["miou"] == pytest.approx(one[-1]["miou"], abs=1e-3)


def test_two_processes_when_one_has_no_active_pixel(folder_data, tmp_path):
    script = tmp_path / "lopsided.py"
    script.write_text(
        "import os, sys\n"
        "from cac_fast.train import main\n"
        "from cac_fast.train.methods import cac\n"
        "build = cac.DirectionalContrastiveLoss\n"
        "def lopsided(**settings):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        settings['threshold'] = 1.0\n"
        "    return build(**settings)\n"
        "cac.DirectionalContrastiveLoss = lopsided\n"
        "sys.exit(main.main())\n"
    )
    finished = torchrun(
        folder_data, tmp_path / "run", "--iterations", "4", "--batch-size", "4", script=script
    )
    assert finished.returncode == 0, finished.stderr
    assert losses(read_metrics(tmp_path / "run" / "metrics.jsonl"), "active")[-1] > 0


def test_two_processes_compile(folder_data, tmp_path):
    """The graphs are those of --compile; their code is not made, which takes long."""
    script = tmp_path / "compiled.py"
    script.write_text(
        "import functools, sys, torch\n"
        "torch.compile = functools.partial(torch.compile, backend='aot_eager')\n"
        "from cac_fast.train import main\n"
        "sys.exit(main.main())\n"
    )
    options = "--iterations 3 --batch-size 4 --compile --no-sync-bn --backbone resnet18".split()
    finished = torchrun(folder_data, tmp_path / "run", *options, script=script)
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr
    assert min(losses(read_metrics(tmp_path / "run" / "metrics.jsonl"), "pairs")[2:]) > 0


def test_batch_that_cannot_be_split(folder_data, tmp_path):
    finished = torchrun(folder_data, tmp_path / "run", "--batch-size", "1")
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: --batch-size 1 cannot be split over 2 processes: use a multiple of it"]
