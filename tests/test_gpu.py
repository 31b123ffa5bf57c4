"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cac_fast.train import config, engine
from cac_fast.train.data import opening
from cac_fast.train.data.stream import Stream, fill_cache
from cac_fast.train.distributed import World
from cac_fast.train.log import read_metrics
from cac_fast.train.networks import synchronize_batch_norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(autouse=True)
def full_products():
    """float32 products in full, as on the CPU: by default cuDNN rounds operands to TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.fp32_precision
    # Not cudnn.conv.fp32_precision: after that any question for allow_tf32 is an error.
    cudnn.allow_tf32, matmul.fp32_precision = False, "ieee"
    yield
    cudnn.allow_tf32, matmul.fp32_precision = before


def train(data, output, device: str, *more: str) -> list[float]:
    """Ten steps on one device; the losses."""
    options = (
        "--backbone mobilenet_v2 --batch-size 4 --crop-size 32 --iterations 10 --warmup 2 "
        "--workers 0 --log-every 1 --learning-rate 0.01 --threshold 0.3 --no-dropout --freeze-bn "
        "--eval-every 10 --save-every 100"
    ).split()
    arguments = ["--dataset", "folder", "--data-dir", str(data), "--output", str(output)]
    settings = config.parse([*arguments, *options, "--device", device, *more])
    engine.train(
        settings, World(0, 1, torch.device(device, 0) if device == "cuda" else torch.device("cpu"))
    )
    return [
        line["loss"] for line in read_metrics(output / "metrics.jsonl") if line["kind"] == "train"
    ]


def test_gpu_gives_the_losses_of_the_cpu(folder_data, tmp_path):
    on_cpu = train(folder_data, tmp_path / "cpu", "cpu")
    on_gpu = train(folder_data, tmp_path / "gpu", "cuda", "--precision", "fp32")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-2)


def test_batches_of_the_cpu_without_waiting(folder_data, tmp_path):
    """Pinned memory, and colors changed on the device, through the cache: as on the CPU."""
    found = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        settings = config.Config.of(
            dataset="folder",
            data_dir=str(folder_data),
            batch_size=4,
            crop_size=32,
            workers=1,
            jitter_labeled=True,
        )
        settings = settings.changed(cache=str(tmp_path / "cache"))
        read = opening.open_lists(settings)
        fill_cache(settings, *read)
        stream = Stream(settings, World(0, 1, device), *read)
        move, modes = stream.to_device, []

        def watched(batch, move=move, modes=modes):
            torch.cuda.set_sync_debug_mode("error")
            try:
                modes.append({name: value.is_pinned() for name, value in batch.items()})
                return move(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        stream.to_device = watched
        found.append([step.labeled | step.unlabeled for step in stream.steps(0, 3, True)])
        assert all(all(mode.values()) == (device.type == "cuda") for mode in modes)
    for on_cpu, on_gpu in zip(*found, strict=True):
        for name, value in on_cpu.items():
            assert on_gpu[name].device.type == "cuda" and on_gpu[name].dtype == value.dtype
            # Of normalized values: 0.005 is a quarter of a level.
            torch.testing.assert_close(on_gpu[name].cpu(), value, rtol=0, atol=5e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(folder_data, tmp_path, precision):
    losses = train(folder_data, tmp_path / "run", "cuda", "--precision", precision)
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    "options",
    [
        "--precision bf16",
        "--precision fp16 --normalization active --bank-past-steps 1 --negatives-per-view 5",
        "--precision bf16 --forward joint --max-negatives 20 --bank-past-steps 1",
        "--precision fp32 --accumulate 2 --checkpoint-activations --no-negative-sampling",
    ],
)
def test_a_step_never_waits_for_the_gpu(folder_data, tmp_path, monkeypatch, options):
    """But for the lines of the log, whose guard reads the losses."""
    step = engine.Trainer._train_step

    def watched(self, batch):
        # The first steps with and without unlabeled images allocate, and compile the kernels.
        torch.cuda.set_sync_debug_mode("error" if self.iteration >= 6 else "default")
        step(self, batch)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine.Trainer, "_train_step", watched)
    try:
        losses = train(folder_data, tmp_path / "run", "cuda", *options.split())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(loss) for loss in losses)


def test_recomputed_slices_give_the_losses_of_one_pass(folder_data, tmp_path):
    options = "--precision", "fp32"
    whole = train(folder_data, tmp_path / "whole", "cuda", *options)
    slices = "--accumulate", "2", "--checkpoint-activations"
    sliced = train(folder_data, tmp_path / "sliced", "cuda", *options, *slices)
    assert sliced == pytest.approx(whole, rel=1e-2)


def test_compiled_network_gives_the_losses_of_the_eager_one(folder_data, tmp_path):
    options = "--precision", "fp32", "--accumulate", "2"
    eager = train(folder_data, tmp_path / "eager", "cuda", *options)
    compiled = train(folder_data, tmp_path / "compiled", "cuda", *options, "--compile")
    assert compiled == pytest.approx(eager, rel=1e-2)


def test_profile_of_a_gpu_run(folder_data, tmp_path, capsys):
    train(folder_data, tmp_path / "run", "cuda", "--profile", "2")
    assert (tmp_path / "run" / "trace.json").stat().st_size > 0
    line = next(text for text in capsys.readouterr().out.splitlines() if "profile of 2" in text)
    assert "forward labeled" in line and "backward" in line


def test_resume_on_a_gpu(folder_data, tmp_path):
    whole = train(folder_data, tmp_path / "whole", "cuda", "--precision", "fp32")
    monkey = pytest.MonkeyPatch()
    step = engine.Trainer._train_step

    def stopping(self, batch):
        step(self, batch)
        if self.iteration == 5:
            self.signal = 15

    monkey.setattr(engine.Trainer, "_train_step", stopping)
    with pytest.raises(SystemExit):
        train(folder_data, tmp_path / "stopped", "cuda", "--precision", "fp32")
    monkey.undo()
    resumed = train(folder_data, tmp_path / "stopped", "cuda", "--precision", "fp32")
    assert resumed == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_synchronized_batch_norm_of_one_rank(tmp_path, dtype, memory):
    """The calls that several GPUs make: as PyTorch's own batch norm, and nothing waits."""
    kinds = ["plain", "synchronized"]
    if dtype == torch.bfloat16 and memory == torch.channels_last:
        kinds.append("compiled")  # in one case of four, as it takes its time
    torch.manual_seed(0)
    x, weights = (torch.randn(4, 8, 9, 10, device="cuda").to(dtype) for _ in range(2))
    x = (2 * x + 1).contiguous(memory_format=memory)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = []
        for kind in kinds:
            model = nn.Sequential(nn.BatchNorm2d(8)).cuda()
            if kind != "plain":
                synchronize_batch_norm(model, dist.new_group())
            call = torch.compile(model, fullgraph=True) if kind == "compiled" else model
            for run in range(2):  # the first one makes the communicator
                torch.cuda.set_sync_debug_mode("error" if run else "default")
                model.zero_grad()
                given = x.clone().requires_grad_()
                y = call(given)
                (y * weights).sum().backward()
                torch.cuda.set_sync_debug_mode("default")
            found.append([y, given.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for synchronized in found[1:]:
        for mine, theirs in zip(synchronized, found[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
