"""What the trainer asks of a method, and what methods share.

A method is a file: a subclass of `Method` with `forward`, and whatever else of it differs
from supervised training with one network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cac_fast.train.batch import Batch
from cac_fast.train.config import Config
from cac_fast.train.data.views import View
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.networks import Segmenter, in_slices, upsample_logits
from cac_fast.train.networks.segmenter import initialize
from cac_fast.train.profiling import phase

__all__ = [
    "Batch",
    "Method",
    "Networks",
    "View",
    "check_separate",
    "cross_entropy_sum",
    "label_scalars",
    "second_network",
]

Networks = Callable[[], Segmenter]
"""Makes a network of the run's settings, with its initial weights. The random ones among these
differ between two calls, and are the same on all ranks."""


class Method(nn.Module):
    """A training method: its networks, its losses and what follows a step.

    Everything that it trains or keeps is a child module, a parameter or a buffer, or goes through
    `extra_state`: so it is saved, resumed, moved to the device and shared between the ranks.
    It draws random numbers by PyTorch alone, whose state is saved too.

    With `--accumulate` > 1 the networks see a batch in so many slices (`sliced`), whose
    activations backward computes again, a slice at a time. The losses are taken once, of the whole
    batch, so that every denominator and every negative is that of the step in one pass. It costs
    one more forward pass, which a loss with fewer negatives for the earlier slices would have
    saved.

    Args:
        networks: makes the method's networks; its first call comes before all other modules that
            draw their weights, so that every method starts from the same network.
        world: the ranks of the run.
        config: its settings.
        dtype: that of the features, float32 or autocast's.
    """

    views: Mapping[str, View] = {}
    """What `forward` gets of the unlabeled images; empty for a method that uses none. Whether
    a class has any must be known before it is built; the constructor may then choose others."""

    label_sources: tuple[str, ...] = ()
    """The settings that may say where labels of the unlabeled images come from: `pseudo_labels`,
    `teacher`. Where one of them does, every crop v has a `labelv`."""

    needs_labels = False
    """Whether one of them must."""

    reductions: Mapping[str, str] = {}
    """How a scalar's values on the ranks become one: "sum", or the name of the scalar that weights
    their mean, over the steps of a line too. Those not named here become their mean."""

    def __init__(
        self, networks: Networks, world: World, config: Config, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.network = networks()
        self.world = world
        self.num_slices = config.optim.accumulate
        self.iteration = 0
        """Steps done before this one; the trainer sets it."""
        self.report: str | None = None
        """What a run says of its loss at the beginning."""
        self._compiled: dict[Segmenter, Callable[[Tensor], Tensor]] = {}

    @classmethod
    def build(cls, networks: Networks, world: World, config: Config, dtype: torch.dtype) -> Method:
        """The method, after whatever proves that it will work here.

        Raises:
            InputError: it does not.
        """
        return cls(networks, world, config, dtype)

    # ---- what a method may say

    def forward(self, labeled: Batch, unlabeled: Batch | None) -> Batch:
        """Named scalars of a step; backward of `loss` gives all gradients, of all optimizers.

        It is scaled so that the mean of the gradients over ranks, which DDP takes, is the gradient
        of the global loss. Each further scalar is written to metrics.jsonl by its name.

        Args:
            labeled: `image` float (B, 3, c, c), normalized, `label` uint8 (B, c, c), and `flip` and
                `valid` of `LabeledTransform`.
            unlabeled: None in the warm-up, and for a method without views; else `image_NAME` as
                above and `boxes_NAME` of each view, and of the crops v that these show
                `on_imagev`, `flipv`, `validv`, `offset` and perhaps `labelv` and `rightv`: see
                `UnlabeledTransform`.
        """
        raise NotImplementedError

    def segmenters(self) -> list[Segmenter]:
        """The networks that are trained."""
        return [self.network]

    def more_optimizers(self) -> list[Optimizer]:
        """Optimizers beside the SGD, whose parameters it then leaves alone; asked for once.

        Their learning rates follow the SGD's schedule. On a GPU they should be fused: with fp16
        the host waits for the overflow flag of every other one.
        """
        return []

    def set_unlabeled(self, used: bool) -> None:
        """Say whether the coming steps use unlabeled images.

        What takes part with these alone must not require a gradient without: DDP waits for the
        gradient of every parameter that requires one.
        """

    def after_step(self) -> None:
        """Follow the optimizers' step, in the warm-up too: an averaged network moves here."""

    @property
    def evaluated(self) -> Segmenter:
        """The network that is scored and saved for use; always the same one."""
        return self.network

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond `state_dict`."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    # ---- what a method may use

    def compile_features(self) -> None:
        """Compile the encoders for training, once for each shape of batch.

        The networks themselves stay as they were: their weight names too, and evaluation in
        original sizes would compile for every size.
        """
        for network in self.segmenters():
            self._compiled[network] = torch.compile(network.features, dynamic=False)

    def features(self, images: Tensor, network: Segmenter | None = None) -> Tensor:
        """E of images (B, 3, H, W), by `network` or the first one, compiled where asked for."""
        network = self.network if network is None else network
        return self._compiled.get(network, network.features)(images)

    def logits(self, images: Tensor, network: Segmenter | None = None) -> Tensor:
        """Logits (B, K, H, W) of images (B, 3, H, W), in fp32 at least; `network` as above."""
        network = self.network if network is None else network
        low = network.classify(self.features(images, network))
        return upsample_logits(low, images.shape[-2:])

    def at_stride_8(self, features: Tensor) -> Tensor:
        """The first network's features (B, C, h, w) at 1/8 of the crop."""
        return F.avg_pool2d(features, 2) if self.network.feature_stride == 4 else features

    def sliced(self, function: Any, *batch: Tensor, keep_last: bool = False) -> list[Any]:
        """`function` of each slice of a batch; see `in_slices`."""
        return in_slices(function, self.num_slices, self, *batch, keep_last=keep_last)

    def supervised_loss(
        self, labeled: Batch, network: Segmenter | None = None, last: bool = True
    ) -> Tensor:
        """Cross entropy over the valid pixels of the whole global batch, of `network` or the
        first one.

        last: this is the step's last pass through a network.
        """

        def of_slice(images: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy_sum(self.logits(images, network), labels)

        with phase("forward labeled"):
            sums = self.sliced(of_slice, labeled["image"], labeled["label"], keep_last=last)
            return self.normalized(sums, labeled["label"])

    def normalized(self, sums: list[Tensor], labels: Tensor) -> Tensor:
        """The slices' summed cross entropy over the valid pixels of all ranks."""
        return self.mean_over(labels != 255, sums)

    def mean_over(self, counted: Tensor, sums: list[Tensor]) -> Tensor:
        """The slices' sums over the pixels of all ranks that are True in the bool `counted`."""
        number = self.world.all_reduce(counted.sum()).clamp(min=1)
        return torch.stack(sums).sum() * self.world.size / number


def second_network(networks: Networks) -> Segmenter:
    """Another network, whose head and classifier differ from those of the first one.

    `--weights RUN` gives both networks all weights of that run; two equal ones would stay equal.
    """
    network = networks()
    initialize(network.head)
    initialize(network.classifier)
    return network


def check_separate(config: Config) -> None:
    """Raise InputError where `--forward joint` asks for one pass that a method does not have."""
    if config.loss.forward == "joint":
        raise InputError(
            f"--forward joint: {config.loss.method} has labeled and unlabeled images in passes of "
            "their own: use --forward separate"
        )


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of logits (B, K, H, W) by labels (B, H, W) uint8, 255 ignored."""
    return F.cross_entropy(logits, labels.long(), ignore_index=255, reduction="sum")


def label_scalars(prefix: str, labels: list[Tensor], unlabeled: Batch, world: World) -> Batch:
    """What metrics.jsonl says of pseudo labels (B, c, c) of crops, which `unlabeled` holds too.

    PREFIX_labeled is the share of pixels that have one; PREFIX_precision, where truth exists, that
    of the right ones among those whose class is known.
    """
    shares = torch.stack([(of_crop != 255).float().mean() for of_crop in labels])
    scalars = {f"{prefix}_labeled": shares.mean()}
    counts = [unlabeled[name] for name in ("right1", "right2") if name in unlabeled]
    if counts:
        right, known = world.all_reduce(torch.cat(counts).sum(0))
        scalars[f"{prefix}_precision"] = right / known.clamp(min=1)
    return scalars
