"""CAC's contrastive term, for every method whose loss may have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from cac_fast import (
    DirectionalContrastiveLoss,
    FeatureBank,
    Verification,
    VerificationError,
    overlap_from_crops,
    settle_backend,
    verify,
)
from cac_fast.loss import DCLossOutput
from cac_fast.train.config import Config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods.base import Batch, Method, Networks

PROJECTOR_CHANNELS = 128  # paper, Sec. 4.1
FALSE_NEGATIVES = "false_negatives", "false_negatives_random", "admitted_pairs", "random_pairs"
"""What metrics.jsonl says of the negatives where the truth is read."""

Projected = tuple[Tensor, Tensor]
"""Projected features (B, D, h, w) and class logits (B, K, h, w)."""

Finish = Callable[[], DCLossOutput]
"""Waits for the other ranks' negatives, and computes the contrastive loss."""


class ContrastiveMethod(Method):
    """A method whose loss has lambda * L_dc between the two overlapping crops of `views.PAIR`.

    The network's features feed the projector Phi, which this method owns; `config` has the loss's
    settings and the ablation switches of Table 3. The ranks share the negatives, kept in `dtype`.

    contrastive: whether this run has the term; without it there is no projector and no bank.
    """

    reductions: Mapping[str, str] = {
        "active": "sum",
        "pairs": "sum",
        "positive_cosine": "pairs",
        "false_negatives": "admitted_pairs",
        "false_negatives_random": "random_pairs",
        "admitted_pairs": "sum",
        "random_pairs": "sum",
    }

    def __init__(
        self,
        networks: Networks,
        world: World,
        config: Config,
        dtype: torch.dtype,
        contrastive: bool = True,
    ) -> None:
        super().__init__(networks, world, config, dtype)
        self.full_weight, self.ramp = config.loss.dc_weight, config.loss.dc_ramp
        self.warmup = config.num_warmup
        self.joint = config.loss.forward == "joint"
        self.projector: nn.Module = nn.Identity()
        self.bank: FeatureBank | None = None
        if not contrastive:
            return
        channels = self.network.feature_channels
        if config.loss.projector:
            self.projector = nn.Sequential(
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, PROJECTOR_CHANNELS, 1),
            )
            channels = PROJECTOR_CHANNELS
        past = config.loss.bank_past_steps
        self.bank = FeatureBank(1 + past, channels, dtype, world.new_group())
        self.dc_loss = DirectionalContrastiveLoss(
            temperature=config.loss.temperature,
            threshold=config.loss.threshold if config.loss.positive_filtering else 0.0,
            normalization=config.loss.normalization,
            bank=self.bank,
            directional=config.loss.directional,
            contrastive=config.loss.contrastive,
            negative_sampling=config.loss.negative_sampling,
            negatives_per_view=config.loss.negatives_per_view,
            max_negatives=config.loss.max_negatives,
            seed=config.run.seed,
            backend=config.loss.dc_backend,
        )

    @classmethod
    def build(cls, networks: Networks, world: World, config: Config, dtype: torch.dtype) -> Self:
        """Raises InputError if its loss cannot be had here, or is not right on this device."""
        try:
            method = cls(networks, world, config, dtype)
            if method.bank is not None and config.loss.contrastive:
                found = _verified(method.dc_loss, world, dtype)
                method.dc_loss.backend = found.backend
                method.report = (
                    f"loss by back end {found.backend}: gradient {found.gradient_error:.0e} off "
                    f"float64, that of plain PyTorch {found.plain_gradient_error:.0e}"
                )
        except ValueError as error:
            raise InputError(f"--dc-backend {config.loss.dc_backend}: {error}; use auto") from error
        return method

    @property
    def weight(self) -> float:
        """Lambda in this step; k / (n + 1) of its full value in the k-th step of a ramp of n."""
        if not self.ramp:
            return self.full_weight
        done = max(0, self.iteration - self.warmup + 1)
        return self.full_weight * min(1, done / (self.ramp + 1))

    def set_unlabeled(self, used: bool) -> None:
        self.projector.requires_grad_(used)

    def view(self, features: Tensor) -> Projected:
        """Projected features (B, D, h, w) and logits (B, K, h, w), at 1/8 of the crop, of E's."""
        features = self.at_stride_8(features)
        return self.projector(features), self.network.classify(features)

    def contrast(self, view1: Projected, view2: Projected, unlabeled: Batch) -> Finish:
        """Start the contrastive loss of two views of a batch; return what ends it."""
        (features1, logits1), (features2, logits2) = view1, view2
        overlap = overlap_from_crops(
            *(unlabeled[name] for name in ("offset", "flip1", "flip2", "valid1", "valid2")),
            size=features1.shape[-2:],
        )
        truth = None
        if "truth1" in unlabeled:
            truth = (unlabeled["truth1"].long(), unlabeled["truth2"].long())
        return self.dc_loss.start(features1, features2, logits1, logits2, overlap, truth)

    def dc_scalars(self, dc: DCLossOutput) -> Batch:
        """What metrics.jsonl says of the term."""
        scalars = {
            "loss_dc": dc.loss.detach(),
            "active": dc.active,
            "pairs": dc.pairs,
            "negatives": dc.negatives,
            "positive_cosine": dc.positive_cosine,
        }
        for name in FALSE_NEGATIVES:
            if (value := getattr(dc, name)) is not None:
                scalars[name] = value
        return scalars

    def extra_state(self) -> dict[str, Any]:
        return {} if self.bank is None else {"bank": self.bank.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if self.bank is not None:
            self.bank.load_state_dict(state["bank"])


def join(slices: Iterable[Projected]) -> Projected:
    features, logits = (torch.cat(parts) for parts in zip(*slices, strict=True))
    return features, logits


def _verified(loss: DirectionalContrastiveLoss, world: World, dtype: torch.dtype) -> Verification:
    """Compare the loss with float64 on every rank's device, now and not at the first step with it.

    Returns what was found of the back end that all ranks are to use.

    Raises:
        ValueError: it is not there.
        InputError: one of the ranks finds it wrong; raised on all.
    """
    backend, of = loss.backend, (loss.bank.dim, loss.temperature)
    if backend == "auto":
        try:
            return settle_backend(world.device, dtype, *of)
        except VerificationError as error:
            raise InputError(f"the loss: {error}; use --device cpu") from error
    found, wrong = None, None
    try:
        found = verify(world.device, dtype, backend, *of)
    except VerificationError as error:
        wrong = str(error)
    for line in world.all_gather_objects(wrong):
        if line is not None:
            remedy = "--device cpu" if "'eager'" in line else "--dc-backend eager"
            raise InputError(f"the loss by {line}; use {remedy}")
    return found
