"""The functional interface of the loss: values, gradients, limits, bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from paper_loss import cosine
from torch import Tensor

from cac_fast import backends, directional_contrastive_loss, ops
from cac_fast.backend import eager


def rows(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "anchors": draw(20, 5),
        "positives": draw(20, 5),
        "negatives": draw(40, 5),
        "anchor_labels": torch.randint(0, 3, (20,), generator=rng),
        "negative_labels": torch.randint(-1, 3, (40,), generator=rng),
        "anchor_confidence": torch.rand(20, generator=rng),
        "positive_confidence": torch.rand(20, generator=rng),
    }


def functional_loss(backend: str, dtype: torch.dtype, **changes: Any) -> Tensor:
    return directional_contrastive_loss(**{**rows(dtype), **changes}, backend=backend)


@pytest.mark.parametrize("scale", [1e18, 1e20])
@pytest.mark.parametrize("name", ["anchors", "negatives"])
def test_features_that_overflow_are_not_taken_for_zero(name: str, scale: float) -> None:
    given = rows(torch.float32)
    loss = directional_contrastive_loss(**given)
    changed = directional_contrastive_loss(**{**given, name: scale * given[name]})
    torch.testing.assert_close(
        changed, loss if scale < 1e19 else torch.tensor(math.nan), equal_nan=True
    )


@pytest.mark.parametrize("backend", ["reference", "eager", "auto"])
def test_function_equals_a_loop(backend: str) -> None:
    given = rows()
    a, p, n, y, z, c, other = (tensor.tolist() for tensor in given.values())
    expected = []
    for i in range(20):
        if not (c[i] < other[i] and other[i] > 0.4):
            expected.append(0.0)
            continue
        r = math.exp(cosine(a[i], p[i]) / 0.2)
        total = sum(
            math.exp(cosine(a[i], n[j]) / 0.2) for j in range(40) if z[j] >= 0 and z[j] != y[i]
        )
        expected.append(-math.log(r / (r + total)))
    active = sum(value > 0 for value in expected)
    assert 0 < active < 20
    for reduction, value in (
        ("none", expected),
        ("sum", sum(expected)),
        ("mean", sum(expected) / 20),
        ("active_mean", sum(expected) / active),
    ):
        found = directional_contrastive_loss(
            **given, temperature=0.2, threshold=0.4, reduction=reduction, backend=backend
        )
        assert found.tolist() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradient_is_right_and_only_for_anchors(backend: str) -> None:
    given = rows()
    others = ("positives", "anchor_confidence", "positive_confidence")
    for name in others:
        given[name].requires_grad_()
    anchors = given.pop("anchors").requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return directional_contrastive_loss(x, **given, threshold=0.3, backend=backend)

    torch.autograd.gradcheck(loss, anchors, atol=1e-7)
    loss(anchors).backward()
    assert anchors.grad.any()
    assert all(given[name].grad is None for name in others)


def test_upstream_gradient_scales_rows() -> None:
    given = rows()
    anchors = given.pop("anchors").requires_grad_()
    loss = directional_contrastive_loss(anchors, **given, threshold=0.0, reduction="none")
    weight = torch.rand(20, dtype=torch.float64)
    (weighted,) = torch.autograd.grad(loss, anchors, weight, retain_graph=True)
    (plain,) = torch.autograd.grad(loss.sum(), anchors)
    torch.testing.assert_close(weighted, plain * weight[:, None])


def test_ties_and_threshold_are_strict() -> None:
    given = rows()
    given["anchor_labels"].zero_()
    given["negative_labels"].fill_(1)
    given["anchor_confidence"] = torch.tensor([0.5, 0.8, 0.79, 0.9]).repeat(5)
    given["positive_confidence"] = torch.tensor([0.75, 0.8, 0.8, 0.8]).repeat(5)
    loss = directional_contrastive_loss(**given, threshold=0.75, reduction="none")
    assert (loss > 0).tolist() == [False, False, True, False] * 5


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("negatives", [0, 40])
def test_no_admitted_negative_is_zero(backend: str, negatives: int) -> None:
    given = rows()
    given["negatives"] = given["negatives"][:negatives]
    given["negative_labels"] = torch.tensor([-1, 2] * 20)[:negatives]
    given["anchor_labels"].fill_(2)
    anchors = given.pop("anchors").requires_grad_()
    loss = directional_contrastive_loss(anchors, **given, threshold=0.0, backend=backend)
    loss.backward()
    assert loss == 0
    assert not anchors.grad.any()


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "active_mean", "sum", "none"])
def test_no_active_anchor_is_zero_and_empty_input_too(backend: str, reduction: str) -> None:
    for count in (20, 0):
        given = rows()
        given = {k: v if k.startswith("negative") else v[:count] for k, v in given.items()}
        given["anchors"].requires_grad_()
        loss = directional_contrastive_loss(
            **given, threshold=1.0, reduction=reduction, backend=backend
        ).sum()
        loss.backward()
        assert loss == 0
        assert not given["anchors"].grad.any()


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_small_loss_is_exact_in_float32(backend: str) -> None:
    # cos(a, p) = 1, cos(a, n) = -1: e^{-2/tau} = e^{-40} is lost against 1, not against 0.
    a, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    loss = directional_contrastive_loss(
        a, a, -a, label, label + 1, torch.zeros(1), torch.ones(1), temperature=0.05, backend=backend
    )
    assert loss.item() == pytest.approx(math.exp(-40), rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_large_loss_does_not_overflow(backend: str) -> None:
    # e^{2/tau} = e^{2000} is far outside of float64.
    a, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    for dtype in (torch.float32, torch.float64):
        x = a.to(dtype, copy=True).requires_grad_()
        loss = directional_contrastive_loss(
            x, -a.to(dtype), a.to(dtype), label, label + 1, torch.zeros(1), torch.ones(1),
            temperature=0.001, backend=backend,
        )  # fmt: skip
        loss.backward()
        assert loss.item() == pytest.approx(2000, rel=1e-6)
        assert x.grad.isfinite().all()


def test_running_maximum_starts_at_the_first_admitted_negative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Anchors of label 0 meet whole tiles of label 0 first; their other logits are all -1/tau.
    monkeypatch.setattr(eager, "_CPU_TILE", (8, 2))
    a = torch.tensor([[1.0, 0.0]]).repeat(2, 1)
    negative_labels = torch.tensor([0] * 10 + [1] * 10)
    active = torch.ones(2, dtype=torch.bool)
    given = (a, -a, -a[:1].repeat(20, 1), torch.tensor([0, 1]), negative_labels, active, 0.001)
    loss, _ = ops.dc_loss_rows(*given, "eager")
    assert loss.tolist() == pytest.approx([math.log(11)] * 2, rel=1e-4)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_zero_feature_has_no_direction_and_no_gradient(backend: str) -> None:
    given = rows()
    given["anchors"][3:6] = 0
    given["positives"][7] = 0
    given["negatives"][2] = 0
    anchors = given.pop("anchors").requires_grad_()
    loss = directional_contrastive_loss(anchors, **given, threshold=0.0, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert anchors.grad.isfinite().all()
    assert not anchors.grad[3:6].any()


def test_scale_of_features_does_not_matter() -> None:
    given = rows()
    scaled = {
        k: v * 7 if k in ("anchors", "positives", "negatives") else v for k, v in given.items()
    }
    loss = [directional_contrastive_loss(**x, threshold=0.0) for x in (given, scaled)]
    torch.testing.assert_close(*loss)


def test_negatives_that_require_grad_are_refused() -> None:
    given = rows()
    given["negatives"].requires_grad_()
    with pytest.raises(ValueError, match=r"negatives must not require grad.*detach"):
        directional_contrastive_loss(**given)


def test_bound_of_the_labels() -> None:
    given = rows()
    losses = [directional_contrastive_loss(**given, classes=classes) for classes in (None, 3)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match=r"_labels must lie below classes, 2"):
        directional_contrastive_loss(**given, classes=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("anchors", torch.zeros(20)),
        ("anchors", torch.zeros(20, 5).long()),
        ("positives", torch.zeros(19, 5)),
        ("positives", torch.zeros(20, 5).long()),
        ("negatives", torch.zeros(40, 6)),
        ("negatives", torch.zeros(40)),
        ("negatives", torch.zeros(40, 5).long()),
        ("anchor_labels", torch.zeros(19).long()),
        ("anchor_labels", torch.zeros(20)),
        ("negative_labels", torch.zeros(40, 1).long()),
        ("negative_labels", torch.zeros(40).bool()),
        ("anchor_confidence", torch.zeros(1)),
        ("anchor_confidence", torch.zeros(20).long()),
        ("positive_confidence", torch.zeros(21)),
        ("positive_confidence", torch.zeros(20).bool()),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("threshold", -0.1),
        ("threshold", 1.1),
        ("threshold", math.nan),
        ("reduction", "average"),
        ("classes", 0),
        ("backend", "numpy"),
        ("backend", "cuda"),
    ],
)
def test_bad_argument_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        directional_contrastive_loss(**{**rows(), name: value})


def test_backends_say_what_there_is() -> None:
    found = backends()
    paths = ["triton", "triton:gluon", "cuda", "cuda:sm_90a"]
    assert list(found) == ["reference", "eager", "cpp", *paths]
    assert found["reference"] is None
    assert found["eager"] is None
