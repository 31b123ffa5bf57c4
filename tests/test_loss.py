"""The loss against the paper's equations, its back ends against each other, and its interface."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cac_fast import (
    DirectionalContrastiveLoss,
    FeatureBank,
    Overlap,
    backends,
    directional_contrastive_loss,
    eager,
    ops,
    overlap_from_crops,
)

B, D, K, H, W = 3, 3, 3, 3, 4
CELLS = H * W


# ---- the paper's equations, one scalar at a time -------------------------------------------------


def cosine(u: list, v: list) -> Any:
    """s(u, v); lists of numbers or of scalar tensors."""
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    norm_u = sum(a * a for a in u) ** 0.5
    norm_v = sum(b * b for b in v) ** 0.5
    return dot / (norm_u * norm_v)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


class PaperLoss:
    """Eq. 1-8 in float64 scalars, no vectorisation; the options change what their names say."""

    def __init__(
        self,
        features: tuple[Tensor, Tensor],
        logits: tuple[Tensor, Tensor],
        overlap: Overlap,
        temperature: float = 0.1,
        threshold: float = 0.75,
        directional: bool = True,
        contrastive: bool = True,
        negative_sampling: bool = True,
        past: tuple[tuple[list[float], int], ...] = (),
    ) -> None:
        self.features = features
        self.temperature, self.threshold = temperature, threshold
        self.directional, self.contrastive = directional, contrastive
        self.negative_sampling = negative_sampling
        self.past = past
        self.partner = (overlap.partner1.tolist(), overlap.partner2.tolist())
        self.valid = (overlap.valid1.tolist(), overlap.valid2.tolist())
        self.constant = [f.detach().flatten(2).transpose(1, 2).tolist() for f in features]
        probabilities = [
            [
                [softmax(cell) for cell in image]
                for image in view.flatten(2).transpose(1, 2).tolist()
            ]
            for view in logits
        ]
        self.confidence = [[[max(p) for p in image] for image in v] for v in probabilities]
        # Eq. 4
        self.label = [[[p.index(max(p)) for p in image] for image in v] for v in probabilities]

    def anchor(self, view: int, b: int, i: int) -> list[Tensor]:
        """The one place where a gradient enters."""
        return [self.features[view][b, channel, i // W, i % W] for channel in range(D)]

    def mask(self, view: int, b: int, i: int) -> bool:
        """M_d,pf of Eq. 2 and 7."""
        j = self.partner[view][b][i]
        mine, other = self.confidence[view][b][i], self.confidence[1 - view][b][j]
        return (mine < other or not self.directional) and other > self.threshold

    def admitted(self, view: int, b: int, i: int) -> list[list[float]]:
        """F_u with M_n,1 of Eq. 5; or all but what shows the anchor's own location."""
        found = []
        for other in range(2):
            for image in range(B):
                for j in range(CELLS):
                    if not self.valid[other][image][j]:
                        continue
                    if self.negative_sampling:
                        skip = self.label[other][image][j] == self.label[view][b][i]
                    elif other == view:
                        skip = (image, j) == (b, i)
                    else:
                        skip = image == b and self.partner[view][b][i] == j
                    if not skip:
                        found.append(self.constant[other][image][j])
        for feature, label in self.past:
            if not self.negative_sampling or label != self.label[view][b][i]:
                found.append(feature)
        return found

    def term(self, view: int, b: int, i: int) -> Any:
        anchor = self.anchor(view, b, i)
        positive = self.constant[1 - view][b][self.partner[view][b][i]]
        if not self.contrastive:
            return 2 - 2 * cosine(anchor, positive)
        r = torch.exp(cosine(anchor, positive) / self.temperature)
        negatives = self.admitted(view, b, i)
        total = sum(torch.exp(cosine(anchor, n) / self.temperature) for n in negatives)
        return torch.log(r + total) - torch.log(r)

    def terms(self, view: int, b: int) -> list:
        """The active terms of l_dc^b in one direction (Eq. 6, before 1/N)."""
        cells = [i for i in range(CELLS) if self.partner[view][b][i] >= 0]
        return [self.term(view, b, i) for i in cells if self.mask(view, b, i)]

    def paper(self) -> Any:
        """Eq. 8: mean over the images of 1/N times the sum, both directions."""
        loss = 0.0
        for b in range(B):
            n = sum(j >= 0 for j in self.partner[0][b])
            for view in range(2):
                loss = loss + sum(self.terms(view, b)) / max(1, n) / B
        return loss

    def authors(self) -> Any:
        """Each direction over its active anchors in the whole batch, then added."""
        loss = 0.0
        for view in range(2):
            terms = [term for b in range(B) for term in self.terms(view, b)]
            loss = loss + sum(terms) / max(1, len(terms))
        return loss


def make_batch(seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Overlap]:
    """Three images: flips and padding; another offset; no overlap at all."""
    rng = torch.Generator().manual_seed(seed)

    def draw(channels: int, scale: float) -> Tensor:
        return scale * torch.randn(B, channels, H, W, generator=rng, dtype=torch.float64)

    overlap = overlap_from_crops(
        offset=torch.tensor([[0, 1], [-1, 0], [H, 0]]),
        flip1=torch.tensor([True, False, False]),
        flip2=torch.tensor([False, False, True]),
        valid1=torch.tensor([[H, W], [2, W], [H, W]]),
        valid2=torch.tensor([[H, 3], [3, W], [0, W]]),
        size=(H, W),
    )
    features = (draw(D, 2.0).requires_grad_(), draw(D, 2.0).requires_grad_())
    return features, (draw(K, 3.0), draw(K, 3.0)), overlap


def gradients(loss: Tensor, features: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack(torch.autograd.grad(loss, features))


OPTIONS = {
    "paper": {},
    "no positive filtering": {"threshold": 0.0},
    "not directional": {"directional": False},
    "not contrastive": {"contrastive": False},
    "no negative sampling": {"negative_sampling": False},
    "experiment III": {"negative_sampling": False, "threshold": 0.0},
    "experiment II": {"negative_sampling": False, "threshold": 0.0, "directional": False},
    "other numbers": {"temperature": 0.5, "threshold": 0.9},
    # e^{1/tau} is near the end of float64's range: the running maximum is needed.
    "small temperature": {"temperature": 0.0015},
}


@pytest.mark.parametrize("normalization", ["image", "active"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_module_equals_the_paper(options: dict, normalization: str) -> None:
    features, logits, overlap = make_batch()
    paper = PaperLoss(features, logits, overlap, **options)
    expected = paper.paper() if normalization == "image" else paper.authors()
    expected_gradients = gradients(expected, features)
    assert expected > 0
    for backend in ("reference", "eager"):
        loss = DirectionalContrastiveLoss(normalization=normalization, backend=backend, **options)
        out = loss(*features, *logits, overlap)
        torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=0)
        found = gradients(out.loss, features)
        torch.testing.assert_close(found, expected_gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("negative_sampling", [True, False])
def test_module_with_a_bank_equals_the_paper(negative_sampling: bool) -> None:
    bank = FeatureBank(steps=2, dim=D, dtype=torch.float64)
    loss = DirectionalContrastiveLoss(bank=bank, negative_sampling=negative_sampling)
    past: tuple = ()
    for seed in range(4):
        features, logits, overlap = make_batch(seed)
        paper = PaperLoss(features, logits, overlap, negative_sampling=negative_sampling, past=past)
        out = loss(*features, *logits, overlap)
        torch.testing.assert_close(out.loss, paper.paper(), rtol=1e-11, atol=0)
        current = [
            (paper.constant[v][b][i], paper.label[v][b][i])
            for v in range(2)
            for b in range(B)
            for i in range(CELLS)
            if paper.valid[v][b][i]
        ]
        assert out.negatives == len(current) + len(past)
        past = tuple(current)


# ---- what the module reports ---------------------------------------------------------------------


def test_counts_and_cosine() -> None:
    features, logits, overlap = make_batch()
    paper = PaperLoss(features, logits, overlap)
    pairs = [(b, i, j) for b in range(B) for i, j in enumerate(paper.partner[0][b]) if j >= 0]
    cosines = [cosine(paper.constant[0][b][i], paper.constant[1][b][j]) for b, i, j in pairs]
    active = sum(len(paper.terms(view, b)) for view in range(2) for b in range(B))
    out = DirectionalContrastiveLoss()(*features, *logits, overlap)
    assert out.pairs == len(pairs) == overlap.counts.sum()
    assert out.active == active > 0
    assert out.negatives == sum(sum(map(sum, view)) for view in paper.valid) < 2 * B * CELLS
    assert out.positive_cosine.item() == pytest.approx(sum(cosines) / len(cosines))
    assert not out.positive_cosine.requires_grad
    assert out.false_negatives is None


@pytest.mark.parametrize("negative_sampling", [True, False])
def test_false_negatives_equal_a_count(negative_sampling: bool) -> None:
    features, logits, overlap = make_batch()
    rng = torch.Generator().manual_seed(1)
    truth = tuple(torch.randint(0, 4, (B, H, W), generator=rng) for _ in range(2))
    truth = tuple(t.masked_fill(t == 3, 255) for t in truth)
    loss = DirectionalContrastiveLoss(negative_sampling=negative_sampling)
    out = loss(*features, *logits, overlap, truth=truth)

    paper = PaperLoss(features, logits, overlap, negative_sampling=negative_sampling)
    true = [t.flatten(1).tolist() for t in truth]
    # Negatives are looked up by value: all features differ.
    class_of = {
        tuple(paper.constant[v][b][i]): true[v][b][i]
        for v in range(2)
        for b in range(B)
        for i in range(CELLS)
    }
    same = total = 0
    for v in range(2):
        for b in range(B):
            for i in range(CELLS):
                if paper.partner[v][b][i] < 0 or not paper.mask(v, b, i) or true[v][b][i] == 255:
                    continue
                classes = [class_of[tuple(n)] for n in paper.admitted(v, b, i)]
                total += sum(c != 255 for c in classes)
                same += sum(c == true[v][b][i] for c in classes)
    assert 0 < same < total
    assert out.false_negatives.item() == pytest.approx(same / total)


def test_no_active_anchor_is_zero_with_a_graph() -> None:
    features, logits, overlap = make_batch()
    for options in ({}, {"contrastive": False}, {"normalization": "active"}):
        loss = DirectionalContrastiveLoss(threshold=1.0, **options)
        truth = (torch.zeros(B, H, W).long(),) * 2
        out = loss(*features, *logits, overlap, truth=truth)
        assert out.loss == 0
        assert out.active == 0
        assert torch.equal(gradients(out.loss, features), torch.zeros(2, B, D, H, W).double())
        if out.false_negatives is not None:
            assert out.false_negatives == 0


def test_no_pair_at_all_gives_finite_numbers() -> None:
    features, logits, _ = make_batch()
    nothing = torch.full((B, CELLS), -1)
    outside = torch.zeros(B, CELLS, dtype=torch.bool)
    overlap = Overlap(nothing, nothing, outside, outside)
    out = DirectionalContrastiveLoss()(*features, *logits, overlap)
    assert out.loss == out.pairs == out.negatives == out.positive_cosine == 0
    assert not gradients(out.loss, features).any()


class RecordingBank(FeatureBank):
    def push(self, features: Tensor, labels: Tensor) -> None:
        self.pushed = features
        super().push(features, labels)


def test_negatives_per_view_are_distinct_and_follow_the_seed() -> None:
    features, logits, overlap = make_batch()
    whole = torch.ones(B, CELLS, dtype=torch.bool)
    overlap = Overlap(overlap.partner1, overlap.partner2, whole, whole)
    unit = [
        (f / f.norm(dim=1, keepdim=True)).detach().permute(0, 2, 3, 1).reshape(-1, D)
        for f in features
    ]

    def draw(seed: int, number: int) -> tuple[list[set[int]], Tensor]:
        """Which locations of each view are pushed, and the loss."""
        bank = RecordingBank(1, D, dtype=torch.float64)
        loss = DirectionalContrastiveLoss(bank=bank, negatives_per_view=number)
        torch.manual_seed(seed)
        out = loss(*features, *logits, overlap)
        views = bank.pushed.chunk(2)
        found = [
            {int((row - all_rows).abs().sum(1).argmin()) for row in view}
            for view, all_rows in zip(views, unit, strict=True)
        ]
        assert out.negatives == len(bank.pushed)
        return found, out.loss

    first, again, other = draw(0, 7), draw(0, 7), draw(1, 7)
    assert [len(view) for view in first[0]] == [7, 7]
    assert first == again
    assert first != other
    every = DirectionalContrastiveLoss()(*features, *logits, overlap).loss
    assert draw(0, 1000) == ([set(range(B * CELLS))] * 2, every)


def test_half_precision_and_autocast_give_a_float32_loss() -> None:
    features, logits, overlap = make_batch()
    half = [f.detach().bfloat16().requires_grad_() for f in features]
    single = [f.detach().float().requires_grad_() for f in half]
    expected = DirectionalContrastiveLoss()(*single, *logits, overlap).loss
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = DirectionalContrastiveLoss()(*half, *logits, overlap).loss
        direct = [functional_loss(name, torch.float32) for name in ("reference", "eager")]
    found.backward()
    assert found.dtype == torch.float32
    assert half[0].grad.dtype == torch.bfloat16
    assert found == expected
    assert torch.equal(half[0].grad, single[0].grad.bfloat16())
    assert direct == [functional_loss(name, torch.float32) for name in ("reference", "eager")]


def test_nothing_above_the_operator_waits_for_the_device() -> None:
    # Meta tensors have no values: reading one on the host would raise.
    features, logits, overlap = make_batch()
    truth = (torch.zeros(B, H, W).long().to("meta"),) * 2
    inputs = [t.detach().to("meta") for t in (*features, *logits)]
    for options in ({}, {"negative_sampling": False}, {"normalization": "active"}):
        loss = DirectionalContrastiveLoss(backend="reference", **options)
        assert loss(*inputs, overlap.to("meta"), truth=truth).loss.device.type == "meta"


# ---- the functional interface --------------------------------------------------------------------


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
        ("backend", "numpy"),
        ("backend", "cuda"),
    ],
)
def test_bad_argument_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        directional_contrastive_loss(**{**rows(), name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("threshold", 2.0),
        ("normalization", "pixel"),
        ("negatives_per_view", 0),
        ("backend", "numpy"),
    ],
)
def test_bad_choice_of_the_module_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        DirectionalContrastiveLoss(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("features1", torch.zeros(B, D, CELLS)),
        ("features2", torch.zeros(B, D, H, W + 1)),
        ("features2", torch.zeros(B, D, H, W).long()),
        ("logits1", torch.zeros(B, K, CELLS)),
        ("logits1", torch.zeros(B, K, 2 * H, 2 * W)),
        ("logits2", torch.zeros(B, K + 1, H, W)),
        ("logits2", torch.zeros(B, K, H, W).long()),
        ("partner1", torch.zeros(B, CELLS + 1).long()),
        ("partner2", torch.zeros(1, CELLS).long()),
        ("valid1", torch.zeros(B, H, W).bool()),
        ("valid2", torch.zeros(CELLS).bool()),
        ("truth1", torch.zeros(B, CELLS).long()),
        ("truth2", torch.zeros(B, H, W)),
    ],
)
def test_bad_view_is_named(name: str, value: Tensor) -> None:
    features, logits, overlap = make_batch()
    given = dict(
        zip(("features1", "features2", "logits1", "logits2"), (*features, *logits), strict=True)
    )
    fields = {field: getattr(overlap, field) for field in Overlap.__dataclass_fields__}
    truth = {f"truth{view}": torch.zeros(B, H, W).long() for view in (1, 2)}
    for group in (given, fields, truth):
        if name in group:
            group[name] = value
    with pytest.raises(ValueError, match=name):
        DirectionalContrastiveLoss()(
            **given, overlap=Overlap(**fields), truth=(truth["truth1"], truth["truth2"])
        )


def test_bank_of_other_channels_is_refused() -> None:
    features, logits, overlap = make_batch()
    loss = DirectionalContrastiveLoss(bank=FeatureBank(1, D + 1))
    with pytest.raises(ValueError, match="features"):
        loss(*features, *logits, overlap)


def test_backends_say_what_there_is() -> None:
    found = backends()
    assert list(found) == ["reference", "eager", "cpp", "triton", "cuda"]
    assert found["reference"] is None
    assert found["eager"] is None


# ---- back ends against each other ----------------------------------------------------------------


def voc_labels(count: int, rng: torch.Generator) -> Tensor:
    """21 classes, three quarters of all pixels background."""
    labels = torch.randint(1, 21, (count,), generator=rng)
    return labels.masked_fill(torch.rand(count, generator=rng) < 0.75, 0)


def operands(
    labels: str, dtype: torch.dtype, a: int = 300, m: int = 1000, d: int = 8
) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(3)
    features = [
        torch.nn.functional.normalize(
            torch.randn(n, d, generator=rng, dtype=torch.float64), dim=1
        ).to(dtype)
        for n in (a, a, m)
    ]
    if labels == "voc":
        anchor_labels, negative_labels = voc_labels(a, rng), voc_labels(m, rng)
    elif labels == "ids":
        anchor_labels, negative_labels = torch.randperm(a, generator=rng), torch.randperm(m)
        anchor_labels = anchor_labels + 2**40
        negative_labels = negative_labels + 2**40
    elif labels == "few":
        anchor_labels = torch.randint(0, 2, (a,), generator=rng)
        negative_labels = torch.randint(-1, 3, (m,), generator=rng)
    else:
        anchor_labels, negative_labels = torch.full((a,), 4), torch.full((m,), 4)
        negative_labels[:2] = torch.tensor([-1, 6])
    empty = torch.rand(m, generator=rng) < 0.1
    active = torch.rand(a, generator=rng) < 0.4
    return (*features, anchor_labels, negative_labels.masked_fill(empty, -1), active)


@pytest.mark.parametrize("tile", [(16, 32), (512, 1024)], ids=["small tile", "large tile"])
@pytest.mark.parametrize("temperature", [0.1, 0.02, 0.0014, 0.0005])
@pytest.mark.parametrize("labels", ["voc", "ids", "few", "one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eager_equals_reference(
    dtype: torch.dtype,
    labels: str,
    temperature: float,
    tile: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eager, "_CPU_TILE", tile)
    given = operands(labels, dtype)
    expected = ops.dc_loss_rows(*given, temperature, "reference")
    found = ops.dc_loss_rows(*given, temperature, "eager")
    inactive = ~given[-1]
    # Rounding of a logit of size 1/tau is rounding of the weights.
    tolerance = max(10, 1 / temperature) * torch.finfo(dtype).eps
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert mine.isfinite().all()
        assert theirs.any()
        assert not mine[inactive].any()
        assert not theirs[inactive].any()
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_eager_takes_labels_of_any_integer_type_and_coarser_negatives() -> None:
    a, p, n, y, z, active = operands("voc", torch.float32)
    n = n.bfloat16()
    expected = ops.dc_loss_rows(a, p, n.float(), y, z, active, 0.1, "reference")
    for labels in (y.int(), y.to(torch.uint8)):
        for backend in ("reference", "eager"):
            found = ops.dc_loss_rows(a, p, n, labels, z.to(torch.int16), active, 0.1, backend)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs)


def test_eager_keeps_the_inputs() -> None:
    given = operands("voc", torch.float32)
    before = [tensor.clone() for tensor in given]
    ops.dc_loss_rows(*given, 0.1, "eager")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(given, before, strict=True))


class Watch(TorchDispatchMode):
    """Size of the largest tensor, and rows and pairs of the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.rows = 0
        self.pairs = 0
        self.weighted_pairs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        name = func.overloadpacket
        if name is torch.ops.aten.mm:
            self.rows = max(self.rows, args[0].shape[0])
            self.pairs += args[0].shape[0] * args[1].shape[1]
        elif name in (torch.ops.aten.addmm_, torch.ops.aten.addmm):
            self.weighted_pairs += args[1].numel()
        return out


def test_eager_memory_is_bounded_by_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_CPU_TILE", (32, 64))
    a, m, d = 400, 2000, 2
    *given, active = operands("few", torch.float32, a, m, d)
    for temperature in (0.1, 0.001):
        with Watch() as watch:
            ops.dc_loss_rows(*given, torch.ones_like(active), temperature, "eager")
        # The labels are the largest argument here, 8 bytes each.
        assert watch.largest <= 8 * m
        assert watch.pairs > 0
    with Watch() as watch:
        ops.dc_loss_rows(*given, active, 0.1, "reference")
    assert watch.largest >= 4 * a * m, "the watch sees what a dense back end makes"


def admitted_pairs(labels: Tensor, negative_labels: Tensor, active: Tensor) -> int:
    admitted = (negative_labels >= 0) & (negative_labels != labels[active].unsqueeze(1))
    return int(admitted.sum())


def test_eager_never_computes_excluded_pairs_of_large_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eager, "_CPU_TILE", (32, 64))
    for labels in ("few", "one"):
        given = operands(labels, torch.float32, 400, 2000, 2)
        with Watch() as watch:
            ops.dc_loss_rows(*given, 0.1, "eager")
        assert watch.pairs == watch.weighted_pairs == admitted_pairs(*given[3:])
        assert watch.pairs > 0


def test_eager_gives_half_a_tile_of_one_label_a_tile_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two groups of 16 would fit one tile of 32, at the price of excluded pairs; 50 need two.
    monkeypatch.setattr(eager, "_CPU_TILE", (32, 64))
    *features, _, negative_labels, _ = operands("few", torch.float32, 82, 500, 2)
    labels = torch.tensor([0] * 16 + [1] * 16 + [2] * 50)
    active = torch.ones(82, dtype=torch.bool)
    with Watch() as watch:
        ops.dc_loss_rows(*features, labels, negative_labels, active, 0.1, "eager")
    assert watch.pairs == admitted_pairs(labels, negative_labels, active)
    assert watch.rows <= 32


def test_eager_skips_most_excluded_pairs_on_voc() -> None:
    *given, _ = operands("voc", torch.float32, 2000, 8000, 2)
    active = torch.arange(2000) % 3 == 0
    with Watch() as watch:
        ops.dc_loss_rows(*given, active, 0.1, "eager")
    admitted = admitted_pairs(*given[3:], active)
    assert admitted <= watch.pairs == watch.weighted_pairs <= 1.05 * admitted
    assert watch.pairs < 0.5 * int(active.sum()) * 8000


def test_nothing_is_computed_without_an_active_anchor() -> None:
    *given, active = operands("voc", torch.float32)
    with Watch() as watch:
        loss, gradient = ops.dc_loss_rows(*given, torch.zeros_like(active), 0.1, "eager")
    assert watch.pairs == 0
    assert not loss.any()
    assert not gradient.any()
