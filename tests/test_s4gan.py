"""S4GAN: its losses against loops in float64, who learns from which, and what changes nothing."""

from __future__ import annotations

import functools

import pytest
import test_methods
import test_step
import torch
import torch.nn.functional as F
import two_ranks
from small_training import CPU
from test_methods import names, one_step, trainer
from test_step import IMAGES, Backbone, Head
from torch import Tensor
from toy_methods import TOYS

from cac_fast.train import checkpoint, config
from cac_fast.train.data.stream import on_image
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods import Method, base, s4gan
from cac_fast.train.methods.s4gan import S4GAN, Discriminator
from cac_fast.train.methods.supervised import Supervised
from cac_fast.train.networks import Segmenter

SIDE, CLASSES = 32, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHT = "--unsupervised-weight", "0.7"


def method(
    *options: str, frozen: bool = False, world: World = CPU, kind: type[Method] = S4GAN
) -> S4GAN:
    """In float64, past the first step with unlabeled images, with a D that has an opinion; frozen:
    as `test_step.method`."""
    settings = config.parse(["--dataset", "toycity", "--method", "s4gan", *WEIGHT, *options])
    torch.manual_seed(0)
    network = Segmenter(Backbone(), Head(), CLASSES, dropout=0.5)
    result = kind(lambda: network, world, settings, torch.float64).double()
    if isinstance(result, S4GAN):
        with torch.no_grad():
            result.discriminator.judge.weight *= 100
    result.iteration = 61
    return result.eval() if frozen else result


@functools.cache
def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Padding at the bottom or at a side, ignored pixels on the image too; the first half of the
    unlabeled images is bright, the other one dark."""
    labeled, unlabeled = test_step.batches()
    masks = torch.ones(2, IMAGES, SIDE, SIDE, dtype=torch.bool)
    masks[0, 1, 16:], masks[0, 2, :, 24:], masks[0, 3, :, :8] = False, False, False
    masks[1, 1, 24:], masks[1, 2, :, :8], masks[1, 3, 8:, 24:] = False, False, False
    labels = labeled["label"].masked_fill(~masks[0], 255)
    assert ((labels == 255) & masks[0]).any()
    images = unlabeled["image_1"] + torch.tensor([3, 3, -3, -3]).view(-1, 1, 1, 1)
    valid, flip = torch.tensor([[4, 4], [2, 4], [4, 3], [4, 3]]), torch.arange(IMAGES) == 3
    labeled = {"image": labeled["image"], "label": labels, "flip": flip, "valid": valid}
    return labeled, {"image_weak": images, "on_image1": masks[1]}


def planes(image: Tensor, on_image: Tensor, classes: Tensor) -> Tensor:
    """What D is to see of one image, pixel by pixel."""
    seen = torch.zeros(3 + CLASSES, SIDE, SIDE, dtype=torch.float64)
    for y, x in on_image.nonzero().tolist():
        colors = [image[c, y, x] * STD[c] + MEAN[c] for c in range(3)]
        seen[:, y, x] = torch.stack([*colors, *classes[:, y, x]])
    return seen


def judged(model: S4GAN, seen: Tensor) -> tuple[Tensor, Tensor]:
    """D's features and probability."""
    kernels = [layer for layer in model.discriminator.maps if isinstance(layer, torch.nn.Conv2d)]
    assert [kernel.out_channels for kernel in kernels] == [64, 128, 256, 512]
    for kernel in kernels:
        assert kernel.kernel_size == (4, 4)
        seen = F.conv2d(seen, kernel.weight, kernel.bias, stride=2, padding=1)
        seen = torch.where(seen > 0, seen, 0.2 * seen)
    features = seen.flatten(2).sum(2) / seen[0, 0].numel()
    logits = features @ model.discriminator.judge.weight[0] + model.discriminator.judge.bias
    return features, 1 / (1 + torch.exp(-logits))


def by_loops(model: S4GAN) -> tuple[dict[str, Tensor], Tensor]:
    """The scalars, with what the segmenter minimizes as `loss`; and D(u)."""
    labeled, unlabeled = batches()
    known = labeled["label"] != 255
    log = model.network(labeled["image"]).log_softmax(1)
    places = known.nonzero().tolist()
    of_labels = [log[i, int(labeled["label"][i, y, x]), y, x] for i, y, x in places]
    logits = model.network(unlabeled["image_weak"])
    predicted, truth = [], []
    of_labeled = torch.ones(IMAGES, SIDE, SIDE, dtype=torch.bool)
    of_labeled[1, 16:], of_labeled[2, :, 24:], of_labeled[3, :, :8] = False, False, False
    for i in range(IMAGES):
        image, on_image = unlabeled["image_weak"][i], unlabeled["on_image1"][i]
        predicted.append(planes(image, on_image, logits[i].softmax(0)))
        one_hot = torch.zeros(CLASSES, SIDE, SIDE)
        for y, x in known[i].nonzero().tolist():
            one_hot[int(labeled["label"][i, y, x]), y, x] = 1
        truth.append(planes(labeled["image"][i], of_labeled[i], one_hot))
    features, of_predicted = judged(model, torch.stack(predicted))
    features_of_truth, of_truth = judged(model, torch.stack(truth))
    loss_fm = sum(abs(features[:, c].mean() - features_of_truth[:, c].mean()) for c in range(512))
    own = []
    for i in range(IMAGES):
        if of_predicted[i] > model.confidence:
            for y, x in unlabeled["on_image1"][i].nonzero().tolist():
                own.append(-logits[i, :, y, x].log_softmax(0).max())
    losses = {
        "loss_ce": -torch.stack(of_labels).mean(),
        "loss_u": torch.stack(own).mean(),
        "loss_fm": loss_fm / 512,
        "loss_d": -((1 - of_predicted).log().mean() + of_truth.log().mean()) / 2,
        "d_labeled": of_truth.mean(),
        "d_unlabeled": of_predicted.mean(),
        "confident": (of_predicted > model.confidence).double().mean(),
    }
    loss = losses["loss_ce"] + 0.1 * losses["loss_fm"] + 0.7 * losses["loss_u"]
    return {"loss": loss, **losses}, of_predicted.detach()


@functools.cache
def threshold() -> str:
    """D(u) of both bright images is above it, of no dark one."""
    found = by_loops(method("--confidence", "0", frozen=True))[1]
    assert found[:2].min() > found[2:].max() + 0.01
    return str(((found[:2].min() + found[2:].max()) / 2).item())


def learned(losses: Tensor, *parts: torch.nn.Module) -> list[tuple[Tensor, ...]]:
    return [
        torch.autograd.grad(losses, list(part.parameters()), retain_graph=True) for part in parts
    ]


def test_losses_and_gradients_are_those_of_loops():
    """The segmenter's of its own losses alone, D's of its own alone."""
    model = method("--confidence", threshold(), frozen=True)
    found, (expected, _) = model(*batches()), by_loops(model)
    segmenter, of_d = learned(found["loss"], model.network, model.discriminator)
    (there,) = learned(expected["loss"], model.network)
    torch.testing.assert_close(segmenter, there, rtol=1e-9, atol=1e-12)
    (there,) = learned(expected["loss_d"], model.discriminator)
    torch.testing.assert_close(of_d, there, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().max() > 0 for gradient in (*segmenter, *of_d))
    assert found.keys() == expected.keys() and found["confident"] == 0.5
    expected["loss"] = expected["loss"] + expected["loss_d"]
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12), name


@pytest.mark.parametrize(
    ("options", "iteration", "share"),
    [(["--confidence", "1.01"], 61, 0), (["--confidence", "0"], 60, 1)],
    ids=["nothing above gamma", "first step"],
)
def test_no_self_training(options, iteration, share):
    """The rest of the loss stays, and with weight 0 its gradients to the bit."""
    found = []
    for weight in ("5", "0"):
        model = method(*options, "--unsupervised-weight", weight)
        model.iteration = iteration
        torch.manual_seed(2)
        losses = model(*batches())
        losses["loss"].backward()
        assert losses["loss_u"] == 0 and losses["confident"] == share
        assert losses["loss_fm"] > 0 and losses["loss_d"] > 0
        found.append([weight.grad for weight in model.parameters()])
    assert all(map(torch.equal, *found))
    model.iteration = 61
    assert (model(*batches())["loss_u"] > 0) == bool(share)


def test_without_weights_the_supervised_gradient_stays(monkeypatch):
    """To the bit, the dropout too."""
    monkeypatch.setattr(s4gan, "FEATURE_MATCHING", 0.0)
    found = []
    for kind in (S4GAN, Supervised):
        model = method("--unsupervised-weight", "0", kind=kind)
        torch.manual_seed(2)
        model(*batches())["loss"].backward()
        found.append([weight.grad for weight in model.network.parameters()])
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there) and here.abs().max() > 0


def test_padding_gets_no_gradient_and_shows_nothing(monkeypatch):
    kept: list[Tensor] = []
    upsample = base.upsample_logits

    def upsampled(logits: Tensor, size: torch.Size) -> Tensor:
        kept.append(upsample(logits, size))
        kept[-1].retain_grad()
        return kept[-1]

    monkeypatch.setattr(base, "upsample_logits", upsampled)
    model, seen = method("--confidence", "0"), []
    model.discriminator.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    labeled, unlabeled = batches()
    model(labeled, unlabeled)["loss"].backward()
    in_labeled = on_image(labeled["flip"], labeled["valid"], SIDE)
    learns = kept[1].grad.abs().amax(1) > 0
    assert torch.equal(learns, unlabeled["on_image1"]) and not learns.all()
    for shown, batch in ((seen[1], unlabeled["on_image1"]), (seen[2], in_labeled)):
        assert torch.equal((shown[:, :3] != 0).any(1), batch)
        assert not shown.permute(1, 0, 2, 3)[:, ~batch].any()
    assert torch.equal(seen[2][:, 3:].sum(1) == 1, labeled["label"] != 255)


def test_slices_change_nothing():
    found = []
    for slices in ("1", "2"):
        model = method("--confidence", threshold(), "--accumulate", slices, frozen=True)
        losses = model(*batches())
        losses["loss"].backward()
        found.append((losses, [weight.grad for weight in model.parameters()]))
        assert model.network.backbone.calls == (2 if slices == "1" else 7)
    torch.testing.assert_close(*found)


def test_two_ranks_are_one(tmp_path):
    """In float64; one has no image above gamma, and half of the distance of features is its own."""
    build = functools.partial(method, "--confidence", threshold(), frozen=True)
    model = build()
    losses = model(*batches())
    losses["loss"].backward()
    of_ranks, found = two_ranks.step(build, batches(), tmp_path)
    assert [of_rank["confident"] for of_rank in of_ranks] == [1, 0]
    assert of_ranks[1]["loss_u"] == 0 and of_ranks[0]["loss_fm"] == of_ranks[1]["loss_fm"]
    for name, value in losses.items():
        mean = sum(of_rank[name] for of_rank in of_ranks) / 2
        torch.testing.assert_close(mean, value.detach(), rtol=1e-12, atol=0)
    expected = [weight.grad for weight in model.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of all methods have this one too."""
    monkeypatch.setitem(TOYS, "s4gan", S4GAN)
    scalars = "loss_u", "loss_fm", "loss_d", "d_labeled", "d_unlabeled", "confident"
    monkeypatch.setitem(test_methods.SCALARS, "s4gan", scalars)
    options = [*test_methods.OPTIONS, "--method", "s4gan", "--confidence", "0.4"]
    monkeypatch.setattr(test_methods, "OPTIONS", options)
    test_methods.use("s4gan", monkeypatch)


def test_a_step_changes_what_it_may(tiny, folder_data, tmp_path):
    trained = trainer(folder_data, tmp_path / "run", "--discriminator-learning-rate", "0.003")
    model = trained.method
    assert isinstance(model, S4GAN) and trained.network is model.network
    assert one_step(trained, unlabeled=False) == names(model, "network")
    assert one_step(trained, unlabeled=True) == names(model, "network", "discriminator")
    sgd, adam = trained.optimizers
    assert isinstance(adam, torch.optim.Adam)
    (group,) = adam.param_groups
    assert group["params"] == list(model.discriminator.parameters())
    assert group["betas"] == (0.9, 0.99) and group["weight_decay"] == 0
    assert group["lr"] == pytest.approx(0.003 * (5 / 6) ** 0.9)
    held = {id(weight) for group in sgd.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in model.network.parameters()}
    trained.folder.prepare(new=True)
    trained._write_best()
    kept = checkpoint.read(trained.folder.best)["network"]
    assert kept.keys() == model.network.state_dict().keys()


def still_process(*arguments) -> None:
    s4gan.DROPOUT = 0.0
    test_methods.as_rank(*arguments)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_interrupted_run_ends_with_the_same_bits(
    precision, tiny, folder_data, tmp_path, monkeypatch
):
    given = "s4gan", precision, folder_data, tmp_path, monkeypatch
    test_methods.test_interrupted_run_ends_with_the_same_bits(*given)


@pytest.mark.parametrize(
    "test",
    [
        test_methods.test_slices_and_recomputation_change_nothing,
        test_methods.test_autocast_starts_where_fp32_does,
        test_methods.test_a_step_that_overflows_changes_no_weight,
        test_methods.test_two_processes_give_the_course_of_one,
    ],
)
def test_as_all_methods(test, tiny, folder_data, tmp_path, monkeypatch):
    monkeypatch.setattr(s4gan, "DROPOUT", 0.0)
    monkeypatch.setattr(test_methods, "as_rank", still_process)
    test("s4gan", folder_data, tmp_path, monkeypatch)


def test_the_discriminator_drops_channels():
    layers = [type(layer).__name__ for layer in Discriminator(CLASSES).maps]
    assert layers == ["Conv2d", "LeakyReLU", "Dropout2d"] * 3 + ["Conv2d", "LeakyReLU"]
    assert Discriminator(CLASSES).maps[2].p == 0.5


def test_presets_and_mistakes():
    def loss(*options: str) -> tuple[object, ...]:
        found = config.parse(["--method", "s4gan", *options]).loss
        rate = found.discriminator_learning_rate
        return found.warmup, found.unsupervised_weight, found.confidence, rate

    assert loss("--dataset", "folder", "--data-dir", "d") == (0, 1, 0.6, 1e-4)
    assert loss("--dataset", "cityscapes", "--data-dir", "d") == (0, 1, 0.7, 1e-5)
    assert loss("--dataset", "toycity", "--confidence", "0.7") == (60, 1, 0.7, 1e-4)
    with pytest.raises(InputError) as error:
        method("--crop-size", "8")
    assert str(error.value) == "--crop-size 8: s4gan's discriminator needs at least 16"
