"""CCT: its loss against a loop in float64, what learns from it, and what changes nothing."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import test_methods
import test_step
import torch
from small_training import CPU
from test_methods import names, one_step, trainer
from test_step import IMAGES, Backbone, Head
from torch import Tensor
from toy_methods import TOYS

from cac_fast.train import checkpoint, config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods import cct
from cac_fast.train.methods.cct import CCT
from cac_fast.train.methods.supervised import Supervised
from cac_fast.train.networks import Segmenter, build_network

SIDE, CELLS, CLASSES = 32, 4, 3
MIDWAY = 70
"""Ten steps after the toy city's warm-up, halfway through the ramp of a tenth of 200 steps."""


STILL = lambda f: 2 * f, lambda f: f + 0.5, lambda f: f.flip(1)
"""In place of the perturbations: they draw nothing, and treat each image alone."""


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cct, "PERTURBATIONS", STILL)


def method(
    *options: str, kind: type = CCT, frozen: bool = False, world: World = CPU, network=None
) -> CCT:
    """In float64, in the middle of the ramp; frozen: as `test_step.method`."""
    settings = config.parse(["--dataset", "toycity", "--method", "cct", *options])
    torch.manual_seed(0)
    network = Segmenter(Backbone(), Head(), CLASSES, dropout=0.5) if network is None else network
    result = kind(lambda: network, world, settings, torch.float64).double()
    result.iteration = MIDWAY
    return result.eval() if frozen else result


@functools.cache
def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Padding at the bottom, at a side, and from within a cell on."""
    labeled, unlabeled = test_step.batches()
    on_image = torch.ones(IMAGES, SIDE, SIDE, dtype=torch.bool)
    on_image[1, 16:], on_image[2, :, :8], on_image[3, 9:, 20:] = False, False, False
    return labeled, {"image_weak": unlabeled["image_1"], "on_image1": on_image}


def step(model: CCT) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    torch.manual_seed(2)
    losses = model(*batches())
    losses["loss"].backward()
    return losses, [weight.grad for weight in model.parameters()]


def valid_cells() -> set[tuple[int, int, int]]:
    missing = {(1, y, x) for y in (2, 3) for x in range(4)} | {(2, y, 0) for y in range(4)}
    missing |= {(3, y, x) for y in (1, 2, 3) for x in (2, 3)}
    return set(itertools.product(range(IMAGES), range(CELLS), range(CELLS))) - missing


def by_loops(model: CCT) -> tuple[Tensor, Tensor]:
    """L_ce and L_u, cell by cell."""
    labeled, unlabeled = batches()
    network = model.network
    logits = network(labeled["image"]).log_softmax(1)
    known = (labeled["label"] != 255).nonzero().tolist()
    of_labels = [logits[i, int(labeled["label"][i, y, x]), y, x] for i, y, x in known]
    maps = network.head(*network.backbone(unlabeled["image_weak"]))
    total, count = torch.zeros((), dtype=torch.float64), 0
    final = network.classifier[-1]
    for i, y, x in valid_cells():
        four = [maps[i, :, 2 * y + down, 2 * x + right] for down in (0, 1) for right in (0, 1)]
        feature = sum(four) / 4
        target = probability(feature, final).detach()
        seen = [2 * feature, feature + 0.5, feature.flip(0)]
        for number, head in enumerate(model.heads):
            found = probability(seen[number % 3], head)
            for k in range(CLASSES):
                total = total + (found[k] - target[k]) ** 2
                count += 1
    assert len(model.heads) in (3, 6)
    return -torch.stack(of_labels).mean(), total / count


def probability(feature: Tensor, classifier: torch.nn.Conv2d) -> Tensor:
    exponents = (classifier.weight[:, :, 0, 0] @ feature + classifier.bias).exp()
    return exponents / exponents.sum()


@pytest.mark.parametrize("heads", ["1", "2"])
def test_loss_and_gradients_are_those_of_loops(heads, still):
    model = method("--auxiliary-heads", heads, frozen=True)
    found, (loss_ce, loss_u) = model(*batches()), by_loops(model)
    weight = 30 * math.exp(-5 / 4)
    expected = {"loss_ce": loss_ce, "loss_u": loss_u, "loss": loss_ce + weight * loss_u}
    assert found.keys() == expected.keys() | {"weight_u"} and loss_u > 0.001
    assert found["weight_u"].item() == pytest.approx(weight, rel=1e-12)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12), name
    weights = list(model.parameters())
    here, there = (torch.autograd.grad(losses["loss"], weights) for losses in (found, expected))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-12)


def test_the_weight_rises_in_a_tenth_of_the_run():
    model, weights = method("--unsupervised-weight", "7"), []
    for model.iteration in (60, 79, 80, 199):
        weights.append(model.weight)
    rising = [7 * math.exp(-5), 7 * math.exp(-5 / 400)]
    assert weights == pytest.approx([*rising, 7, 7], rel=1e-12)


def test_perturbations():
    torch.manual_seed(5)
    features = torch.rand(6, 40, 4, 5, dtype=torch.float64) + 0.1
    ratio = cct.channel_dropout(features) / features
    assert set(ratio.flatten().tolist()) == {0, 2} and (ratio == ratio[:, :, :1, :1]).all()
    assert 80 < ratio[:, :, 0, 0].count_nonzero() < 160 and (ratio[0] != ratio[1]).any()
    ratio = cct.feature_noise(features) / features
    assert (ratio - ratio[:1]).abs().max() < 1e-12
    assert 0.7 <= ratio.min() < 0.72 and 1.28 < ratio.max() <= 1.3
    assert not torch.equal(cct.feature_noise(features), cct.feature_noise(features))
    features[2] *= 10
    shares = features.mean(1) / features.mean(1).amax((1, 2), keepdim=True)
    edges = []
    for _ in range(50):
        kept = cct.feature_drop(features) == features
        assert (kept == kept[:, :1]).all()
        kept = kept[:, 0]
        edges.append((shares[kept].max(), shares[~kept].min()))
        assert edges[-1][0] < edges[-1][1]
        assert not cct.feature_drop(features).permute(1, 0, 2, 3)[:, ~kept & (shares == 1)].any()
    lows, highs = (torch.stack(values) for values in zip(*edges, strict=True))
    assert highs.min() >= 0.7 and lows.max() < 0.9 and highs.max() - highs.min() > 0.1


def test_what_learns_from_what():
    """C from labels alone; the encoder from both; the heads from unlabeled images."""
    supervised, both = method(kind=Supervised), method()
    _, of_labels = step(supervised)
    losses, _ = step(both)
    assert losses["loss_u"] > 0
    for (name, weight), other in zip(both.network.named_parameters(), of_labels, strict=True):
        assert torch.equal(weight.grad, other) == name.startswith("classifier"), name
    assert all(weight.grad.abs().max() > 0 for weight in both.heads.parameters())
    assert both.network.backbone.high[1].num_batches_tracked == 2  # statistics of each pass


def test_without_weight_the_supervised_gradient_stays():
    """To the bit, and with the same dropout: the labeled images come first."""
    _, of_labels = step(method(kind=Supervised))
    _, found = step(method("--unsupervised-weight", "0"))
    for here, there in zip(found, of_labels, strict=False):
        assert torch.equal(here, there) and here.abs().max() > 0
    assert len(found) == len(of_labels) + 12
    assert all(not gradient.any() for gradient in found[len(of_labels) :])


def test_padding_gets_no_gradient(still):
    model, kept = method(), []

    def keep(*given: Any) -> None:
        given[2].retain_grad()
        kept.append(given[2])

    for head in model.heads:
        head.register_forward_hook(keep)
    step(model)
    assert len(kept) == 6
    for logits in kept:
        learns = logits.grad.abs().amax(1) > 0
        assert {tuple(place) for place in learns.nonzero().tolist()} == valid_cells()


def test_no_image_at_all_breaks_nothing():
    labeled, unlabeled = batches()
    nothing = unlabeled | {"on_image1": torch.zeros_like(unlabeled["on_image1"])}
    losses = method()(labeled, nothing)
    losses["loss"].backward()
    assert losses["loss_u"] == 0 and torch.equal(losses["loss"], losses["loss_ce"])


def test_slices_change_nothing(still):
    whole, sliced = (method("--accumulate", n, frozen=True) for n in ("1", "2"))
    (losses1, gradients1), (losses2, gradients2) = map(step, (whole, sliced))
    torch.testing.assert_close(losses2, losses1)
    torch.testing.assert_close(gradients2, gradients1)
    assert whole.network.backbone.calls == 2
    assert sliced.network.backbone.calls == 7  # the last one is not computed again


@pytest.mark.parametrize("name", ["deeplabv3plus", "lraspp", "pspnet"])
def test_features_are_seen_at_an_eighth(name, monkeypatch):
    sizes = []
    seen = tuple(lambda f, p=p: sizes.append(f.shape[-2:]) or p(f) for p in cct.PERTURBATIONS)
    monkeypatch.setattr(cct, "PERTURBATIONS", seen)
    network = build_network(name, "mobilenet_v2", CLASSES)
    assert network.feature_stride == (4 if name == "deeplabv3plus" else 8)
    losses, _ = step(method(network=network))
    assert sizes == [(CELLS, CELLS)] * 6 and losses["loss_u"] > 0


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of all methods have this one too."""
    monkeypatch.setitem(TOYS, "cct", CCT)
    monkeypatch.setitem(test_methods.SCALARS, "cct", ("loss_u", "weight_u"))
    monkeypatch.setattr(test_methods, "OPTIONS", [*test_methods.OPTIONS, "--method", "cct"])
    test_methods.use("cct", monkeypatch)


def test_a_step_changes_what_it_may(tiny, folder_data, tmp_path):
    trained = trainer(folder_data, tmp_path / "run")
    model = trained.method
    assert isinstance(model, CCT) and trained.network is model.network
    assert one_step(trained, unlabeled=False) == names(model, "network")
    assert one_step(trained, unlabeled=True) == names(model, "network", "heads")
    assert len(names(model, "heads")) == 12
    backbone, rest = (group["params"] for group in trained.optimizer.param_groups)
    assert len(backbone) + len(rest) == len(list(model.parameters()))
    assert {id(w) for w in model.heads.parameters()} <= {id(w) for w in rest}
    trained.folder.prepare(new=True)
    trained._write_best()
    kept = checkpoint.read(trained.folder.best)["network"]
    assert kept.keys() == model.network.state_dict().keys()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_interrupted_run_ends_with_the_same_bits(
    precision, tiny, folder_data, tmp_path, monkeypatch
):
    given = "cct", precision, folder_data, tmp_path, monkeypatch
    test_methods.test_interrupted_run_ends_with_the_same_bits(*given)


@pytest.mark.parametrize(
    "test",
    [
        test_methods.test_slices_and_recomputation_change_nothing,
        test_methods.test_autocast_starts_where_fp32_does,
        test_methods.test_a_step_that_overflows_changes_no_weight,
    ],
)
def test_as_all_methods(test, tiny, still, folder_data, tmp_path, monkeypatch):
    test("cct", folder_data, tmp_path, monkeypatch)


def still_process(*arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cct, "PERTURBATIONS", STILL)
        test_methods.as_rank(*arguments)


def test_two_processes_give_the_course_of_one(tiny, still, folder_data, tmp_path, monkeypatch):
    monkeypatch.setattr(test_methods, "as_rank", still_process)
    given = "cct", folder_data, tmp_path, monkeypatch
    test_methods.test_two_processes_give_the_course_of_one(*given)


def test_presets_and_mistakes():
    def loss(*options: str) -> tuple[object, ...]:
        found = config.parse(["--method", "cct", *options]).loss
        return found.warmup, found.unsupervised_weight, found.auxiliary_heads

    assert loss("--dataset", "folder", "--data-dir", "d") == (0, 30, 2)
    assert loss("--dataset", "toycity", "--unsupervised-weight", "3") == (60, 3, 2)
    with pytest.raises(InputError, match="--auxiliary-heads 0: must be positive"):
        method("--auxiliary-heads", "0")
