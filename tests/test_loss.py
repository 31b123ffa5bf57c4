"""The module of the loss against the paper's equations, and what it reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paper_loss import CELLS, B, D, H, K, PaperLoss, W, cosine
from torch import Tensor

from cac_fast import (
    DirectionalContrastiveLoss,
    FeatureBank,
    Overlap,
    ops,
    overlap_from_crops,
)
from cac_fast import loss as loss_module


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


@pytest.mark.parametrize("negative_sampling", [True, False])
def test_labels_that_are_classes_lie_below_their_number(
    monkeypatch: pytest.MonkeyPatch, negative_sampling: bool
) -> None:
    bounds = []

    def rows(*given: Any) -> tuple[Tensor, Tensor]:
        bounds.append(given[8])
        return ops.dc_loss_rows(*given)

    monkeypatch.setattr(loss_module, "dc_loss_rows", rows)
    features, logits, overlap = make_batch()
    DirectionalContrastiveLoss(negative_sampling=negative_sampling)(*features, *logits, overlap)
    assert bounds == [logits[0].shape[1] if negative_sampling else None]


# ---- what the module reports ---------------------------------------------------------------------


def test_only_the_last_start_can_be_finished() -> None:
    features, logits, overlap = make_batch()
    criterion = DirectionalContrastiveLoss(bank=FeatureBank(1, features[0].shape[1]))
    first = criterion.start(*features, *logits, overlap)
    second = criterion.start(*features, *logits, overlap)
    with pytest.raises(RuntimeError, match="before the next start"):
        first()
    second()


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


class HalfDrawn(FeatureBank):
    """Two steps that hold the same rows; a sample is one of the steps."""

    def sample(self, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.features[:count], self.labels[:count], torch.tensor(2.0)


def test_drawn_negatives_count_for_all() -> None:
    """Loss and gradient are those of all negatives where the drawn ones stand for them exactly."""
    features, logits, overlap = make_batch()
    found = []
    for kind, most in ((FeatureBank, None), (HalfDrawn, 2 * B * CELLS)):
        loss = DirectionalContrastiveLoss(bank=kind(2, D, torch.float64), max_negatives=most)
        loss(*features, *logits, overlap)
        out = loss(*features, *logits, overlap)
        found.append((out.loss, gradients(out.loss, features), out.positive_cosine))
    for whole, drawn in zip(*found, strict=True):
        torch.testing.assert_close(drawn, whole)
    loss = DirectionalContrastiveLoss(bank=FeatureBank(2, D, torch.float64), max_negatives=5)
    assert loss(*features, *logits, overlap).negatives == 5


def test_half_precision_and_autocast_give_a_float32_loss() -> None:
    features, logits, overlap = make_batch()
    half = [f.detach().bfloat16().requires_grad_() for f in features]
    single = [f.detach().float().requires_grad_() for f in half]
    exact = DirectionalContrastiveLoss()(*single, *logits, overlap).loss
    plain = DirectionalContrastiveLoss()(*half, *logits, overlap).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = DirectionalContrastiveLoss()(*single, *logits, overlap).loss
    for loss, given in ((plain, half), (found, single)):
        loss.backward()
        assert loss.dtype == torch.float32
        assert given[0].grad.dtype == given[0].dtype
        # Unit features are rounded to bfloat16: logits of up to 1/tau by 2^-9.
        assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert found == plain != exact


def test_nothing_above_the_operator_waits_for_the_device() -> None:
    # Meta tensors have no values: reading one on the host would raise.
    features, logits, overlap = make_batch()
    truth = (torch.zeros(B, H, W).long().to("meta"),) * 2
    inputs = [t.detach().to("meta") for t in (*features, *logits)]
    for options in ({}, {"negative_sampling": False}, {"normalization": "active"}):
        loss = DirectionalContrastiveLoss(backend="reference", **options)
        assert loss(*inputs, overlap.to("meta"), truth=truth).loss.device.type == "meta"


# ---- bad arguments of the module -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("threshold", 2.0),
        ("normalization", "pixel"),
        ("negatives_per_view", 0),
        ("max_negatives", 9),
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
