"""Training by two processes under torchrun, with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_training import ROOT, arguments, losses, run

from cac_fast.train.log import read_metrics


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
        "from cac_fast.train.methods import contrastive\n"
        "build = contrastive.DirectionalContrastiveLoss\n"
        "def lopsided(**settings):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        settings['threshold'] = 1.0\n"
        "    return build(**settings)\n"
        "contrastive.DirectionalContrastiveLoss = lopsided\n"
        "sys.exit(main.main())\n"
    )
    finished = torchrun(
        folder_data, tmp_path / "run", "--iterations", "4", "--batch-size", "4", script=script
    )
    assert finished.returncode == 0, finished.stderr
    assert losses(read_metrics(tmp_path / "run" / "metrics.jsonl"), "active")[-1] > 0


def test_not_finite_on_one_of_two_processes(folder_data, tmp_path):
    """Statistics that each has of its own: none of them saves, and one line says so."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, sys\n"
        "from cac_fast.train import engine, main\n"
        "step = engine.Trainer._train_step\n"
        "def broken(self, *batch):\n"
        "    step(self, *batch)\n"
        "    if os.environ['RANK'] == '1' and self.iteration == 2:\n"
        "        buffers = dict(self.method.named_buffers())\n"
        "        next(b for n, b in buffers.items() if 'running_mean' in n).fill_(float('nan'))\n"
        "engine.Trainer._train_step = broken\n"
        "sys.exit(main.main())\n"
    )
    options = "--iterations 3 --batch-size 4 --no-sync-bn --save-every 2 --warmup 3".split()
    finished = torchrun(folder_data, tmp_path / "run", *options, script=script)
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "not finite" in lines[0], finished.stderr
    assert not (tmp_path / "run" / "last.pt").exists()


def test_two_processes_compile(folder_data, tmp_path):
    """The graphs are those of --compile; their code is not made, which takes long."""
    script = tmp_path / "compiled.py"
    script.write_text(
        "import functools, sys, torch\n"
        "torch.compile = functools.partial(torch.compile, backend='aot_eager')\n"
        "from cac_fast.train import main\n"
        "sys.exit(main.main())\n"
    )
    options = "--iterations 3 --batch-size 4 --compile --backbone resnet18".split()
    finished = torchrun(folder_data, tmp_path / "run", *options, script=script)
    assert finished.returncode == 0, finished.stderr
    assert "FutureWarning" not in finished.stderr  # of names that PyTorch gives up
    assert min(losses(read_metrics(tmp_path / "run" / "metrics.jsonl"), "pairs")[2:]) > 0


def test_batch_that_cannot_be_split(folder_data, tmp_path):
    finished = torchrun(folder_data, tmp_path / "run", "--batch-size", "1")
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: --batch-size 1 cannot be split over 2 processes: use a multiple of it"]
