"""GCT: its losses against loops in float64, what learns from what, and what changes nothing."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import test_fixmatch
import test_step
import torch
from small_training import CPU
from test_step import IMAGES, Backbone, Head
from torch import Tensor

from cac_fast.train import config
from cac_fast.train.methods import Method
from cac_fast.train.methods.flaws import DETECTOR, found_flaws, true_flaws
from cac_fast.train.methods.flaws import blurred as blur
from cac_fast.train.methods.gct import GCT, distances
from cac_fast.train.methods.judged import Judge, JudgedMethod
from cac_fast.train.networks import Segmenter

SIDE, CLASSES = 32, 3
SMALL = [(channels // 8 or 1, stride) for channels, stride in DETECTOR]


class SmallGCT(GCT):
    """With a detector of an eighth of the channels."""

    layers = SMALL


def method(*options: str, frozen: bool = False, kind: type[Method] = SmallGCT) -> GCT:
    """In float64, after the ramp; frozen: as `test_step.method`."""
    settings = config.parse([*"--dataset toycity --method gct --crop-size 32".split(), *options])
    torch.manual_seed(0)
    networks = lambda: Segmenter(Backbone(), Head(), CLASSES, dropout=0.5)  # noqa: E731
    result = kind(networks, CPU, settings, torch.float64).double()
    result.iteration = settings.optim.iterations
    if isinstance(result, JudgedMethod):  # answers large enough to find a flaw in both
        with torch.no_grad():
            result.judge.layers[-1].bias += 0.3
    return result.eval() if frozen else result


@functools.cache
def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """With padding, pixels without a label, and a labeled image that has no label at all."""
    labeled, unlabeled = test_fixmatch.batches()
    labels = labeled["label"].clone()
    labels[0, 4:9, 20:], labels[3] = 255, 255
    return labeled | {"label": labels}, unlabeled


@pytest.fixture(autouse=True)
def same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_step.step` takes these."""
    monkeypatch.setattr(test_step, "batches", batches)


def windows(size: int) -> np.ndarray:
    """A Gaussian of two dimensions."""
    deviation = 0.3 * ((size - 1) / 2 - 1) + 0.8
    weights = np.empty((size, size))
    for y in range(size):
        for x in range(size):
            distance = (y - size // 2) ** 2 + (x - size // 2) ** 2
            weights[y, x] = math.exp(-distance / (2 * deviation**2))
    return weights / weights.sum()


def blurred(one: np.ndarray, valid: np.ndarray, size: int) -> np.ndarray:
    weights, pad = windows(size), size // 2
    values, counts = (np.pad(x, pad, mode="reflect") for x in (one * valid, valid.astype(float)))
    result = np.zeros_like(one)
    for y in range(SIDE):
        for x in range(SIDE):
            here = np.s_[y : y + size, x : x + size]
            if counts[here].any():
                result[y, x] = (values[here] * weights).sum() / (counts[here] * weights).sum()
    return result


def stretched(one: np.ndarray, valid: np.ndarray) -> np.ndarray:
    if not valid.any():
        return np.zeros_like(one)
    low, high = one[valid].min(), one[valid].max()
    return np.where(valid, (one - low) / (high - low + 1e-6), 0)


def truth_of(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The true flaws of an image, of probabilities (K, H, W)."""
    one, wide = np.zeros((SIDE, SIDE)), np.empty((SIDE, SIDE))
    for y, x in np.argwhere(labels != 255):
        right = np.arange(CLASSES) == labels[y, x]
        one[y, x] = 0.5 * np.abs(right - predicted[:, y, x]).sum()
    known = labels != 255
    one = blurred(one, known, 5) * known
    for y in range(SIDE):
        for x in range(SIDE):
            wide[y, x] = one[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max()
    return stretched(blurred(wide, known, 9), known)


def map_of(answer: np.ndarray, valid: np.ndarray) -> np.ndarray:
    one = blurred(np.maximum(answer, 0), valid, 3)
    return stretched(one, valid) if valid.any() and one[valid].max() > 0.1 else 0 * one


def by_loops(model: GCT) -> dict[str, Tensor]:
    """All losses, image by image."""
    labeled, unlabeled = batches()
    labels = labeled["label"].numpy()
    images = torch.cat((labeled["image"], unlabeled["image_weak"]))
    valid = torch.cat((labeled["label"] != 255, unlabeled["on_image1"]))
    passes = (labeled["image"], unlabeled["image_weak"])
    logits = [torch.cat([net(part) for part in passes]) for net in (model.network, model.second)]
    both = [each.softmax(1) for each in logits]
    seen = [each * valid[:, None] for each in both]
    answers = [model.judge(images, each, valid)[:, 0] for each in seen]
    told = [model.judge(images[:4], each[:4].detach(), valid[:4])[:, 0] for each in seen]
    sums = dict.fromkeys(("ce", "consistency", "correction", "flaws", "flawed"), 0.0)
    for i in range(2 * IMAGES):
        on = valid[i].numpy()
        maps = [map_of(each[i].detach().numpy(), on) for each in answers]
        ranks = [np.where(each > 0.6, 1, each) for each in maps]
        bad = torch.from_numpy((maps[0] > 0.6) & (maps[1] > 0.6) & on)
        sums["flawed"] += bad.sum()
        for mine, other in ((0, 1), (1, 0)):
            stays = torch.from_numpy(ranks[other] >= ranks[mine])
            target = torch.where(stays, both[mine][i], both[other][i]).detach()
            square = ((both[mine][i] - target) ** 2).sum(0) / CLASSES
            sums["consistency"] += square[valid[i]].sum()
            sums["correction"] += (answers[mine][i][bad] ** 2).sum()
            if i < IMAGES:
                truth = torch.from_numpy(truth_of(both[mine][i].detach().numpy(), labels[i]))
                sums["flaws"] += 5 * ((told[mine][i] - truth)[valid[i]] ** 2).sum()
                for y, x in np.argwhere(on):
                    sums["ce"] -= logits[mine][i, :, y, x].log_softmax(0)[labels[i, y, x]]
    known, pixels = valid[:IMAGES].sum(), valid.sum()
    per = {"ce": known, "flaws": known}
    return {name: value / per.get(name, pixels) for name, value in sums.items()}


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_losses_and_gradients_are_those_of_loops(forward):
    model = method("--unsupervised-weight", "7", "--forward", forward, frozen=True)
    found, expected = model(*batches()), by_loops(model)
    assert 0.001 < expected["flawed"] < 0.5
    for name, value in expected.items():
        # A quotient of integers is float32.
        rel, key = (1e-6, name) if name == "flawed" else (1e-12, f"loss_{name}")
        assert found[key].item() == pytest.approx(value.item(), rel=rel), name
        assert value > 0, name
    of_networks = expected["ce"] + 7 * expected["consistency"] + expected["correction"]
    total = of_networks + expected["flaws"]
    assert found["loss"].item() == pytest.approx(total.item(), rel=1e-12)
    networks = [*model.network.parameters(), *model.second.parameters()]
    for weights, loss in (
        (networks, of_networks),
        (list(model.judge.parameters()), expected["flaws"]),
    ):
        # The networks learn nothing of the detector's loss, and it nothing of theirs.
        here = torch.autograd.grad(found["loss"], weights, retain_graph=True)
        there = torch.autograd.grad(loss, weights, retain_graph=True)
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-13)
        assert max(gradient.abs().max() for gradient in here) > 0


def predictions(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = count, 2 * IMAGES, CLASSES, SIDE, SIDE
    return list(torch.randn(shape, dtype=torch.float64, generator=generator).mul(3).softmax(2))


def test_a_perfect_prediction_has_no_flaw():
    labeled, _ = batches()
    labels = labeled["label"]
    known = labels != 255
    perfect = torch.nn.functional.one_hot((labels * known).long(), CLASSES)
    perfect = perfect.permute(0, 3, 1, 2).double()
    assert (true_flaws(perfect, labels) == 0).all()
    wrong = true_flaws(perfect.roll(1, 1), labels)
    # Half of an image is wrong.
    half = torch.cat((perfect[..., :16], perfect.roll(1, 1)[..., 16:]), 3)
    found = true_flaws(half, labels)
    assert torch.equal(wrong * ~known, torch.zeros_like(wrong))
    for image in range(3):
        assert found[image][known[image]].max() == pytest.approx(1, abs=1e-5)
        assert found[image, 24:, :8].max() < 0.01 and found[image, 26:, 24:].min() > 0.99


def test_small_answers_and_answers_off_the_image_are_no_flaw():
    valid = batches()[1]["on_image1"]
    answer = torch.full(valid.shape, -1.0, dtype=torch.float64)
    answer[:, 10:14, 10:14] = 0.09
    assert (found_flaws(answer, valid) == 0).all()
    answer[:, 10:14, 10:14] = 0.5
    assert (found_flaws(answer, valid).amax((1, 2)) > 0.99).all()
    off = torch.where(valid, -1.0, 5.0).double()
    assert (found_flaws(off, valid) == 0).all()


def test_a_blurred_map_of_one_value_has_this_value():
    valid = batches()[1]["on_image1"]
    one = torch.where(valid, 3.0, 100.0).double()
    assert torch.allclose(blur(one, valid, 5)[valid], torch.tensor(3.0).double(), atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(blur(one.float(), valid, 5), blur(one.float(), valid, 5).float())
        noise = torch.rand(2, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        everywhere = torch.ones_like(noise, dtype=torch.bool)
        inside = blur(noise, everywhere, 9)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, blur(noise, everywhere, 9))


def test_the_flawed_follows_the_other_and_swapping_swaps():
    """Also where both flaws are too large, or equal, and nobody follows."""
    both, flaw = predictions(), torch.zeros(2, 2 * IMAGES, SIDE, SIDE, dtype=torch.float64)
    flaw[0, :2], flaw[1, :2] = 0.3, 0.2  # the first one follows
    flaw[0, 2:4], flaw[1, 2:4] = 0.7, 0.9  # both are hopeless
    flaw[0, 4:5], flaw[1, 4:5] = 0.6, 0.61  # the second one follows
    flaw[0, 5:], flaw[1, 5:] = 0.4, 0.4
    square = ((both[0] - both[1]) ** 2).mean(1).sum((1, 2))
    first, second = distances(both, list(flaw))
    assert first.item() == pytest.approx(square[:2].sum().item(), rel=1e-12)
    assert second.item() == pytest.approx(square[4].item(), rel=1e-12)
    swapped = distances(both[::-1], list(flaw)[::-1])
    assert torch.equal(torch.stack(swapped), torch.stack((second, first)))


def test_swapped_networks_have_the_same_losses():
    model = method(frozen=True)
    before = model(*batches())
    model.network, model.second = model.second, model.network
    after = model(*batches())
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].item() == pytest.approx(value.item(), rel=1e-12), name


def test_the_detector_is_that_of_the_authors():
    """8.3 million weights for 21 classes, and an answer at 1/32 of a crop that is large enough."""
    judge = Judge(21, DETECTOR, crop=320)
    assert sum(weight.numel() for weight in judge.parameters()) == pytest.approx(8.3e6, rel=0.01)
    strides = [part.stride[0] for part in judge.layers if isinstance(part, torch.nn.Conv2d)]
    assert strides == [2, 2, 1, 2, 1, 2, 1, 2]
    for crop, side in ((320, 10), (128, 4), (56, 7), (32, 4)):
        judge = Judge(3, SMALL, crop)
        inputs = torch.rand(2, 6, crop, crop)
        assert judge.layers(inputs).shape == (2, 1, side, side)
