"""timm's convolutional classifiers as encoders: those that timm itself can dilate."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cac_fast.train.errors import InputError
from cac_fast.train.networks.encoder import Encoder
from cac_fast.train.networks.weights import bare, floats, is_run
from cac_fast.train.preprocessing import Preprocessing

_FAMILIES = "resnet, resnetv2, regnet, efficientnet, mobilenetv3, mobilenetv4, convnext, xception"
_PROBE_SIDE = 40
"""Side of an image, in pixels, on which strides of 16 that round up and down differ."""


class TimmEncoder(Encoder):
    """The classifier `timm.create_model(name)`, its last map at `output_stride`.

    name: as in `timm.list_models()`, also with the tag of its weights, as resnet18.a1_in1k.
    low_stride: of the low-level map, the first that has it.

    Channels, mean and std are timm's; `preprocessing.multiple` is measured: some families round
    sizes down at stride 16.

    Raises:
        InputError: timm is not there, knows no such name or cannot give it this stride.
    """

    def __init__(self, name: str, output_stride: int, low_stride: int) -> None:
        super().__init__()
        timm = _import_timm()
        _check_name(timm, name)
        self.name, self.library = name, f"timm {timm.__version__}"
        self.options: dict[str, Any] = {"features_only": True, "output_stride": output_stride}
        try:
            with torch.device("meta"):
                strides = timm.create_model(name, **self.options).feature_info.reduction()
            self.options["out_indices"] = strides.index(low_stride), -1
            self.net: nn.Module = timm.create_model(name, **self.options)
            multiple = self._measure_multiple(output_stride)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"--backbone timm/{name} has no output stride {output_stride} for images of every "
                f"size in {self.library}; families that have: {_FAMILIES}"
            ) from error
        self.low_channels, self.high_channels = self.net.feature_info.channels()
        about = self.net.pretrained_cfg
        self.preprocessing = Preprocessing(tuple(about["mean"]), tuple(about["std"]), multiple)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.net(x)
        return low, high

    def blocks(self) -> list[nn.Module]:
        """The encoder as a whole: the names of its blocks are every family's own."""
        return [self]

    def read_weights(self, source: Path) -> dict[str, Any]:
        """As `read_weights`, of a file with all of the classifier's tensors but those
        of its last layer; of "timm" what timm fetches over the network or finds in its cache.

        Raises:
            InputError: the file cannot be read or lacks a tensor, or timm has no weights.
        """
        timm = _import_timm()
        if str(source) == "timm":
            # Its hub client would print a line for each of its tries.
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            try:
                return self._pretrained(timm)
            except Exception as error:  # of the network, of the hub, of the cache, of timm
                reason, *_ = f"{error}".splitlines() or [""]
                raise InputError(
                    f"--weights timm: timm cannot load its weights of {self.name} "
                    f"({type(error).__name__}: {reason}); they come over the network, without it "
                    "give a file"
                ) from error
        content = super().read_weights(source)
        if is_run(content):
            return content
        with torch.device("meta"):
            whole = timm.create_model(self.name)
        classifier = whole.pretrained_cfg.get("classifier") or ()
        last = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        ending = tuple(f"{layer}." for layer in last)
        expected = {n: t for n, t in floats(whole.state_dict()).items() if not n.startswith(ending)}
        given = bare(content, expected)
        # timm itself would load what fits and say so in its log at most.
        unfit = [n for n, t in expected.items() if n not in given or given[n].shape != t.shape]
        if unfit:
            raise InputError(
                f"weights file '{source}' is of another architecture: {len(unfit)} of the "
                f"{len(expected)} tensors of timm/{self.name} are not in it or have another shape, "
                f"first {unfit[0]}; give a file for this backbone"
            )
        return self._pretrained(timm, state_dict={name: given[name] for name in expected})

    def _pretrained(self, timm: ModuleType, **source: Any) -> dict[str, Tensor]:
        """The state that timm loads from its default source or another one."""
        with torch.random.fork_rng(devices=[]):  # what is drawn next does not depend on weights
            net = timm.create_model(
                self.name, pretrained=True, pretrained_cfg_overlay=source, **self.options
            )
        return {f"net.{name}": tensor for name, tensor in net.state_dict().items()}

    @torch.no_grad()
    def _measure_multiple(self, stride: int) -> int:
        """What sides must be multiples of for maps of side / stride, rounded up.

        Raises:
            KeyError: a map has neither this stride nor this one rounded down.
        """
        _, high = self.net.eval()(torch.zeros(1, 3, _PROBE_SIDE, _PROBE_SIDE))
        self.net.train()
        default = Preprocessing().multiple
        return {_PROBE_SIDE // stride: stride, -(-_PROBE_SIDE // stride): default}[high.shape[-1]]


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"--backbone timm/... needs timm ({error}): pip install timm") from error
    return timm


def _check_name(timm: ModuleType, name: str) -> None:
    names = timm.list_models() + timm.list_models(pretrained=True)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = ", did you mean " + " or ".join(f"timm/{one}" for one in near) + "?" if near else ""
        raise InputError(
            f"unknown backbone 'timm/{name}'{hint or ': timm.list_models() has all names'}"
        )
