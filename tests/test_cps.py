"""CPS: its losses against loops in float64, what learns, and what changes nothing."""

from __future__ import annotations

import functools

import pytest
import small_training
import test_mean_teacher
import test_methods
import test_step
import torch
import torch.nn.functional as F
from small_training import CPU, assert_same_bits, losses
from test_mean_teacher import kept_logits
from test_methods import names, one_step, trainer
from test_step import IMAGES, Backbone, Head
from torch import Tensor
from toy_methods import TOYS

from cac_fast.train import checkpoint, config
from cac_fast.train.data.stream import on_image
from cac_fast.train.errors import InputError
from cac_fast.train.methods import Method
from cac_fast.train.methods.cps import CPS
from cac_fast.train.methods.supervised import Supervised
from cac_fast.train.networks import Segmenter

SIDE, CLASSES = 32, 3
MIXED = ["--cutmix"]
PARTNERS = [1, 0, 3, 2]

variants = pytest.mark.parametrize("variant", [[], MIXED], ids=" ".join)


def method(*options: str, kind: type[Method] = CPS, frozen: bool = False) -> Method:
    """In float64; frozen: as `test_step.method`."""
    settings = config.parse(["--dataset", "toycity", "--method", "cps", *options])
    torch.manual_seed(0)

    def network() -> Segmenter:
        return Segmenter(Backbone(), Head(), CLASSES, dropout=0.5)

    result = kind(network, CPU, settings, torch.float64).double()
    return result.eval() if frozen else result


@functools.cache
def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """With padding, and boxes that meet it and each other; labeled pixels on an image without a
    class."""
    labeled, unlabeled = test_mean_teacher.batches()
    flip = torch.tensor([False, True, False, True])
    valid = torch.tensor([[4, 4], [3, 2], [4, 1], [1, 4]])
    shown = on_image(flip, valid, SIDE)
    labeled = labeled | {"flip": flip, "valid": valid}
    labeled["label"] = labeled["label"].masked_fill(~shown, 255)
    assert (shown & (labeled["label"] == 255)).any()
    generator = torch.Generator().manual_seed(4)
    corners = torch.randint(0, SIDE + 1, (IMAGES, 3, 2, 2), generator=generator)
    boxes = corners.sort(2).values.flatten(2).to(torch.int16)
    boxes[0, 0] = 0
    plain = {"image_plain": unlabeled["image_weak"], "boxes_plain": boxes}
    return labeled, plain | {"on_image1": unlabeled["on_image1"]}


@pytest.fixture(autouse=True)
def same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_step.step` takes these."""
    monkeypatch.setattr(test_step, "batches", batches)


def from_partner(image: int, y: int, x: int) -> bool:
    taken = False
    for top, left, bottom, right in batches()[1]["boxes_plain"][image].tolist():
        if top <= y < bottom and left <= x < right:
            taken = not taken
    return taken


def by_loops(model: CPS) -> dict[str, Tensor]:
    """Losses pixel by pixel, by labels that are numbers."""
    labeled, unlabeled = batches()
    images, of_unlabeled = unlabeled["image_plain"], unlabeled["on_image1"]
    of_labeled = on_image(labeled["flip"], labeled["valid"], SIDE)

    def logs(network: Segmenter, images: Tensor) -> Tensor:
        small = network.classifier(network.head(*network.backbone(images)))
        logits = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
        return logits - logits.exp().sum(1, keepdim=True).log()

    networks = model.network, model.second
    told = [logs(network, images).argmax(1) for network in networks]
    seen, source = images.clone(), {}
    for i in range(IMAGES):
        for y in range(SIDE):
            for x in range(SIDE):
                of = PARTNERS[i] if model.cutmix and from_partner(i, y, x) else i
                seen[i, :, y, x], source[i, y, x] = images[of, :, y, x], of
    known = (labeled["label"] != 255).nonzero().tolist()
    valid = [(i, y, x) for (i, y, x), of in source.items() if of_unlabeled[of, y, x]]
    shown = of_labeled.nonzero().tolist()
    assert len(known) < len(source) and len(valid) < len(source)
    of_ce, of_cross = [], []
    on_labeled = [logs(network, labeled["image"]) for network in networks]
    for here, there in ((0, 1), (1, 0)):
        mine, other = on_labeled[here], on_labeled[there].argmax(1)
        truth = [-mine[i, int(labeled["label"][i, y, x]), y, x] for i, y, x in known]
        of_ce.append(torch.stack(truth))
        cross = []
        if not model.cutmix:
            cross = [-mine[i, int(other[i, y, x]), y, x] for i, y, x in shown]
        mine, other = logs(networks[here], seen), told[there]
        for i, y, x in valid:
            cross.append(-mine[i, int(other[source[i, y, x], y, x]), y, x])
        of_cross.append(torch.stack(cross))
    loss_ce, loss_u = (sum(each.mean() for each in both) for both in (of_ce, of_cross))
    alike = (told[0] == told[1])[of_unlabeled].double().mean()
    loss = loss_ce + 0.7 * loss_u
    return {"loss": loss, "loss_ce": loss_ce, "loss_u": loss_u, "agreement": alike}


@variants
def test_losses_and_gradients_are_those_of_loops(variant):
    model = method(*variant, "--unsupervised-weight", "0.7", frozen=True)
    found, expected = model(*batches()), by_loops(model)
    assert found.keys() == expected.keys() and 0.1 < found["agreement"] < 0.9
    for name, value in expected.items():
        rel = 1e-6 if name == "agreement" else 1e-12  # a quotient of integers is float32
        assert found[name].item() == pytest.approx(value.item(), rel=rel), name
    weights = list(model.parameters())
    here, there = (torch.autograd.grad(losses["loss"], weights) for losses in (found, expected))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-12)


@variants
def test_without_weight_the_supervised_gradient_stays(variant):
    """To the bit; the first network's is that of supervised training, its dropout too."""
    found = []
    options = *variant, "--unsupervised-weight", "0"
    for kind, with_unlabeled in ((CPS, True), (CPS, False), (Supervised, False)):
        model = method(*options, kind=kind)
        labeled, unlabeled = batches()
        torch.manual_seed(2)
        model(labeled, unlabeled if with_unlabeled else None)["loss"].backward()
        found.append([weight.grad for weight in model.parameters()])
    full, warm_up, supervised = found
    assert len(full) == 2 * len(supervised)
    for here, there in (*zip(full, warm_up, strict=True), *zip(full, supervised, strict=False)):
        assert torch.equal(here, there) and here.abs().max() > 0


def parts(model: CPS) -> tuple[Tensor, ...]:
    found = (model.mixed_losses if model.cutmix else model.plain_losses)(*batches())
    return *found.ce, *found.cross


@variants
def test_swapped_networks_swap_the_losses(variant):
    model = method(*variant, frozen=True)
    ce1, ce2, cross1, cross2 = parts(model)
    assert ce1 != ce2 and cross1 != cross2
    model.network, model.second = model.second, model.network
    for here, there in zip(parts(model), (ce2, ce1, cross2, cross1), strict=True):
        assert torch.equal(here, there)


@variants
def test_equal_networks_have_equal_losses(variant):
    model = method(*variant, frozen=True)
    model.second.load_state_dict(model.network.state_dict())
    found = parts(model)
    assert torch.equal(*found[:2]) and torch.equal(*found[2:])
    losses, gradients = test_step.step(model)
    assert losses["agreement"] == 1
    half = len(gradients) // 2
    torch.testing.assert_close(gradients[:half], gradients[half:])


def test_a_box_of_the_whole_crop_makes_the_partner(monkeypatch):
    model, asked = method(*MIXED, frozen=True), []
    labeled, unlabeled = batches()
    supervised = model.supervised_loss

    def loss(batch, network=None, last=True):
        asked.append((batch, network))
        return supervised(batch, network, last)

    monkeypatch.setattr(model, "supervised_loss", loss)
    labels = model.labels(unlabeled["image_plain"], unlabeled["on_image1"])
    assert all(torch.equal(each == 255, ~unlabeled["on_image1"]) for each in labels)
    boxes = torch.zeros(IMAGES, 3, 4, dtype=torch.int16)
    for whole, places in ((0, [0, 1, 2, 3]), (SIDE, PARTNERS)):
        boxes[:, 0, 2:] = whole
        asked.clear()
        model(labeled, unlabeled | {"boxes_plain": boxes})
        (_, _), (_, _), (first, one), (second, two) = asked
        assert one in (None, model.network) and two is model.second
        for batch, told in ((first, labels[1]), (second, labels[0])):
            assert torch.equal(batch["image"], unlabeled["image_plain"][places])
            assert torch.equal(batch["label"], told[places])


@variants
def test_padding_gets_no_gradient(variant, monkeypatch):
    """Nor do, with CutMix, labeled pixels whose class is unknown, nor logits that make labels."""
    kept = kept_logits(monkeypatch)
    labeled, unlabeled = batches()
    model = method(*variant)
    model(labeled, unlabeled)["loss"].backward()
    known, valid = labeled["label"] != 255, unlabeled["on_image1"]
    shown = on_image(labeled["flip"], labeled["valid"], SIDE)
    learned = [shown, shown, valid, valid]
    if variant:
        places = torch.ones_like(valid).nonzero().tolist()
        taken = torch.tensor([from_partner(*place) for place in places]).view_as(valid)
        mixed = valid[PARTNERS].where(taken, valid)
        learned = [known, known, None, None, mixed, mixed]
    for logits, counted in zip(kept, learned, strict=True):
        assert logits.requires_grad == (counted is not None)
        if counted is not None:
            assert torch.equal(logits.grad.abs().amax(1) > 0, counted) and not counted.all()
    moved = [part.backbone.high[1].num_batches_tracked for part in (model.network, model.second)]
    assert moved == [len(learned) // 2] * 2


@variants
def test_slices_change_nothing(variant):
    whole, sliced = (method(*variant, "--accumulate", n, frozen=True) for n in ("1", "2"))
    (losses1, gradients1), (losses2, gradients2) = map(test_step.step, (whole, sliced))
    torch.testing.assert_close(losses2, losses1)
    torch.testing.assert_close(gradients2, gradients1)


@pytest.fixture(params=[[], MIXED], ids=" ".join)
def tiny(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of all methods have this one too; images smaller than the crops."""
    monkeypatch.setitem(TOYS, "cps", CPS)
    monkeypatch.setitem(test_methods.SCALARS, "cps", ("loss_u", "agreement"))
    more = "--method cps --unlabeled-scale 0.4,0.8".split()
    options = [*test_methods.OPTIONS, *more, *request.param]
    monkeypatch.setattr(test_methods, "OPTIONS", options)
    test_methods.use("cps", monkeypatch)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_interrupted_run_ends_with_the_same_bits(
    precision, tiny, folder_data, tmp_path, monkeypatch
):
    given = "cps", precision, folder_data, tmp_path, monkeypatch
    test_methods.test_interrupted_run_ends_with_the_same_bits(*given)


def test_two_processes_give_the_course_of_one(tiny, folder_data, tmp_path, monkeypatch):
    given = "cps", folder_data, tmp_path, monkeypatch
    test_methods.test_two_processes_give_the_course_of_one(*given)


def test_slices_and_recomputation_change_no_run(tiny, folder_data, tmp_path, monkeypatch):
    given = "cps", folder_data, tmp_path, monkeypatch
    test_methods.test_slices_and_recomputation_change_nothing(*given)


@pytest.mark.parametrize(
    "test",
    [
        test_methods.test_autocast_starts_where_fp32_does,
        test_methods.test_a_step_that_overflows_changes_no_weight,
    ],
)
def test_as_all_methods(test, tiny, folder_data, tmp_path, monkeypatch):
    test("cps", folder_data, tmp_path, monkeypatch)


def test_a_step_changes_what_it_may(tiny, folder_data, tmp_path):
    trained = trainer(folder_data, tmp_path / "run")
    model = trained.method
    assert isinstance(model, CPS) and trained.network is model.network
    for unlabeled in (False, True):
        assert one_step(trained, unlabeled) == names(model, "network", "second")
    backbones, rest = (group["params"] for group in trained.optimizer.param_groups)
    both = model.network.backbone, model.second.backbone
    assert list(map(id, backbones)) == [id(w) for part in both for w in part.parameters()]
    assert {id(w) for w in (*backbones, *rest)} == {id(w) for w in model.parameters()}


@variants
def test_a_run_scores_the_first_network(variant, folder_data, tmp_path):
    lines = small_training.run(folder_data, tmp_path, "--method", "cps", *variant)
    assert "loss_u" not in lines[0]  # of the warm-up
    assert min(losses(lines[2:], "loss_u")) > 0
    assert all(0 < share <= 1 for share in losses(lines[2:], "agreement"))
    best, last = (checkpoint.read(tmp_path / name) for name in ("best.pt", "last.pt"))
    first = {n[8:]: x for n, x in last["method"].items() if n.startswith("network.")}
    assert_same_bits(best["network"], first)
    one, two = (last["method"][f"{name}.classifier.1.weight"] for name in ("network", "second"))
    assert not torch.equal(one, two)


def test_presets_and_views():
    def loss(*options: str) -> tuple[object, ...]:
        found = config.parse(["--method", "cps", *options]).loss
        return found.forward, found.warmup, found.unsupervised_weight, found.cutmix

    assert loss("--dataset", "folder", "--data-dir", "d") == ("separate", 0, 1.5, False)
    assert loss("--dataset", "toycity", *MIXED) == ("separate", 60, 1, True)
    street = "--dataset", "cityscapes", "--data-dir", "d"
    assert [loss(*street, *more)[2] for more in ([], MIXED)] == [6, 5]
    assert loss(*street, "--unsupervised-weight", "2") == ("separate", 0, 2, False)
    for options, boxes in (([], 0), (MIXED, 3)):
        (view,) = method(*options).views.values()
        assert (view.crop, view.color, view.boxes) == (1, None, boxes)


def test_one_pass_over_all_is_one_line():
    with pytest.raises(InputError) as error:
        method("--forward", "joint")
    assert str(error.value).endswith("in passes of their own: use --forward separate")
