"""Eq. 1-8 of the paper in float64 scalars, one at a time: what the loss is tested against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cac_fast import Overlap

# Images, channels, classes and cells of the batch that the equations are evaluated on.
B, D, K, H, W = 3, 3, 3, 3, 4
CELLS = H * W


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
    """Eq. 1-8 in float64 scalars, no vectorization; the options change what their names say."""

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
