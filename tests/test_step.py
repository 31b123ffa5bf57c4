"""One training step of a method: in slices, recomputed, joint, compiled, profiled."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import Tensor, nn

from cac_fast.train import config, profiling
from cac_fast.train.data import opening
from cac_fast.train.data.stream import Step, Stream
from cac_fast.train.distributed import World
from cac_fast.train.methods.cac import CAC
from cac_fast.train.networks import Segmenter, recompute
from cac_fast.train.networks.encoder import Encoder
from cac_fast.train.networks.segmenter import conv_bn_relu, dropout_layer

CPU = World(0, 1, torch.device("cpu"))
IMAGES = 4


class Backbone(Encoder):
    """Two blocks; counts how often they run."""

    low_channels = high_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.AvgPool2d(4), conv_bn_relu(3, 8, 3))
        self.high = conv_bn_relu(8, 8, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():  # each count would be a graph of its own
            self.calls += 1
        low = self.low(x)
        return low, self.high(low)

    def blocks(self) -> list[nn.Module]:
        return [self.low, self.high]


class Head(nn.Module):
    feature_channels, feature_stride = 8, 4

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(dropout_layer(0.5), conv_bn_relu(16, 8, 1))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.decoder(torch.cat((low, high), 1))

    def blocks(self) -> list[nn.Module]:
        return [self.decoder]


def method(*options: str, frozen: bool = False) -> CAC:
    """CAC in float64; frozen: without what couples the images of a batch, or draws."""
    arguments = "--dataset toycity --threshold 0 --projector".split()
    settings = config.parse([*arguments, *options])
    torch.manual_seed(0)
    network = Segmenter(Backbone(), Head(), 3, dropout=0.5)
    if settings.model.checkpoint_activations:
        network.checkpoint_activations()
    result = CAC(lambda: network, CPU, settings, torch.float64).double()
    return result.eval() if frozen else result


def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Slices differ in valid pixels, pairs in overlap."""
    generator = torch.Generator().manual_seed(1)
    random = functools.partial(torch.randint, generator=generator)

    def images() -> Tensor:
        return torch.randn(IMAGES, 3, 32, 32, dtype=torch.float64, generator=generator)

    label = random(0, 3, (IMAGES, 32, 32))
    for image in range(IMAGES):
        label[image, : 8 * image] = 255
    unlabeled = {
        "image_1": images(),
        "image_2": images(),
        "offset": random(-2, 3, (IMAGES, 2)),
        "flip1": random(0, 2, (IMAGES,)).bool(),
        "flip2": random(0, 2, (IMAGES,)).bool(),
        "valid1": torch.full((IMAGES, 2), 4),
        "valid2": torch.full((IMAGES, 2), 4),
    }
    return {"image": images(), "label": label.to(torch.uint8)}, unlabeled


def step(model: CAC) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Losses and gradients of one step."""
    torch.manual_seed(2)
    losses = model(*batches())
    losses["loss"].backward()
    return losses, [parameter.grad for parameter in model.parameters()]


def assert_same_step(one: CAC, other: CAC) -> None:
    (losses1, gradients1), (losses2, gradients2) = step(one), step(other)
    assert losses1["active"] > 0
    for name, value in losses1.items():
        torch.testing.assert_close(losses2[name], value, msg=lambda text, n=name: f"{n}: {text}")
    for gradient1, gradient2 in zip(gradients1, gradients2, strict=True):
        torch.testing.assert_close(gradient2, gradient1)


def statistics(model: CAC) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "running" in name}


@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize("normalization", ["image", "active"])
def test_slices_change_nothing(forward: str, normalization: str) -> None:
    options = ["--forward", forward, "--normalization", normalization]
    whole = method(*options, frozen=True)
    sliced = method(*options, "--accumulate", "4", frozen=True)
    assert_same_step(whole, sliced)
    assert whole.network.backbone.calls == (1 if forward == "joint" else 3)
    slices = 4 * whole.network.backbone.calls
    assert sliced.network.backbone.calls == 2 * slices - 1  # the last one is not computed again


def test_joint_forward_differs_in_batch_statistics_alone() -> None:
    assert_same_step(method(frozen=True), method("--forward", "joint", frozen=True))
    separate, joint = method(), method("--forward", "joint")
    assert (step(separate)[0]["loss"] - step(joint)[0]["loss"]).abs() > 1e-6
    counts = [m.network.backbone.high[1].num_batches_tracked for m in (separate, joint)]
    assert counts == [3, 1]


@pytest.mark.parametrize(
    "options",
    [
        ["--checkpoint-activations"],
        ["--checkpoint-activations", "--accumulate", "2"],
        ["--checkpoint-activations", "--accumulate", "2", "--no-unlabeled-dropout"],
    ],
)
def test_recomputation_changes_nothing(options: list[str], monkeypatch) -> None:
    """Dropout falls as before, and the running statistics move once."""
    recomputed = method(*options)
    assert recomputed.state_dict().keys() == method().state_dict().keys()
    losses, gradients = step(recomputed)
    monkeypatch.setattr(recompute, "checkpoint", lambda function, *tensors, **_: function(*tensors))
    kept = method(*options)
    losses2, gradients2 = step(kept)
    assert torch.equal(losses["loss"], losses2["loss"])
    assert all(map(torch.equal, gradients, gradients2))
    assert statistics(kept).keys() == statistics(recomputed).keys()
    for name, value in kept.state_dict().items():
        assert torch.equal(recomputed.state_dict()[name], value), name
    assert kept.network.backbone.high[1].num_batches_tracked == 3 * kept.num_slices


def test_compiled_network(monkeypatch) -> None:
    """The graphs are those of --compile; their code is not made, which takes long."""
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    eager, compiled = method("--accumulate", "2"), method("--accumulate", "2")
    for model in (eager, compiled):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
    compiled.compile_features()
    assert_same_step(eager, compiled)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value)


def test_profile(tmp_path) -> None:
    said: list[str] = []
    trace = tmp_path / "trace.json"
    profile = profiling.StepProfile(2, torch.device("cpu"), trace, said.append)
    with_unlabeled = Step({}, {}, 0.0)
    steps = iter([Step({}, None, 0.0)] * 9 + [with_unlabeled] * 9)
    handed_on = 0
    for handed_on, item in enumerate(profile.watch(steps, with_unlabeled=True), start=1):
        assert trace.exists() == (handed_on > 9 + profiling.WARM_UP_STEPS + 2)
        with profiling.phase("loss" if item is with_unlabeled else "warm-up"):
            torch.ones(10).sum()
    assert handed_on == 18
    (line,) = said
    assert line.startswith("profile of 2 steps, ") and "loss " in line
    assert "warm-up" not in line
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("loss") == 2


def test_waiting_for_data_and_moving_it_are_two_phases(folder_data) -> None:
    settings = config.Config.of(
        dataset="folder", data_dir=str(folder_data), batch_size=2, crop_size=32, workers=0
    )
    stream = Stream(settings, CPU, *opening.open_lists(settings))
    spans, move = [], stream.to_device

    def watched(batch):
        start = clock.now()
        batch = move(batch)
        spans.append((start, clock.now()))
        return batch

    stream.to_device = watched
    with profiling.clocked(CPU.device) as clock:
        assert len(list(stream.steps(0, 2, True))) == 2
    names, starts, ends = zip(*clock.spans, strict=True)
    assert names == ("data wait", "to device") * 2
    assert starts[1] < spans[0][0] and spans[1][1] < ends[1]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_profile_of_a_run_that_is_too_short(tmp_path) -> None:
    said: list[str] = []
    profile = profiling.StepProfile(2, torch.device("cpu"), tmp_path / "trace.json", said.append)
    assert len(list(profile.watch(iter([Step({}, None, 0.0)] * 6), with_unlabeled=False))) == 6
    assert said == ["the run was too short to profile 2 steps: no trace"]
    assert not (tmp_path / "trace.json").exists()
