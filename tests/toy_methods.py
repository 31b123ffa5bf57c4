"""Three small methods that use all that a method may be: and a network to try them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from test_step import Backbone, Head
from torch import Tensor, nn

from cac_fast.train.methods.base import Batch, Method, View
from cac_fast.train.methods.teacher import Teacher, frozen
from cac_fast.train.networks import Segmenter


def tiny_network(_: str, __: str, num_classes: int, dropout: bool = True) -> Segmenter:
    """In place of `build_network`."""
    head = Head()
    if not dropout:
        head.decoder[0] = nn.Identity()
    return Segmenter(Backbone(), head, num_classes, dropout=0.1 if dropout else 0.0)


class Toy(Method):
    """Supervised, and with unlabeled images `unsupervised` beside it."""

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        losses_ce = [
            self.supervised_loss(labeled, network, last=False) for network in self.segmenters()
        ]
        loss_ce = torch.stack(losses_ce).sum()
        if unlabeled is None:
            return {"loss": loss_ce, "loss_ce": loss_ce.detach()}
        loss, scalars = self.unsupervised(labeled, unlabeled)
        return {"loss": loss_ce + loss, "loss_ce": loss_ce.detach(), **scalars}

    def unsupervised(self, labeled: Batch, unlabeled: Batch) -> tuple[Tensor, Batch]:
        raise NotImplementedError

    def mean_on_image(self, sums: list[Tensor], on_image: Tensor) -> Tensor:
        """Sums over the slices' pixels by those of all ranks on the image."""
        pixels = self.world.all_reduce(on_image.sum()).clamp(min=1)
        return torch.stack(sums).sum() * self.world.size / pixels


class MeanTeacher(Toy):
    """The student meets the prediction that its average makes in plain colors."""

    views = {"weak": View(1), "strong": View(1, "strong")}  # noqa: RUF012
    reductions = {"pixels": "sum", "certainty": "pixels"}  # noqa: RUF012

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.teacher = Teacher(self.network, 0.8, self.world)

    def unsupervised(self, labeled: Batch, unlabeled: Batch) -> tuple[Tensor, Batch]:
        weak, strong = unlabeled["image_weak"], unlabeled["image_strong"]
        on_image = unlabeled["on_image1"]

        def distance(strong: Tensor, weak: Tensor, on_image: Tensor) -> Tensor:
            target = self.teacher(weak).softmax(1)
            return ((self.logits(strong).softmax(1) - target) ** 2).sum(1)[on_image].sum()

        sums = self.sliced(distance, strong, weak, on_image, keep_last=True)
        loss = self.mean_on_image(sums, on_image)
        certainty = self.teacher(weak).softmax(1).amax(1)[on_image].mean()
        scalars = {"loss_mse": loss.detach(), "pixels": on_image.sum(), "certainty": certainty}
        return loss, scalars

    def after_step(self) -> None:
        self.teacher.update(self.network, self.iteration)

    @property
    def evaluated(self) -> Segmenter:
        return self.teacher.copy


class CrossSupervision(Toy):
    """Each of two networks learns what the other says."""

    views = {"plain": View(1, boxes=3)}  # noqa: RUF012
    reductions = {"alike": "sum"}  # noqa: RUF012

    def __init__(self, networks: Callable[[], Segmenter], *arguments: Any) -> None:
        super().__init__(networks, *arguments)
        self.second = networks()

    def segmenters(self) -> list[Segmenter]:
        return [self.network, self.second]

    def unsupervised(self, labeled: Batch, unlabeled: Batch) -> tuple[Tensor, Batch]:
        assert unlabeled["boxes_plain"].shape[1:] == (3, 4)
        images, on_image = unlabeled["image_plain"], unlabeled["on_image1"]

        def both(images: Tensor) -> tuple[Tensor, Tensor]:
            return self.logits(images), self.logits(images, self.second)

        slices = self.sliced(both, images, keep_last=True)
        one, two = (torch.cat(parts) for parts in zip(*slices, strict=True))
        sums = [
            F.cross_entropy(here, there.argmax(1), reduction="none")[on_image].sum()
            for here, there in ((one, two), (two, one))
        ]
        loss = self.mean_on_image(sums, on_image)
        alike = (one.argmax(1) == two.argmax(1)).sum()
        return loss, {"loss_cps": loss.detach(), "alike": alike}


class Adversarial(Toy):
    """A discriminator, with an Adam of its own, learns to tell predictions from masks."""

    views = {"plain": View(2)}  # noqa: RUF012

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        classes = self.network.classifier[-1].out_channels
        self.discriminator = nn.Sequential(
            nn.Conv2d(classes, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 2, 1)
        )

    def more_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.discriminator.parameters(), lr=1e-3)]

    def set_unlabeled(self, used: bool) -> None:
        self.discriminator.requires_grad_(used)

    def unsupervised(self, labeled: Batch, unlabeled: Batch) -> tuple[Tensor, Batch]:
        logits = self.sliced(self.logits, unlabeled["image_plain"], keep_last=True)
        predicted = torch.cat(logits).softmax(1)
        fooled, told = self.fooled(predicted), self.told(predicted, labeled["label"])
        return fooled + told, {"loss_fooled": fooled.detach(), "loss_told": told.detach()}

    def fooled(self, predicted: Tensor) -> Tensor:
        return truth_is(1, frozen(self.discriminator)(predicted))

    def told(self, predicted: Tensor, labels: Tensor) -> Tensor:
        known = labels != 255
        masks = F.one_hot((labels * known).long(), predicted.shape[1]) * known.unsqueeze(3)
        real = self.discriminator(masks.permute(0, 3, 1, 2).to(predicted))
        return truth_is(0, self.discriminator(predicted.detach())) + truth_is(1, real)


def truth_is(value: float, logits: Tensor) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, value))


TOYS = {"teacher": MeanTeacher, "two": CrossSupervision, "adversarial": Adversarial}
