"""The rows of the loss bench: sizes, labels, operands, and what a right result is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import baselines
import torch
from torch import Tensor
from torch.nn.functional import normalize

import cac_fast.operands
from cac_fast.backend import reference

TEMPERATURE = 0.1
CHECKED_ROWS = 256

# Share of each class among the pixels. voc: 21 classes, background 0.73, the rest alike.
# cityscapes: the 19 trainIds in the labeled train images, as published with the class weights of
# DANNet (CVPR 2021). disjoint: no negative has an anchor's label, so every pair is admitted.
LABELS = {
    "uniform": [1 / 21] * 21,
    "voc": [0.73] + [0.27 / 20] * 20,
    "cityscapes": [
        *(0.36869696, 0.06084986, 0.22824049, 0.00655399, 0.00877272, 0.01227341, 0.00207795),
        *(0.0055127, 0.15928651, 0.01157818, 0.04018982, 0.01218957, 0.00135122, 0.06994545),
        *(0.00267456, 0.00235192, 0.00232904, 0.00098658, 0.00413907),
    ],
    "disjoint": [1.0],
}

# Relative to the norm; the paper's temperature is large enough for the smaller of its two parts.
FLOAT32_ERROR = max(1e-6, 1e-7 / TEMPERATURE)


@dataclass(frozen=True)
class Case:
    """One direction of the loss: A anchors, of which `share` are active, against M negatives."""

    name: str
    anchors: int
    negatives: int
    labels: str
    dtype: str
    share: float = 1 / 3
    channels: int = 128

    @property
    def pairs(self) -> int:
        return self.anchors * self.negatives

    @property
    def bytes(self) -> int:
        """Of the features, in their dtype."""
        rows = 2 * self.anchors + self.negatives
        return rows * self.channels * getattr(torch, self.dtype).itemsize

    def __str__(self) -> str:
        size = f"A {self.anchors:,} (active {round(self.share * self.anchors):,}), "
        return f"{self.name}: {size}M {self.negatives:,}, {self.labels} labels, {self.dtype}"


class Operands(cac_fast.operands.Operands):
    """The operands of a back end."""

    @property
    def admitted(self) -> int:
        """Pairs of an active anchor and a negative that it admits."""
        classes = int(max(self.anchor_labels.max(), self.negative_labels.max())) + 1
        rows = self.anchor_labels[self.active].bincount(minlength=classes)
        columns = self.negative_labels.bincount(minlength=classes)
        return int(rows.sum() * columns.sum() - (rows * columns).sum())


def standard_cases(device: str) -> list[Case]:
    """The goals, the paper's Table 4, its Cityscapes setting, on to M = 1M; the goal's variants.

    In the order of what must not be missed when time runs out.
    """
    main, other = ("bfloat16", "float32") if device == "cuda" else ("float32", "bfloat16")
    goal = Case("goal", 8192, 65536, "voc", main)
    dense = Case("dense labels", 16384, 131072, "disjoint", main, share=1.0)
    table = [500, 1000, 2000, 6400, 12800, 19200, 25600]
    return [
        *([dense] if device == "cuda" else []),
        goal,
        replace(goal, dtype=other),
        *(replace(goal, name="Table 4", negatives=m) for m in table),
        Case("Cityscapes", 16200, 129600, "cityscapes", main),
        *(replace(goal, name="large", negatives=m) for m in (2**18, 2**20)),
        *(replace(goal, name="labels", labels=labels) for labels in ("uniform", "cityscapes")),
    ]


def make_operands(case: Case, device: torch.device) -> Operands:
    """Unit features around one center a class, positives beside their anchors; always the same."""
    rng = torch.Generator(device).manual_seed(0)
    shares = torch.tensor(LABELS[case.labels], device=device)

    def noise(rows: int) -> Tensor:
        """Of norm 1 on average."""
        size = (rows, case.channels)
        return torch.randn(size, generator=rng, device=device).div_(case.channels**0.5)

    def labels(rows: int) -> Tensor:
        return shares.multinomial(rows, replacement=True, generator=rng)

    dtype = getattr(torch, case.dtype)
    anchor_labels, negative_labels = labels(case.anchors), labels(case.negatives)
    if case.labels == "disjoint":
        negative_labels += 1
    centers = normalize(noise(len(shares) + 1), dim=1)
    anchors = normalize(noise(case.anchors).add_(centers[anchor_labels]), dim=1)
    positives = normalize(anchors + 0.5 * noise(case.anchors), dim=1)
    negatives = normalize(noise(case.negatives).add_(centers[negative_labels]), dim=1)
    order = torch.randperm(case.anchors, generator=rng, device=device)
    return Operands(
        anchors.to(dtype),
        positives.to(dtype),
        negatives.to(dtype),
        anchor_labels,
        negative_labels,
        order < round(case.share * case.anchors),
        TEMPERATURE,
    )


class Check:
    """Compares results with the reference in float64, on 256 random active rows.

    float32: relative errors up to 1e-6, and 1e-6 absolute in a loss. bfloat16 and float16: up to
    1.5 times the errors of `baselines.dense` in the same dtype, and cosine of the gradients above
    0.9999. The loss must be float32, the gradient of the features' dtype, all rows finite, and
    those that are not active exactly 0.
    """

    def __init__(self, operands: Operands) -> None:
        self.inactive = ~operands.active
        self.dtypes = (torch.float32, operands.anchors.dtype)
        rng = torch.Generator().manual_seed(0)
        rows = operands.active.nonzero().squeeze(1)
        self.rows = rows[torch.randperm(len(rows), generator=rng)[:CHECKED_ROWS].to(rows.device)]
        some = operands.rows(self.rows)
        exact = some.to(torch.float64)
        # A few rows at a time, as the reference is dense.
        parts = [
            reference.dc_loss_rows(exact.rows(part))
            for part in torch.arange(len(self.rows), device=rows.device).split(16)
        ]
        self.expected = [torch.cat(part) for part in zip(*parts, strict=True)]
        if operands.anchors.dtype.itemsize == 2:
            self.allowed = [1.5 * error for error in self._errors(baselines.dense(*some))]
        else:
            self.allowed = [FLOAT32_ERROR * float(theirs.norm()) for theirs in self.expected]
        self.allowed[0] += 1e-6 * len(self.rows) ** 0.5

    def _errors(self, results: tuple[Tensor, Tensor]) -> list[float]:
        return [
            float((mine.double() - theirs).norm())
            for mine, theirs in zip(results, self.expected, strict=True)
        ]

    def problem(self, results: tuple[Tensor, Tensor], slack: float = 1.0) -> str | None:
        """What is wrong with loss (A,) and gradient (A, D) of all rows; None where nothing is.

        slack: factor on the allowed errors.
        """
        for name, values, dtype in zip(("loss", "gradient"), results, self.dtypes, strict=True):
            if values.dtype != dtype:
                return f"{name} is {values.dtype}, not {dtype}"
            if not values.isfinite().all():
                return f"{name} is not finite"
            if values[self.inactive].any():
                return f"{name} of an inactive anchor is not 0"
        found = (results[0][self.rows], results[1][self.rows])
        errors = self._errors(found)
        for name, error, limit in zip(("loss", "gradient"), errors, self.allowed, strict=True):
            allowed = slack * limit
            if error > allowed:
                return f"error of the {name} {error:.2g}, allowed {allowed:.2g}"
        flat = [gradient.double().flatten() for gradient in (found[1], self.expected[1])]
        if torch.cosine_similarity(*flat, dim=0) <= 0.9999:
            return "direction of the gradient"
        return None
