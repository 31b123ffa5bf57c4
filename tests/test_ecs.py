"""ECS: its losses against loops in float64, what learns from what, and a run."""

from __future__ import annotations

import pytest
import torch
from test_gct import CLASSES, batches, method
from torch import Tensor

from cac_fast.train.methods.ecs import CORRECTOR, ECS

CORRECT = CLASSES


class SmallECS(ECS):
    """With a corrector of an eighth of the channels."""

    layers = [(channels // 8, stride) for channels, stride in CORRECTOR]  # noqa: RUF012


def ecs(*options: str, frozen: bool = False) -> ECS:
    """In float64, with a corrector that says all sorts of classes."""
    result = method("--unsupervised-weight", "0.7", *options, frozen=frozen, kind=SmallECS)
    torch.manual_seed(3)
    with torch.no_grad():
        last = result.judge.layers[-1]
        last.weight.mul_(8)
        last.bias.copy_(torch.tensor([0.0, -0.1, 0.1, 0.2]))
    return result


def by_loops(model: ECS) -> dict[str, Tensor]:
    """All losses, pixel by pixel."""
    labeled, unlabeled = batches()
    labels, on_image = labeled["label"], unlabeled["on_image1"]
    known = labels != 255
    logits, of_unlabeled = (
        model.network(images) for images in (labeled["image"], unlabeled["image_weak"])
    )
    seen = logits.softmax(1) * known[:, None]
    trained = model.judge(labeled["image"], seen.detach(), known).log_softmax(1)
    asked = model.judge(labeled["image"], seen, known).log_softmax(1)
    predicted = of_unlabeled.softmax(1).detach() * on_image[:, None]
    judged = model.judge(unlabeled["image_weak"], predicted, on_image).softmax(1).detach()
    of_labeled, of_image = logits.log_softmax(1), of_unlabeled.log_softmax(1)
    names = "ce", "approval", "corrector", "u", "kept", "certainty"
    sums = {name: torch.zeros((), dtype=torch.float64) for name in names}
    said = set()
    for i, y, x in known.nonzero().tolist():
        label, right = int(labels[i, y, x]), CORRECT
        sums["ce"] = sums["ce"] - of_labeled[i, label, y, x]
        if int(logits[i, :, y, x].argmax()) != label:
            right = label
        sums["corrector"] = sums["corrector"] - trained[i, right, y, x]
        sums["approval"] = sums["approval"] - asked[i, CORRECT, y, x]
    for i, y, x in on_image.nonzero().tolist():
        certainty, label = judged[i, :, y, x].max(0)
        said.add(int(label))
        own = int(of_unlabeled[i, :, y, x].argmax())
        pseudo = own if label == CORRECT else int(label)
        sums["u"] = sums["u"] - certainty * of_image[i, pseudo, y, x]
        sums["kept"] += pseudo == own
        sums["certainty"] += certainty
    assert CORRECT in said and len(said) > 1
    labeled_ones = dict.fromkeys(("ce", "approval", "corrector"), known.sum())
    return {name: value / labeled_ones.get(name, on_image.sum()) for name, value in sums.items()}


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_losses_and_gradients_are_those_of_loops(forward):
    model = ecs("--forward", forward, frozen=True)
    found, expected = model(*batches()), by_loops(model)
    assert found.keys() == {"loss", "kept", "certainty"} | {
        f"loss_{name}" for name in ("ce", "approval", "corrector", "u")
    }
    assert 0.1 < found["kept"] < 0.9
    for name, value in expected.items():
        # A quotient of integers is float32.
        key = name if name in found else f"loss_{name}"
        rel = 1e-6 if name == "kept" else 1e-12
        assert found[key].item() == pytest.approx(value.item(), rel=rel), name
    of_network = expected["ce"] + 0.01 * expected["approval"] + 0.7 * expected["u"]
    total = of_network + expected["corrector"]
    assert found["loss"].item() == pytest.approx(total.item(), rel=1e-12)
    parts = ((model.network, of_network), (model.judge, expected["corrector"]))
    for part, loss in parts:  # neither learns of the other's loss
        weights = list(part.parameters())
        here = torch.autograd.grad(found["loss"], weights, retain_graph=True)
        there = torch.autograd.grad(loss, weights, retain_graph=True)
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-13)
        assert max(gradient.abs().max() for gradient in here) > 0


def say(model: ECS, *classes: int) -> None:
    """Let the corrector say, with certainty, the first class; of several, each as often."""
    with torch.no_grad():
        last = model.judge.layers[-1]
        last.weight.zero_()
        last.bias.fill_(-1000)
        last.bias[list(classes)] = 1000


def test_who_is_approved_learns_its_own_prediction():
    model = ecs(frozen=True)
    say(model, CORRECT)
    found = model(*batches())
    assert found["kept"] == 1 and found["certainty"] == 1 and found["loss_approval"] == 0
    _, unlabeled = batches()
    pseudo, certainty = model.corrected(unlabeled, model.network(unlabeled["image_weak"]))
    assert torch.equal(pseudo, model.network(unlabeled["image_weak"]).argmax(1))
    assert torch.equal(certainty, unlabeled["on_image1"].double())


def test_who_is_corrected_learns_what_the_corrector_says():
    model = ecs(frozen=True)
    say(model, 1)
    _, unlabeled = batches()
    pseudo, _ = model.corrected(unlabeled, model.network(unlabeled["image_weak"]))
    assert (pseudo == 1).all()
    assert model(*batches())["loss_approval"].item() == pytest.approx(2000)
    say(model, 0, 1, 2, CORRECT)
    assert model(*batches())["certainty"].item() == pytest.approx(0.25)


def test_the_corrector_learns_that_the_truth_is_correct():
    """Where the network is right it has to say so, elsewhere the class of the label."""
    model = ecs(frozen=True)
    labeled, _ = batches()
    known = labeled["label"] != 255
    one_hot = torch.nn.functional.one_hot((labeled["label"] * known).long(), CLASSES)
    right = 50.0 * one_hot.permute(0, 3, 1, 2)
    say(model, CORRECT)
    assert model.by_labels(labeled, right)[0] == 0
    assert model.by_labels(labeled, -right)[0].item() == pytest.approx(2000)
    say(model, 2)
    corrector, _ = model.by_labels(labeled, -right)
    wrong = (known & (labeled["label"] != 2)).sum() / known.sum()
    assert corrector.item() == pytest.approx(2000 * wrong.item())
