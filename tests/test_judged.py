"""What holds for GCT and ECS alike: whose network judges predictions and learns by itself."""

from __future__ import annotations

import math
from functools import partial

import pytest
import test_gct
import test_methods
import test_step
import torch
import torch.nn.functional as F
from test_ecs import SmallECS
from test_gct import SmallGCT, batches
from test_methods import names, one_step, trainer
from test_step import IMAGES
from torch import Tensor
from toy_methods import TOYS

from cac_fast.train import config, optimizer
from cac_fast.train.errors import InputError
from cac_fast.train.methods import base, ecs, gct
from cac_fast.train.methods.judged import JudgedMethod
from cac_fast.train.methods.supervised import Supervised

KINDS = {"gct": SmallGCT, "ecs": SmallECS}
SCALARS = {
    "gct": ("loss_consistency", "loss_correction", "loss_flaws", "flawed"),
    "ecs": ("loss_approval", "loss_u", "loss_corrector", "kept", "certainty"),
}
kinds = pytest.mark.parametrize("name", KINDS)
forwards = pytest.mark.parametrize("forward", ["joint", "separate"])


def method(name: str, *options: str, frozen: bool = False) -> JudgedMethod:
    return test_gct.method(*options, frozen=frozen, kind=KINDS[name])


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of all methods have these too, and `test_step.step` take their batches."""
    monkeypatch.setattr(test_step, "batches", batches)
    for name, kind in KINDS.items():
        monkeypatch.setitem(TOYS, name, kind)
        monkeypatch.setitem(test_methods.SCALARS, name, SCALARS[name])


@pytest.fixture
def chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Trainers have this method on the tiny network."""
    options = [*test_methods.OPTIONS, "--method", name, "--unsupervised-weight", "1"]
    monkeypatch.setattr(test_methods, "OPTIONS", options)
    test_methods.use(name, monkeypatch)
    return name


@kinds
def test_a_step_changes_what_it_may(chosen, folder_data, tmp_path):
    trained = trainer(folder_data, tmp_path / "run")
    model = trained.method
    networks, judge = names(model, "network", "second"), names(model, "judge")
    assert len(judge) > 0 and trained.network is model.network
    assert one_step(trained, unlabeled=False) == networks
    assert not any(weight.requires_grad for weight in model.judge.parameters())
    assert one_step(trained, unlabeled=True) == networks | judge
    sgd, adam = trained.optimizers
    held = {id(weight) for group in sgd.param_groups for weight in group["params"]}
    of_networks = [w for network in model.segmenters() for w in network.parameters()]
    assert held == {id(weight) for weight in of_networks}
    (group,) = adam.param_groups
    assert isinstance(adam, torch.optim.Adam) and group["betas"] == (0.9, 0.99)
    assert group["params"] == list(model.judge.parameters()) and group["base_lr"] == 1e-4


@kinds
def test_two_networks_where_there_are_two(name):
    model = method(name)
    first, *others = model.segmenters()
    assert len(others) == (name == "gct") and model.evaluated is first is model.network
    for other in others:
        pairs = zip(first.parameters(), other.parameters(), strict=True)
        assert any(not torch.equal(one, two) for one, two in pairs)


@kinds
@forwards
def test_padding_gets_no_gradient(name, forward, monkeypatch):
    kept: list[Tensor] = []
    upsample = base.upsample_logits

    def upsampled(logits: Tensor, size: torch.Size) -> Tensor:
        kept.append(upsample(logits, size))
        kept[-1].retain_grad()
        return kept[-1]

    monkeypatch.setattr(base, "upsample_logits", upsampled)
    model = method(name, "--forward", forward)
    labeled, unlabeled = batches()
    model(labeled, unlabeled)["loss"].backward()
    valid = torch.cat((labeled["label"] != 255, unlabeled["on_image1"]))
    for number in range(len(model.segmenters())):
        grads = kept if forward == "joint" else kept[2 * number : 2 * number + 2]
        gradient = kept[number].grad if forward == "joint" else torch.cat([z.grad for z in grads])
        learns = gradient.abs().amax(1) > 0
        assert not (learns & ~valid).any() and not valid.all()
        assert torch.equal(learns[:IMAGES], valid[:IMAGES])
        assert learns[IMAGES:].sum() > valid[IMAGES:].sum() / 20


def judged(model: JudgedMethod, images: Tensor, predicted: Tensor, valid: Tensor) -> Tensor:
    """What the judge says, step by step, with the running statistics of batches."""
    parts = list(model.judge.modules())
    convolutions = [part for part in parts if isinstance(part, torch.nn.Conv2d)]
    norms = [None, *(part for part in parts if isinstance(part, torch.nn.BatchNorm2d))]
    x = torch.cat((images, predicted.where(valid.unsqueeze(1), 0)), 1)
    for convolution, norm in zip(convolutions, norms, strict=True):
        if norm is not None:
            half = x.shape[1] // 2
            of_batch, of_image = x[:, :half], x[:, half:]
            mean, variance = norm.running_mean, norm.running_var
            scale = norm.weight / (variance + 1e-5).sqrt()
            of_batch = (of_batch - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
            of_batch = of_batch + norm.bias.view(-1, 1, 1)
            variance, mean = torch.var_mean(of_image, (2, 3), correction=0, keepdim=True)
            x = torch.cat((of_batch, (of_image - mean) / (variance + 1e-5).sqrt()), 1)
            x = torch.where(x > 0, x, 0.2 * x)
        after = 1 if convolution.stride == (2, 2) else 2
        x = F.pad(x, (1, after, 1, after))
        x = F.conv2d(x, convolution.weight, convolution.bias, convolution.stride)
    return F.interpolate(x, images.shape[-2:], mode="bilinear", align_corners=True)


@kinds
def test_a_judge_is_its_layers_written_out(name):
    model = method(name, frozen=True)
    _, unlabeled = batches()
    images, valid = unlabeled["image_weak"], unlabeled["on_image1"]
    predicted = torch.rand(IMAGES, 3, 32, 32, dtype=torch.float64)
    for norm in model.judge.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
                values.uniform_(0.5, 1.5)
    found, expected = (of(images, predicted, valid) for of in (model.judge, partial(judged, model)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found.std() > 1e-3


@kinds
def test_what_stands_on_padding_changes_nothing(name):
    """No prediction there is judged."""
    model = method(name, frozen=True)
    _, unlabeled = batches()
    images, valid = unlabeled["image_weak"], unlabeled["on_image1"]
    predicted = torch.rand(IMAGES, 3, 32, 32, dtype=torch.float64)
    other = predicted.where(valid[:, None], 7)
    assert torch.equal(model.judge(images, predicted, valid), model.judge(images, other, valid))


@kinds
@forwards
def test_slices_change_nothing(name, forward):
    options = "--forward", forward
    whole, sliced = (method(name, *options, "--accumulate", n, frozen=True) for n in ("1", "2"))
    (losses, gradients), (losses2, gradients2) = test_step.step(whole), test_step.step(sliced)
    torch.testing.assert_close(losses2, losses)
    assert len(gradients) == len(list(whole.parameters()))
    torch.testing.assert_close(gradients2, gradients)
    passes = 1 if forward == "joint" else 2
    for number, network in enumerate(whole.segmenters(), start=1):
        again = sliced.segmenters()[number - 1].backbone.calls
        is_last = number == len(whole.segmenters())  # its last slice is not computed again
        assert (network.backbone.calls, again) == (passes, 4 * passes - is_last)


@kinds
def test_the_weight_rises_after_the_warm_up(name):
    options = "--iterations", "160", "--warmup", "20", "--unsupervised-weight", "3"
    model = method(name, *options)
    shares = {0: math.exp(-5), 20: math.exp(-5), 25: math.exp(-1.25), 30: 1, 159: 1}
    for iteration, share in shares.items():
        model.iteration = iteration
        assert model.weight == pytest.approx(3 * share, rel=1e-12)
    losses = []
    for iteration in (20, 25, 30):
        model = method(name, *options, frozen=True)
        model.iteration = iteration
        losses.append(model(*batches())["loss"].item())
    steps = (losses[1] - losses[0]) / (shares[25] - shares[20])
    assert steps == pytest.approx((losses[2] - losses[0]) / (1 - shares[20]), rel=1e-9)
    assert steps > 0


@kinds
def test_without_weights_the_supervised_gradient_stays(name, monkeypatch):
    """To the bit, the dropout too, where no network learns from the judge."""
    monkeypatch.setattr(ecs, "APPROVAL_WEIGHT", 0.0)
    monkeypatch.setattr(gct, "FLAWED", math.inf)  # so nothing is corrected
    options = "--forward", "separate", "--unsupervised-weight", "0"
    _, found = test_step.step(method(name, *options))
    _, of_labels = test_step.step(test_gct.method(*options, kind=Supervised))
    for here, there in zip(found, of_labels, strict=False):
        assert torch.equal(here, there) and here.abs().max() > 0


@kinds
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_interrupted_run_ends_with_the_same_bits(
    name, precision, chosen, folder_data, tmp_path, monkeypatch
):
    given = chosen, precision, folder_data, tmp_path, monkeypatch
    test_methods.test_interrupted_run_ends_with_the_same_bits(*given)


@kinds
def test_autocast_starts_where_fp32_does(chosen, folder_data, tmp_path, monkeypatch):
    given = chosen, folder_data, tmp_path, monkeypatch
    test_methods.test_autocast_starts_where_fp32_does(*given)


@kinds
def test_a_step_that_overflows_changes_no_weight(chosen, folder_data, tmp_path, monkeypatch):
    given = chosen, folder_data, tmp_path, monkeypatch
    test_methods.test_a_step_that_overflows_changes_no_weight(*given)


@kinds
def test_two_processes_give_the_course_of_one(chosen, folder_data, tmp_path, monkeypatch):
    given = chosen, folder_data, tmp_path, monkeypatch
    test_methods.test_two_processes_give_the_course_of_one(*given)


@kinds
def test_a_state_of_another_memory_format(chosen, folder_data, tmp_path):
    """A fused step takes memory as it lies."""
    trained = trainer(folder_data, tmp_path / "run")
    one_step(trained, unlabeled=True)
    weight = trained.method.judge.layers[0].weight
    adam = trained.optimizers[1]
    states = [item.state_dict() for item in trained.optimizers]
    stored = states[1]["state"][0]["exp_avg"].clone()
    turned = stored.contiguous(memory_format=torch.channels_last)
    assert turned.stride() != weight.stride()
    states[1]["state"][0]["exp_avg"] = turned
    optimizer.load_states(trained.optimizers, states)
    found = adam.state[weight]["exp_avg"]
    assert found.stride() == weight.stride() and torch.equal(found, stored)
    assert adam.param_groups[0]["base_lr"] == 1e-4


@pytest.mark.parametrize(("name", "weight"), [("gct", 100), ("ecs", 1)])
def test_presets(name, weight):
    def loss(*options: str) -> tuple[object, ...]:
        found = config.parse(["--method", name, *options]).loss
        return found.forward, found.warmup, found.unsupervised_weight

    folder = "--dataset", "folder", "--data-dir", "d"
    assert loss(*folder) == ("joint", 0, weight)
    assert loss("--dataset", "toycity") == ("joint", 60, weight)
    assert loss(*folder, "--unsupervised-weight", "5") == ("joint", 0, 5)


@kinds
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--discriminator-learning-rate", "0"], "--discriminator-learning-rate 0.0: must be"),
        (["--unsupervised-weight", "-1"], "--unsupervised-weight -1.0: must not be negative"),
        (["--pseudo-labels", "d"], "--pseudo-labels"),
    ],
)
def test_mistakes_are_one_line(name, options, message, chosen, folder_data, tmp_path):
    with pytest.raises(InputError) as error:
        trainer(folder_data, tmp_path / "run", *options)
    assert message in str(error.value) and "\n" not in str(error.value)
