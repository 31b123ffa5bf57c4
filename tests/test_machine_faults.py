"""Faults of the machine: one line with the remedy, or going on without; nothing lost, no hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_training import CPU, arguments, losses, run
from stand_ins import out_of_memory
from torch.utils.data import DataLoader, Dataset

from cac_fast.train import (
    checkpoint,
    config,
    distributed,
    engine,
    evaluation,
    log,
    main,
    run_state,
)
from cac_fast.train.data import workers
from cac_fast.train.errors import InputError
from cac_fast.train.log import RunLog, read_metrics
from cac_fast.train.run_folder import RunFolder

HOLD_LOCK = """
import sys
import torch
from cac_fast.train import config
from cac_fast.train.distributed import World
from cac_fast.train.run_folder import RunFolder
folder = RunFolder(config.parse(sys.argv[1:]), World(0, 1, torch.device("cpu")))
folder.prepare(new=True)
print("locked", flush=True)
sys.stdin.read()
"""


class Items(Dataset):
    """Eight small tensors; the fourth is asked for where it cannot be made."""

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.dies and index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"image": torch.full((5,), index), "more": (torch.ones(2), "name")}


def loader(dataset: Dataset) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=1,
        collate_fn=workers.share,
        worker_init_fn=workers.leave_signals_to_trainer,
    )


def test_a_run_folder_belongs_to_one_process(capfd, folder_data, tmp_path):
    given = arguments(folder_data, tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, *given],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "locked\n"
    before = sorted((tmp_path / "run").iterdir())
    assert main.main(given) == 2
    line = capfd.readouterr().err
    assert f"in use by another run (process {holder.pid} on" in line and line.count("\n") == 1
    assert sorted((tmp_path / "run").iterdir()) == before
    holder.kill()
    holder.wait()
    RunFolder(config.parse(given), CPU).prepare(new=True)


def test_a_lock_on_a_full_disk_needs_no_note(folder_data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to("/dev/full")
    folder = RunFolder(config.parse(arguments(folder_data, tmp_path / "run")), CPU)
    assert folder.former({}) is None and folder.lock is not None


def test_full_shared_memory_slows_loading_down(monkeypatch, capfd):
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # processes are forked
    items = list(workers.start(loader(Items())))
    assert [int(item["image"][0]) for item in items] == list(range(8))
    assert items[0]["more"][1] == "name"
    said = capfd.readouterr().err
    assert said.count("shared memory (/dev/shm) is full") == 1 and "--shm-size" in said


def test_a_killed_loader_is_one_line():
    told = r"a loader's process has ended.*--workers"
    with pytest.raises(InputError, match=told), workers.lost_workers():
        list(workers.start(loader(Items(dies=True))))


def test_another_error_is_left_as_it_is():
    with pytest.raises(RuntimeError, match=r"of its own"), workers.lost_workers():
        raise RuntimeError("of its own")


def test_loaders_that_cannot_start(monkeypatch):
    def full(self: DataLoader) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DataLoader, "__iter__", full)
    with pytest.raises(InputError, match=r"No space left on device.*--workers 0"):
        workers.start(loader(Items()))


def fail_step(monkeypatch: pytest.MonkeyPatch, at: int, error: Exception) -> None:
    optimize = engine.Trainer.optimize

    def failing(self: engine.Trainer, step: engine.Step) -> dict[str, torch.Tensor]:
        if self.iteration == at:
            raise error
        return optimize(self, step)

    monkeypatch.setattr(engine.Trainer, "optimize", failing)


def test_a_step_that_does_not_fit_names_the_remedies(monkeypatch, folder_data, tmp_path):
    fail_step(monkeypatch, 4, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    with pytest.raises(InputError, match=r"does not fit in the memory.*--accumulate.*--crop-size"):
        run(folder_data, tmp_path / "run", "--save-every", "2")
    # Statistics of the broken step may be in the network: the state before it is kept.
    assert checkpoint.read(tmp_path / "run" / "last.pt")["iteration"] == 4
    monkeypatch.undo()
    lines = run(folder_data, tmp_path / "run", "--save-every", "2", "--checkpoint-activations")
    assert len(losses(lines)) == 10


@pytest.mark.parametrize(
    ("place", "name", "saved"),
    [
        (run_state, "build_network", None),
        (run_state, "build_optimizers", None),
        (run_state, "fill_cache", None),
        (evaluation.ConfusionMatrix, "reduce", 5),
        (log.Meters, "read", 1),
    ],
)
def test_memory_that_is_full_outside_a_step_is_one_line(
    monkeypatch, capfd, folder_data, tmp_path, place, name, saved
):
    options = ["--eval-every", "5", "--save-every", "100", "--cache", str(tmp_path / "cache")]
    given = arguments(folder_data, tmp_path / "run", *options)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, out_of_memory)
        assert main.main(given) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "warning" not in line]
    assert len(errors) == 1 and errors[0].startswith("error: memory is full outside a step")
    assert "--accumulate" in errors[0] and "--crop-size" in errors[0]
    if saved is not None:
        assert checkpoint.read(tmp_path / "run" / "last.pt")["iteration"] == saved
        assert main.main(given) == 0
        assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["iteration"] == 10


def test_a_save_for_which_memory_is_full_does_not_blame_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "save", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.write(tmp_path / "last.pt", {})
    (tmp_path / "last.pt").touch()
    monkeypatch.setattr(torch, "load", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.read(tmp_path / "last.pt")


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: not enough", "CUDA error: out of memory"])
def test_every_command_tells_that_memory_is_full(capfd, words):
    def command() -> None:
        raise RuntimeError(words + "\nmore")

    assert distributed.run_command(command) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: memory is full") and line.count("\n") == 1
    assert "--device cpu" in line


def test_a_loader_killed_during_a_step_costs_nothing(monkeypatch, folder_data, tmp_path):
    optimize = engine.Trainer.optimize

    def killing(self: engine.Trainer, step: engine.Step) -> dict[str, torch.Tensor]:
        if self.iteration == 4:
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(1)
        return optimize(self, step)

    options = "--workers", "1", "--save-every", "100"
    monkeypatch.setattr(engine.Trainer, "optimize", killing)
    with pytest.raises(InputError, match=r"a loader's process has ended"):
        run(folder_data, tmp_path / "run", *options)
    assert checkpoint.read(tmp_path / "run" / "last.pt")["iteration"] == 5
    monkeypatch.undo()
    assert len(losses(run(folder_data, tmp_path / "run", *options))) == 10


def test_a_save_does_not_hide_a_killed_loader(monkeypatch, tmp_path):
    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(RuntimeError, match=r"DataLoader worker"):
        checkpoint.write(tmp_path / "last.pt", {})


def test_the_lock_holds_on_a_full_disk(folder_data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to("/dev/full")
    folder = RunFolder(config.parse(arguments(folder_data, tmp_path / "run")), CPU)
    folder.prepare(new=True)
    assert folder.lock is not None


def test_a_port_in_use_is_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        known = {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in known.items():
            monkeypatch.setenv(name, str(value))
        told = rf"cannot meet at 127.0.0.1:{port}.*--master-port"
        with pytest.raises(InputError, match=told), distributed.world("cpu"):
            pass


def test_another_error_in_a_step_is_not_hidden(monkeypatch, folder_data, tmp_path):
    fail_step(monkeypatch, 2, RuntimeError("of its own"))
    with pytest.raises(RuntimeError, match=r"of its own"):
        run(folder_data, tmp_path / "run")


def test_metrics_that_cannot_be_written_cost_nothing(monkeypatch, folder_data, tmp_path):
    train = RunLog.train

    def full(self: RunLog, iteration: int, values: dict[str, float | None]) -> None:
        if iteration == 5:
            self.path = Path("/dev/full")
        train(self, iteration, values)

    monkeypatch.setattr(RunLog, "train", full)
    with pytest.raises(InputError, match=r"/dev/full cannot be written .No space left on device"):
        run(folder_data, tmp_path / "run", "--save-every", "100")
    assert checkpoint.read(tmp_path / "run" / "last.pt")["iteration"] == 5
    monkeypatch.undo()
    assert losses(run(folder_data, tmp_path / "run", "--save-every", "100"))[-1] > 0


def test_a_full_disk_keeps_its_own_line(monkeypatch, folder_data, tmp_path):
    """Where the state cannot be written either, the first error is told."""
    (tmp_path / "run").mkdir()

    def full(*_: object) -> None:
        raise InputError("last.pt cannot be written")

    monkeypatch.setattr(RunLog, "train", lambda *_: (_ for _ in ()).throw(InputError("metrics")))
    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(InputError, match=r"^metrics$"):
        run(folder_data, tmp_path / "run")


def test_training_goes_on_without_tensorboard(monkeypatch, capsys, tmp_path):
    said: list[str] = []
    events = log.Board(tmp_path, 1, said.append)
    events.add_scalar("train/loss", 1.0, 1)
    events.writer.flush()
    # The writer's thread meets the full disk.
    writer = events.writer.file_writer.event_writer._async_writer._worker
    monkeypatch.setattr(writer._record_writer, "write", _no_space)
    for iteration in range(2, 200):
        events.add_scalar("train/loss", 1.0, iteration)
    writer.join(10)
    events.add_scalar("train/loss", 1.0, 200)
    events.close()
    assert said == [f"no more TensorBoard events in {tmp_path}: No space left on device"]
    assert "Traceback" not in capsys.readouterr().err


def _no_space(_: bytes) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_under_the_events_from_the_start(monkeypatch, tmp_path):
    said: list[str] = []
    monkeypatch.setattr(log, "SummaryWriter", lambda *_, **__: _no_space(b""))
    events = log.Board(tmp_path, 1, said.append)
    events.add_scalar("train/loss", 1.0, 1)
    events.close()
    assert len(said) == 1


def test_lines_before_a_cut_one_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "iteration": 1}\n{"kind": "tr')
    assert len(read_metrics(path)) == 1
