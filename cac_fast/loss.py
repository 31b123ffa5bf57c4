"""The directional contrastive loss (Eq. 1-8): cosine, masks and reduction above the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cac_fast.backend import check_backend
from cac_fast.bank import FeatureBank
from cac_fast.checks import (
    check_choice,
    check_constant,
    check_features,
    check_rows,
    check_temperature,
    check_threshold,
    check_views,
)
from cac_fast.negatives import false_negatives
from cac_fast.ops import dc_loss_rows
from cac_fast.overlap import Overlap

_REDUCTIONS = ("mean", "active_mean", "sum", "none")
_NORMALIZATIONS = ("image", "active")


def directional_contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    anchor_labels: Tensor,
    negative_labels: Tensor,
    anchor_confidence: Tensor,
    positive_confidence: Tensor,
    temperature: float = 0.1,
    threshold: float = 0.75,
    reduction: str = "mean",
    backend: str = "auto",
    classes: int | None = None,
) -> Tensor:
    """Loss of A anchors against their positives and M shared negatives (Eq. 7, one direction).

    anchors, positives: (A, D), negatives: (M, D), raw features; the cosine is taken here.
    anchor_labels (A,), negative_labels (M,): integers; negatives of the anchor's own label are
        left out, and those with a label below 0 always.
    anchor_confidence, positive_confidence: (A,) in [0, 1]. An anchor is active if its positive is
        more confident than itself and than `threshold`, both strictly; the others have loss 0.
    reduction: "mean" over all A, "active_mean" over the active ones (0 if none), "sum", or "none".
    backend: "auto" or a name from `cac_fast.backends()`.
    classes: if given, all labels lie below it, so that a GPU sorts them in fewer bytes. A label
        that does not is an error where it can be found without waiting for the device, and may
        count as one below 0 elsewhere (see `cac_fast.ops.dc_loss_rows`).

    Returns a scalar, or (A,) for "none", in float32 (float64 for float64 anchors). Products are
    taken of values in the anchors' dtype, or autocast's. The gradient goes to `anchors` alone;
    positives and confidences are taken as constants.

    Raises:
        ValueError: wrong shapes, dtypes, devices or choices, or negatives that require grad.

    >>> features, labels, confidence = torch.eye(2), torch.tensor([0, 1]), torch.full((2,), 0.5)
    >>> loss = directional_contrastive_loss(
    ...     features, features, -features, labels, labels, confidence, confidence + 0.4
    ... )
    >>> round(loss.item(), 7)  # log(1 + e^-10)
    4.54e-05
    """
    # The operator checks temperature, back end and classes.
    check_choice("reduction", reduction, _REDUCTIONS)
    check_threshold(threshold)
    labels = (anchor_labels, negative_labels)
    check_features(anchors, positives, negatives, *labels)
    for name, confidence in (
        ("anchor_confidence", anchor_confidence),
        ("positive_confidence", positive_confidence),
    ):
        check_rows(name, confidence, anchors.shape[:1], "floating point", anchors.device)
    check_constant("negatives", negatives)
    active = _active(anchor_confidence, positive_confidence, threshold, directional=True)
    features = (_unit(x).to(anchors.dtype) for x in (anchors, positives.detach(), negatives))
    loss, _ = dc_loss_rows(*features, *labels, active, temperature, backend, classes)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "active_mean":
        return loss.sum() / active.sum().clamp_min(1)
    return loss.sum() / max(1, loss.shape[0])


@dataclass(frozen=True)
class DCLossOutput:
    """What `DirectionalContrastiveLoss` returns; scalar tensors on the features' device.

    loss: with a graph, even if no anchor is active.
    active: number of active anchors, both directions.
    pairs: overlap locations.
    negatives: those that can be admitted, of the rows that the loss meets: all that the bank holds,
        over ranks and steps, or `max_negatives` of them.
    positive_cosine: mean cosine of the pairs, 0 without pairs.
    false_negatives: share, among the admitted pairs of active anchor and negative of this rank and
        step, of those of one true class (Fig. 6); None without truth, as are the three below.
    false_negatives_random: the same among all pairs, as if no label left any out.
    admitted_pairs, random_pairs: how many pairs each share is of.

    >>> DCLossOutput(*torch.ones(5), false_negatives=None).loss
    tensor(1.)
    """

    loss: Tensor
    active: Tensor
    pairs: Tensor
    negatives: Tensor
    positive_cosine: Tensor
    false_negatives: Tensor | None
    false_negatives_random: Tensor | None = None
    admitted_pairs: Tensor | None = None
    random_pairs: Tensor | None = None


class DirectionalContrastiveLoss(nn.Module):
    """Both directions of the loss over the two views of a batch of images (Eq. 8).

    temperature: tau.
    threshold: gamma; 0 switches positive filtering off.
    normalization: "image" divides each image's loss by its overlap locations and takes the mean
        over all images (the paper); "active" divides each direction by the active anchors
        of the batch (the authors' code).
    bank: negatives of past steps and other ranks; without one, those of this batch and rank.
    directional, contrastive, negative_sampling: switches of Table 3. Off, they mean: both
        directions are always active; squared l2 distance of each active pair instead of the
        contrast; all negatives but those of the anchor's own image location.
    negatives_per_view: so many random locations of each view are negatives (all if there are
        fewer); None: all.
    max_negatives: the loss meets a random subset of the bank, of so many rows: its products stay as
        many as ranks and steps are added. With N of M rows drawn, the sum over the negatives in
        Eq. 5 is M/N times that over the drawn ones, an unbiased estimate of it; the loss, as its
        logarithm, is on average a little below that of all negatives, by less the larger N.
        None: all.
    seed: from which, and from the number of pushes, that subset is drawn.
    backend: "auto" or a name from `cac_fast.backends()`. What "auto" takes may differ between
        ranks, by rounding alone; after `cac_fast.settle_backend` on all of them it does not.

    Raises:
        ValueError: bad choices.

    >>> inside, no = torch.tensor([[2, 2]]), torch.tensor([False])
    >>> overlap = overlap_from_crops(torch.tensor([[0, 1]]), no, no, inside, inside, size=(2, 2))
    >>> features, logits = torch.randn(2, 1, 8, 2, 2), torch.randn(2, 1, 5, 2, 2)
    >>> output = DirectionalContrastiveLoss(threshold=0.2)(*features, *logits, overlap)
    >>> output.loss.shape, int(output.pairs)
    (torch.Size([]), 2)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        threshold: float = 0.75,
        normalization: str = "image",
        bank: FeatureBank | None = None,
        directional: bool = True,
        contrastive: bool = True,
        negative_sampling: bool = True,
        negatives_per_view: int | None = None,
        max_negatives: int | None = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_threshold(threshold)
        check_choice("normalization", normalization, _NORMALIZATIONS)
        if negatives_per_view is not None and negatives_per_view < 1:
            raise ValueError(f"negatives_per_view must be at least 1, not {negatives_per_view}")
        if max_negatives is not None and (max_negatives < 1 or bank is None):
            raise ValueError(f"max_negatives ({max_negatives}) must be at least 1 and needs a bank")
        check_backend(backend)
        self.temperature = temperature
        self.threshold = threshold
        self.normalization = normalization
        self.bank = bank
        self.directional = directional
        self.contrastive = contrastive
        self.negative_sampling = negative_sampling
        self.negatives_per_view = negatives_per_view
        self.max_negatives = max_negatives
        self.seed = seed
        self.backend = backend

    def forward(
        self,
        features1: Tensor,
        features2: Tensor,
        logits1: Tensor,
        logits2: Tensor,
        overlap: Overlap,
        truth: tuple[Tensor, Tensor] | None = None,
    ) -> DCLossOutput:
        """Loss of one batch: `start`, and at once what it returns.

        features1, features2: (B, D, h, w) raw projector outputs of the two views.
        logits1, logits2: (B, K, h, w) class logits, constants here.
        overlap: which cells pair.
        truth: two (B, h, w) int64 true labels from 0 to 255, 255 where unknown, for
            the false negatives alone.

        The loss is a float32 (float64 for float64 features); the products inside are taken in the
        features' dtype, or autocast's. With a bank all ranks must call this together.

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        return self.start(features1, features2, logits1, logits2, overlap, truth)()

    def start(
        self,
        features1: Tensor,
        features2: Tensor,
        logits1: Tensor,
        logits2: Tensor,
        overlap: Overlap,
        truth: tuple[Tensor, Tensor] | None = None,
    ) -> Callable[[], DCLossOutput]:
        """Send the batch's negatives to the other ranks; return what computes the loss of them all.

        Arguments and errors as for `forward`. What runs in between overlaps with the gather. The
        returned function raises RuntimeError where another batch has been pushed meanwhile.
        """
        check_views(features1, features2, logits1, logits2, overlap, truth)
        # One row per cell: view 1's B*h*w, then view 2's. Rows without a partner are inactive, so
        # that shapes never depend on the data.
        anchors = _unit(torch.cat((_cells(features1), _cells(features2))))
        confidence, labels = _confidence(torch.cat((_cells(logits1), _cells(logits2))))
        partner, paired = _partner_rows(overlap)
        constants = anchors.detach()
        positives = constants[partner]
        active = paired & _active(confidence, confidence[partner], self.threshold, self.directional)

        # Location ids have no such bound.
        classes = logits1.shape[1] if self.negative_sampling else None
        pool, measured = None, {"false_negatives": None}
        if self.contrastive:
            chosen, usable = self._choose(overlap)
            if not self.negative_sampling:
                labels = _location_ids(partner, paired)
            if truth is not None:
                true = torch.cat([t.flatten() for t in truth]).long()
                measured = false_negatives(true, labels, active, chosen, usable)
            if not self.negative_sampling and self.bank is not None:
                # Ids of other ranks and steps meet these in the bank.
                labels = labels + (self.bank.push_id << 32)
            pool = constants[chosen], labels[chosen].masked_fill(~usable, -1)
            if self.bank is not None:
                self.bank.push(*pool)
                pool = None  # its copy in the bank is enough
        pushes = self.bank.pushes if self.bank is not None else 0

        def finish() -> DCLossOutput:
            if self.bank is not None and self.bank.pushes != pushes:
                raise RuntimeError("the bank has moved on: finish each loss before the next start")
            negatives = active.new_zeros((), dtype=torch.int64)
            if not self.contrastive:
                loss = (anchors - positives).square().sum(1) * active
            else:
                against = positives
                if self.max_negatives is None:
                    features, pool_labels = pool or (self.bank.features, self.bank.labels)
                else:
                    features, pool_labels, weight = self.bank.sample(self.max_negatives, self.seed)
                    # Eq. 5 knows sum and positive by their ratio alone: a weight on the sum is as
                    # much off the positive's logit. Along the anchor, as the cosine's Jacobian then
                    # takes what this adds to the gradient away again.
                    against = positives - self.temperature * weight.log() * constants
                loss, _ = dc_loss_rows(
                    anchors.to(features1.dtype),
                    against.to(features1.dtype),
                    features,
                    labels,
                    pool_labels,
                    active,
                    self.temperature,
                    self.backend,
                    classes,
                )
                negatives = (pool_labels >= 0).sum()
            first = paired[: len(paired) // 2]
            cosine = (constants * positives).sum(1)[: len(first)] * first
            return DCLossOutput(
                loss=(loss / self._divisors(active, overlap)).sum(),
                active=active.sum(),
                pairs=first.sum(),
                negatives=negatives,
                positive_cosine=cosine.sum() / first.sum().clamp_min(1),
                **measured,
            )

        return finish

    def _divisors(self, active: Tensor, overlap: Overlap) -> Tensor:
        """(2*B*h*w,) integers that divide the rows' losses."""
        batch, cells = overlap.partner1.shape
        if self.normalization == "image":
            # Images without an overlap have no active row; they still count as images.
            per_image = batch * overlap.counts.clamp_min(1)
            return per_image.repeat(2).unsqueeze(1).expand(-1, cells).flatten()
        per_direction = active.view(2, -1).sum(1, keepdim=True).clamp_min(1)
        return per_direction.expand(-1, batch * cells).flatten()

    def _choose(self, overlap: Overlap) -> tuple[Tensor, Tensor]:
        """Rows that serve as negatives, and whether each lies on the image."""
        valid = torch.cat((overlap.valid1.flatten(), overlap.valid2.flatten()))
        cells = len(valid) // 2
        if self.negatives_per_view is None or self.negatives_per_view >= cells:
            rows = torch.arange(len(valid), device=valid.device)
        else:
            drawn = [torch.randperm(cells, device=valid.device) for _ in range(2)]
            rows = torch.cat(
                [view * cells + rows[: self.negatives_per_view] for view, rows in enumerate(drawn)]
            )
        return rows, valid[rows]


def _location_ids(partner: Tensor, paired: Tensor) -> Tensor:
    """(2*B*h*w,) one number per image location of the batch, shared by the two cells of a pair."""
    rows = torch.arange(len(partner), device=partner.device)
    return torch.where(paired, torch.minimum(rows, partner), rows)


def _cells(maps: Tensor) -> Tensor:
    """(B, C, h, w) to (B*h*w, C) in at least float32."""
    flat = maps.permute(0, 2, 3, 1).flatten(0, 2)
    return flat.to(torch.promote_types(maps.dtype, torch.float32))


def _unit(features: Tensor) -> Tensor:
    """Rows of unit norm, in at least float32. A row of zeros has no direction: it stays 0 and gets
    no gradient. One whose norm overflows becomes NaN, as a network that diverges must not go on
    with rows of 0."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=dtype)
    norm = norm.masked_fill(norm.isinf(), torch.nan).masked_fill(norm < 1e-12, torch.inf)
    return features / norm


@torch.no_grad()
def _confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest softmax probability and its class, per row."""
    return torch.softmax(logits, dim=1).max(dim=1)


def _active(
    confidence: Tensor, positive_confidence: Tensor, threshold: float, directional: bool
) -> Tensor:
    """The mask of Eq. 7, M_d,pf."""
    active = positive_confidence > threshold
    return active & (confidence < positive_confidence) if directional else active


def _partner_rows(overlap: Overlap) -> tuple[Tensor, Tensor]:
    """Row of each row's partner in the other view (0 if none), and whether there is one."""
    batch, cells = overlap.partner1.shape
    partner = torch.cat((overlap.partner1, overlap.partner2))
    image = torch.arange(batch, device=partner.device)
    start = torch.cat((image + batch, image)).unsqueeze(1) * cells
    paired = partner >= 0
    return torch.where(paired, start + partner, 0).flatten(), paired.flatten()
