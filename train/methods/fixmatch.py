"""FixMatch: an averaged teacher labels weak views, the student learns them on mixed strong ones.

UniMatch is a matter of settings: V1 has two strong views, feature dropout `channel` and a teacher
that is the student itself (decay 0); V2 has two strong views and feature dropout `complementary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cac_fast.train.config import Config
from cac_fast.train.data.views import PAIR
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods.base import Batch, Networks, View, cross_entropy_sum
from cac_fast.train.methods.contrastive import ContrastiveMethod, Projected, join
from cac_fast.train.methods.mixing import cutmix, inside, warn_of_unmixed
from cac_fast.train.methods.teacher import Teacher
from cac_fast.train.networks import Segmenter, upsample_logits
from cac_fast.train.profiling import phase

Masks = tuple[Tensor, ...]
"""Of each map of the backbone (B, C): what its channels are multiplied by."""

Slice = tuple[list[Tensor], list[Projected]]
"""Summed cross entropies of the parts that have labels, and the views of the others."""


class Part(NamedTuple):
    """Images of a pass and, unless they are for the contrastive loss, what they are to be.

    labels: uint8 (B, H, W), 255 where there is no loss. valid: bool (B, H, W), which pixels the
    loss is the mean of.
    """

    images: Tensor
    labels: Tensor | None = None
    valid: Tensor | None = None
    masks: Masks = ()


class FixMatch(ContrastiveMethod):
    """`L = (L_ce + w * L_u) / 2`; with lambda > 0 `L = (L_ce + w * L_u + lambda * L_dc) / 2`.

    L_u is the mean over the strong views of the cross entropy by the pseudo labels; with channel
    dropout it is half that and half the loss of the weak view through dropped features. Pixels that
    are not confident have no loss but count in the mean. In the warm-up `L = L_ce`.
    """

    views: Mapping[str, View] = {"weak": View(), "strong1": View(color="strong", boxes=1)}

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        loss = config.loss
        super().__init__(networks, world, config, dtype, contrastive=loss.dc_weight > 0)
        if loss.strong_views == 0:
            raise InputError("--strong-views 0: fixmatch needs one or two strong views")
        if loss.feature_dropout == "complementary" and loss.strong_views != 2:
            raise InputError(
                "--feature-dropout complementary needs a pair of strong views: use --strong-views 2"
            )
        warn_of_unmixed(config, world)
        self.unsupervised_weight, self.confidence = loss.unsupervised_weight, loss.confidence
        self.dropout = loss.feature_dropout
        self.strong = [f"strong{number}" for number in range(1, loss.strong_views + 1)]
        # The contrastive loss's views come last: it leaves the draws of the others as they are.
        pair = {} if self.bank is None else PAIR
        self.views = {"weak": View(), **dict.fromkeys(self.strong, self.views["strong1"]), **pair}
        self.teacher = Teacher(self.network, loss.ema_decay, world)

    def after_step(self) -> None:
        self.teacher.update(self.network, self.iteration)

    @property
    def evaluated(self) -> Segmenter:
        return self.teacher.copy

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        if unlabeled is None:
            loss = self.supervised_loss(labeled)
            return {"loss": loss, "loss_ce": loss.detach()}
        label = labeled["label"]
        with phase("teacher"):
            weak = self.labeled_by_teacher(unlabeled)
        parts = [Part(labeled["image"], label, label != 255), *self.strong_parts(unlabeled, weak)]
        if self.dropout == "channel":
            parts.append(weak._replace(masks=self.random_masks(len(weak.images))))
        pair = [] if self.bank is None else [Part(unlabeled[f"image_{name}"]) for name in PAIR]
        with phase("forward"):
            sums, views = self.student([*parts, *pair])
        means, confident = self.means(sums, parts, weak)
        loss_ce, loss_u = means[0], means[1 : 1 + len(self.strong)].mean()
        if self.dropout == "channel":
            loss_u = (loss_u + means[-1]) / 2
        loss = loss_ce + self.unsupervised_weight * loss_u
        scalars = {"loss_ce": loss_ce.detach(), "loss_u": loss_u.detach(), "confident": confident}
        if self.bank is not None:
            with phase("loss"):
                dc = self.contrast(*views, unlabeled)()
            loss = loss + self.weight * dc.loss
            scalars |= self.dc_scalars(dc)
        return {"loss": loss / 2, **scalars}

    @torch.no_grad()
    def labeled_by_teacher(self, unlabeled: Batch) -> Part:
        """The weak views with what the teacher is confident of."""

        def of_slice(images: Tensor) -> tuple[Tensor, Tensor]:
            return self.teacher(images).softmax(1).max(1)

        images, valid = unlabeled["image_weak"], unlabeled["on_image1"]
        slices = self.sliced(of_slice, images)
        confidence, labels = (torch.cat(values) for values in zip(*slices, strict=True))
        unsure = ~valid | (confidence < self.confidence)
        return Part(images, labels.to(torch.uint8).masked_fill(unsure, 255), valid)

    def strong_parts(self, unlabeled: Batch, weak: Part) -> list[Part]:
        """The strong views, mixed with their partners, whose labels come along."""
        masks: list[Masks] = [()] * len(self.strong)
        if self.dropout == "complementary":
            masks = self.complementary_masks(len(weak.images))
        parts = []
        for name, mask in zip(self.strong, masks, strict=True):
            boxes = inside(unlabeled[f"boxes_{name}"], weak.labels.shape[-2:])
            images = cutmix(unlabeled[f"image_{name}"], boxes.unsqueeze(1))
            parts.append(Part(images, cutmix(weak.labels, boxes), cutmix(weak.valid, boxes), mask))
        return parts

    def random_masks(self, count: int) -> Masks:
        """Each channel of each map times 0 or 2, with equal chances."""
        backbone, device = self.network.backbone, self.world.device
        widths = backbone.low_channels, backbone.high_channels
        return tuple(2 * torch.rand(count, width, device=device).round() for width in widths)

    def complementary_masks(self, count: int) -> list[Masks]:
        """Of the first strong views and of the second ones: they sum to 2, and a random half of the
        images keeps its features."""
        kept = torch.randperm(count, device=self.world.device)[: count // 2]
        first = self.random_masks(count)
        for mask in first:
            mask[kept] = 1
        return [first, tuple(2 - mask for mask in first)]

    def student(self, parts: list[Part]) -> tuple[list[list[Tensor]], list[Projected]]:
        """Of parts with labels the slices' sums, of the others the views; in one pass over all, or
        in a pass for each."""
        passes = [parts] if self.joint else [[part] for part in parts]
        sums, views = [], []
        for group in passes:
            slices = self.one_pass(group, keep_last=group is passes[-1])
            losses, projected = zip(*slices, strict=True)
            sums += zip(*losses, strict=True)
            views += map(join, zip(*projected, strict=True))
        return sums, views

    def one_pass(self, parts: list[Part], keep_last: bool) -> list[Slice]:
        """Sums and views of every slice, whose images share batch statistics."""
        images = [part.images for part in parts]
        labels = [part.labels for part in parts if part.labels is not None]
        masks = joined_masks(parts)
        first, last = len(images), len(images) + len(labels)

        def of_slice(*tensors: Tensor) -> Slice:
            masks = [mask.transpose(0, 1).flatten(0, 1) for mask in tensors[last:]]
            features = self.dropped(torch.cat(tensors[:first]), masks).chunk(first)
            losses = []
            for part, truth in zip(features, tensors[first:last], strict=False):
                logits = upsample_logits(self.network.classify(part), truth.shape[-2:])
                losses.append(cross_entropy_sum(logits, truth))
            return losses, [self.view(part) for part in features[len(losses) :]]

        return self.sliced(of_slice, *images, *labels, *masks, keep_last=keep_last)

    def dropped(self, images: Tensor, masks: list[Tensor]) -> Tensor:
        """E of images (B, 3, H, W), the backbone's maps times `masks` where there are any."""
        if not masks:
            return self.features(images)
        maps = zip(self.network.backbone(images), masks, strict=True)
        return self.network.head(
            *(values * mask[..., None, None].to(values) for values, mask in maps)
        )

    def means(
        self, sums: list[list[Tensor]], parts: list[Part], weak: Part
    ) -> tuple[Tensor, Tensor]:
        """Losses over the valid pixels of all ranks, and the share of confident ones."""
        counted = [*(part.valid for part in parts), weak.valid, weak.labels != 255]
        *valid, confident = self.world.all_reduce(torch.stack([x.sum() for x in counted]))
        means = [
            torch.stack(of_slices).sum() * self.world.size / count.clamp(min=1)
            for of_slices, count in zip(sums, valid, strict=False)
        ]
        return torch.stack(means), confident / valid[-1].clamp(min=1)


def joined_masks(parts: list[Part]) -> list[Tensor]:
    """Of each map (B, parts, C), 1 for a part that has none; nothing where no part has any."""
    some = next((part.masks for part in parts if part.masks), ())
    ones = tuple(torch.ones_like(mask) for mask in some)
    each = [part.masks or ones for part in parts]
    return [torch.stack(of_map, 1) for of_map in zip(*each, strict=True)]
