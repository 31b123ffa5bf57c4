"""One training step the way the paper's authors do it: what the trainer's step is measured against.

float32, NCHW, a forward for each of the three batches, maps upsampled and joined before they are
convolved, a loop over the images that reads the boxes back from the device, every overlap
location against the negatives in checkpointed chunks, the past negatives joined anew in every step,
and an optimizer that goes from parameter to parameter.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cac_fast.train.config import Config
from cac_fast.train.engine import Trainer
from cac_fast.train.networks.lraspp import LRASPPHead
from cac_fast.train.profiling import phase
from lib import baselines

Batch = dict[str, Tensor]
Rows = tuple[Tensor, Tensor]


class BaselineStep:
    """The step of a trainer, whose weights and negatives it takes over.

    trainer: in float32, for method cac with normalization active and all switches on.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.config: Config = trainer.config
        self.method = trainer.method.to(memory_format=torch.contiguous_format)
        head = self.method.network.head
        head.forward = partial(HEADS[self.config.model.network], head)
        bank = self.method.bank.state_dict()
        first = bank["pushes"] % len(bank["features"])  # the oldest
        order = [*range(first, len(bank["features"])), *range(first)]
        self.past = [(bank["features"][i].clone(), bank["labels"][i].clone()) for i in order]
        del self.method.bank, self.method.dc_loss.bank
        groups = [
            {"params": group["params"], "lr": group["base_lr"]}
            for group in trainer.optimizer.param_groups
        ]
        self.optimizer = torch.optim.SGD(
            groups,
            momentum=self.config.optim.momentum,
            weight_decay=self.config.optim.weight_decay,
            foreach=False,
        )

    def __call__(self, labeled: Batch, unlabeled: Batch) -> Batch:
        """One step on NCHW batches; `loss`, `loss_ce` and `loss_dc` as tensors."""
        method = self.method.train()
        with phase("forward labeled"):
            logits = method.network(labeled["image"])
            loss_ce = F.cross_entropy(logits, labeled["label"].long(), ignore_index=255)
        with phase("forward unlabeled"):
            views = [method.unlabeled_view(unlabeled[name]) for name in ("image_1", "image_2")]
        with phase("loss"):
            loss_dc = self.contrastive_loss(views, unlabeled)
        loss = loss_ce + self.config.loss.dc_weight * loss_dc
        with phase("backward"):
            # Gradients were set to zero, not freed, by the PyTorch of that time.
            self.optimizer.zero_grad(set_to_none=False)
            loss.backward()
        with phase("optimizer"):
            self.optimizer.step()
        return {"loss": loss.detach(), "loss_ce": loss_ce.detach(), "loss_dc": loss_dc.detach()}

    def contrastive_loss(self, views: list[Rows], unlabeled: Batch) -> Tensor:
        """Both directions, each divided by its active anchors (METHOD: the authors' code)."""
        self.remember(views)
        negatives = torch.cat([features for features, _ in self.past])
        negative_labels = torch.cat([labels for _, labels in self.past])
        maps = [(F.normalize(features, dim=1), *confidence(logits)) for features, logits in views]
        sides = shared_locations(maps, unlabeled)
        total = negatives.new_zeros(())
        for here, there in (sides, sides[::-1]):
            anchors, labels, sure = here
            positives, _, other_sure = there
            active = (sure < other_sure) & (other_sure > self.config.loss.threshold)
            rows = baselines.chunked.__wrapped__(
                anchors,
                positives.detach(),
                negatives,
                labels,
                negative_labels,
                active,
                self.config.loss.temperature,
            )
            total = total + rows.sum() / active.sum().clamp(min=1)
        return total

    @torch.no_grad()
    def remember(self, views: list[Rows]) -> None:
        """Random locations of each view take the place of the oldest step's."""
        features, labels = [], []
        for maps, logits in views:
            rows = F.normalize(maps, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
            count = self.config.loss.negatives_per_view
            chosen = slice(None)
            if count is not None and count < len(rows):
                chosen = torch.randperm(len(rows), device=rows.device)[:count]
            features.append(rows[chosen])
            labels.append(confidence(logits)[0].flatten()[chosen])
        self.past = [*self.past[1:], (torch.cat(features), torch.cat(labels))]


def deeplabv3plus_head(head: nn.Module, low: Tensor, high: Tensor) -> Tensor:
    """DeepLabv3+: the decoder on what was upsampled and joined."""
    high = head.dropout(aspp(head.aspp, high))
    high = F.interpolate(high, size=low.shape[-2:], mode="bilinear", align_corners=True)
    x = torch.cat((high, head.reduce(low)), dim=1)
    return nn.Sequential.forward(head.decoder, x)


def aspp(module: nn.Module, x: Tensor) -> Tensor:
    """Every tap of the dilated convolutions."""
    maps = []
    for conv, norm, relu in module.branches:
        maps.append(relu(norm(nn.Conv2d.forward(conv, x))))
    pooled = F.interpolate(module.pooled(x), size=x.shape[-2:], mode="bilinear", align_corners=True)
    return module.project(torch.cat((*maps, pooled), dim=1))


def pspnet_head(head: nn.Module, low: Tensor, high: Tensor) -> Tensor:
    """PSPNet: the bottleneck on what was upsampled and joined."""
    size = high.shape[-2:]
    bins = [F.interpolate(pool(high), size=size, mode="bilinear") for pool in head.pyramid]
    return nn.Sequential.forward(head.bottleneck, torch.cat((high, *bins), dim=1))


HEADS = {
    "deeplabv3plus": deeplabv3plus_head,
    "lraspp": LRASPPHead.forward,  # is plain as it is
    "pspnet": pspnet_head,
}


@torch.no_grad()
def confidence(logits: Tensor) -> Rows:
    """Pseudo label and confidence, each (B, h, w), of logits (B, K, h, w)."""
    values, labels = logits.softmax(1).max(1)
    return labels, values


def shared_locations(
    maps: list[tuple[Tensor, Tensor, Tensor]], unlabeled: Batch
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each view features (A, D), labels (A,), confidences (A,) where the two crops overlap.

    maps: features (B, D, h, w), labels and confidences (B, h, w) of each view. Rows of both views
    belong together. The crops must lie wholly on their image.
    """
    height, width = maps[0][0].shape[-2:]
    parts: list[list[tuple[Tensor, ...]]] = [[], []]
    for image in range(len(unlabeled["offset"])):
        down, right = (unlabeled["offset"][image, axis].item() for axis in range(2))
        rows, columns = height - abs(down), width - abs(right)
        for view, (top, left) in enumerate(((down, right), (-down, -right))):
            top, left = max(0, top), max(0, left)
            flip = unlabeled[f"flip{view + 1}"][image].item()
            cut = []
            for values in maps[view]:
                crop = values[image].flip(-1) if flip else values[image]
                crop = crop[..., top : top + rows, left : left + columns]
                cut.append(crop.flatten(-2).transpose(0, -1))
            parts[view].append(tuple(cut))
    return [tuple(torch.cat(column) for column in zip(*view, strict=True)) for view in parts]
