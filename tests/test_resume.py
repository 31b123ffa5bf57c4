"""Interrupted and restarted trainings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_training import CPU, ROOT, arguments, assert_same_bits, losses, run, weights

from cac_fast.train import checkpoint, config, engine, run_state
from cac_fast.train.errors import InputError
from cac_fast.train.log import read_metrics
from cac_fast.train.optimizer import start_momentum
from cac_fast.train.signals import StopSignals


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


def test_sigterm_to_the_whole_group_saves(folder_data, tmp_path):
    """As `timeout` and torchrun send it: to the processes of the loaders too."""
    options = "--workers 1 --iterations 100000 --eval-every 100000".split()
    script = str(ROOT / "train" / "main.py")
    process = subprocess.Popen(
        [sys.executable, script, *arguments(folder_data, tmp_path / "run", *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not losses(read_metrics(metrics)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM, output
    stopped = int(re.search(r"stopped at iteration (\d+)", output)[1])
    assert checkpoint.read(tmp_path / "run" / "last.pt")["iteration"] == stopped


def test_a_second_signal_ends_the_run_at_once():
    stop = StopSignals()
    # Processes in the background of a script ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # the first one's double
            assert stop.received == signal.SIGINT
            stop.at -= 2
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


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
        first.setattr(run_state, "build_network", lambda *_, **__: 1 / 0)
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
    decay, momentum = trainer.config.optim.weight_decay, trainer.config.optim.momentum
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
