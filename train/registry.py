"""What a run chooses by name: data layouts, networks, backbones and methods.

An entry says where the code is; it is imported when it is first used. Code outside the project
needs no entry: its name is `module:attribute`, found in the working folder or where Python looks.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cac_fast.train.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """Code that has a name.

    where: `module:attribute`.
    help: one line.
    arguments: given to it before all others.
    preset: of a data layout or method: settings in place of the defaults, by their flat names; the
        layout's win.
    cases: pairs of settings: where those of the first are so, the preset has those of the second
        as well. Later ones win.
    made_in: of a data layout that the program makes itself: in this folder if no other is given.
    uses: of a method: the settings of the loss that it reads, between spaces. None where a run need
        not hear of the others.
    """

    where: str
    help: str
    arguments: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = ()
    made_in: str | None = None
    uses: str | None = None

    def preset_for(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The preset of a run with these settings, by their flat names."""
        found = dict(self.preset)
        for where, more in self.cases:
            if all(settings[name] == value for name, value in where.items()):
                found |= more
        return found


class Registry:
    """What an option can name: entries, and code outside the project as `module:attribute`.

    An entry `prefix/NAME` stands for all names that begin with `prefix/`; its code is given
    what follows.
    """

    def __init__(self, option: str, entries: Mapping[str, Entry]) -> None:
        self.option, self.entries = option, entries
        self.names = tuple(entries)

    def entry(self, name: str) -> Entry:
        """The entry of a name; raises InputError where there is none and no colon in the name."""
        prefix, slash, _ = name.partition("/")
        found = self.entries.get(f"{prefix}/NAME" if slash else name)
        if found is None and ":" in name:
            return Entry(name, "code outside the project")
        if found is None:
            raise InputError(
                f"{self.option}: invalid choice: '{name}'{did_you_mean(name, self.names)} "
                f"(choose from {', '.join(self.names)}, or your own as module:name)"
            )
        return found

    def checked(self, name: str) -> str:
        """`name` itself; raises as `entry`."""
        self.entry(name)
        return name

    def load(self, name: str) -> Any:
        """The function or class that `name` stands for.

        Raises:
            InputError: there is no such name, or code outside the project cannot be imported.
        """
        entry = self.entry(name)
        module, _, attribute = entry.where.partition(":")
        if entry.where == name:
            return _load_outside(f"{self.option} {name}", module, attribute)
        found = getattr(importlib.import_module(module), attribute)
        _, slash, rest = name.partition("/")
        arguments = (rest,) if slash else entry.arguments
        return partial(found, *arguments) if arguments else found

    def check_own(self, name: str) -> None:
        """Raise InputError for code outside the project that is not the working folder's.

        For names that stand in a file: it is not to choose among all functions that Python finds.
        """
        module, _, _ = name.partition(":")
        if self.entry(name).where != name:
            return
        path = Path(module.replace(".", os.sep))
        files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
        if files:
            self.load(name)  # Python may find another file of this name
            found = Path(sys.modules[module].__file__ or "")
            files = [file for file in files if file.resolve() == found.resolve()]
        if not files:
            raise InputError(
                f"{self.option} {name}: a name in a file stands for code of the working folder "
                f"alone, and {path}.py is not there: start in the folder that holds it"
            )

    def describe(self) -> str:
        """All names and what they are, for a help text."""
        entries = (f"{name} ({entry.help})" for name, entry in self.entries.items())
        return f"{', '.join(entries)}, or your own as module:name"


def _load_outside(option: str, name: str, attribute: str) -> Any:
    # Before the folder of the command itself, whose files must not hide the user's.
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever the user's code raises
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise InputError(
                f"{option}: there is no {name.replace('.', os.sep)}.py in {folder} and no module "
                f"{name} on the Python path: correct the name or start in the folder that holds it"
            ) from error
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{option}: the module {name} cannot be imported ({reason}, {place.filename} line "
            f"{place.lineno}): mend it"
        ) from error
    if not hasattr(module, attribute):
        hint = did_you_mean(attribute, vars(module))
        raise InputError(f"{option}: {module.__file__} holds no '{attribute}'{hint}")
    return getattr(module, attribute)


_LAYOUTS = "cac_fast.train.data.layouts"
_NETWORKS = "cac_fast.train.networks"
_METHODS = "cac_fast.train.methods"

# What differs between the data sets (paper, Sec. 4.1).
_CITYSCAPES = {"iterations": 92_560, "crop_size": 720, "learning_rate": 0.01}
_VOC = {"iterations": 92_560, "crop_size": 320, "learning_rate": 0.001, "bank_past_steps": 1}
# From random weights, in minutes on two CPU cores: ResNet-18 learns in fewer steps than
# MobileNetV2, small crops buy a larger batch, dropout would slow it down, and the head, as new
# as the backbone, shares its learning rate. Labeled crops are jittered, as the authors do for
# Cityscapes: without it the supervised baseline would fail in other light for that alone. The
# loss of the method itself is the paper's.
_TOYCITY = {
    "backbone": "resnet18",
    "dropout": False,
    "iterations": 200,
    "warmup": 60,
    "batch_size": 8,
    "crop_size": 56,
    "learning_rate": 0.05,
    "head_learning_rate_factor": 1.0,
    "labeled_scale": (0.9, 1.7),
    "unlabeled_scale": (0.9, 1.7),
    "jitter_labeled": True,
    "eval_every": 50,
}

# Strong views share batch statistics with the labeled images, and learning starts with both.
_FIXMATCH = {"forward": "joint", "warmup": 0, "dc_weight": 0.0}
# A sum over classes: with 21 the mean's 100 of the reference code is 4.8.
_MEAN_TEACHER = {"warmup": 0, "unsupervised_weight": 5.0, "ema_decay": 0.99, "strong_views": 0}
# Of the authors, who have other weights for mixed images, and for Cityscapes.
_CPS = {"warmup": 0, "unsupervised_weight": 1.5}
_CPS_CASES = (
    ({"cutmix": True}, {"unsupervised_weight": 1.0}),
    ({"dataset": "cityscapes"}, {"unsupervised_weight": 6.0}),
    ({"dataset": "cityscapes", "cutmix": True}, {"unsupervised_weight": 5.0}),
)
# Of the authors, whose weight is for the mean over the classes.
_CCT = {"warmup": 0, "unsupervised_weight": 30.0}
# Its teacher has learned already, and by default all that it says is believed.
_SELF_TRAINING = {"forward": "joint", "warmup": 0, "confidence": 0.0}
# Confidence is that of its discriminator in an image.
_S4GAN = {"warmup": 0, "confidence": 0.6}
_S4GAN_CASES = (
    ({"dataset": "cityscapes"}, {"confidence": 0.7, "discriminator_learning_rate": 1e-5}),
)
# Its weight is that of a mean over classes; its authors have one pass over all images.
_GCT = {"forward": "joint", "warmup": 0, "unsupervised_weight": 100.0}
# Nothing of it is published: what GCT has.
_ECS = {"forward": "joint", "warmup": 0}

_UNLABELED = "forward warmup unsupervised_weight"
CONTRASTIVE = (
    "forward warmup dc_weight dc_ramp temperature threshold normalization negatives_per_view "
    "max_negatives bank_past_steps projector context contrastive directional negative_sampling "
    "positive_filtering dc_backend false_negatives"
)

# A layout is a function of its folder that returns `data.layouts.SegmentationData`.
LAYOUTS = Registry(
    "--dataset",
    {
        "cityscapes": Entry(
            f"{_LAYOUTS}.cityscapes:open_cityscapes", "as published", preset=_CITYSCAPES
        ),
        "voc": Entry(f"{_LAYOUTS}.voc:open_voc", "PASCAL VOC 2012", preset=_VOC),
        "folder": Entry(f"{_LAYOUTS}.folder:open_folder", "images, masks and classes.txt"),
        "toycity": Entry(
            f"{_LAYOUTS}.toycity:open_toycity", "embedded", preset=_TOYCITY, made_in="data/toycity"
        ),
    },
)

# A network is a function of (backbone's name, number of classes, dropout) that returns a
# `networks.Segmenter`.
NETWORKS = Registry(
    "--network",
    {
        "deeplabv3plus": Entry(f"{_NETWORKS}.deeplabv3plus:deeplabv3plus", "features at 1/4"),
        "lraspp": Entry(f"{_NETWORKS}.lraspp:lraspp", "small, features at 1/8"),
        "pspnet": Entry(f"{_NETWORKS}.pspnet:pspnet", "features at 1/8"),
    },
)

# A backbone is a class or function of (output_stride, low_stride): see `networks.backbones`.
_MOBILENET = f"{_NETWORKS}.backbones:MobileNetBackbone"
_RESNET = f"{_NETWORKS}.backbones:ResNetBackbone"
_VGG = f"{_NETWORKS}.vgg:VGGBackbone"
BACKBONES = Registry(
    "--backbone",
    {
        "mobilenet_v2": Entry(_MOBILENET, "torchvision", ("mobilenet_v2",)),
        "mobilenet_v3_large": Entry(_MOBILENET, "torchvision", ("mobilenet_v3_large",)),
        "resnet18": Entry(_RESNET, "torchvision", ("resnet18",)),
        "resnet50": Entry(_RESNET, "torchvision", ("resnet50",)),
        "resnet101": Entry(_RESNET, "torchvision", ("resnet101",)),
        "timm/NAME": Entry(f"{_NETWORKS}.timm_encoder:TimmEncoder", "timm's that can be dilated"),
        "vgg16": Entry(_VGG, "torchvision", ("vgg16",)),
        "vgg16_bn": Entry(_VGG, "torchvision", ("vgg16_bn",)),
    },
)

METHODS = Registry(
    "--method",
    {
        "cac": Entry(
            f"{_METHODS}.cac:CAC",
            "context-aware consistency",
            uses=f"{CONTRASTIVE} averaged_labels ema_decay unlabeled_dropout",
        ),
        "cct": Entry(
            f"{_METHODS}.cct:CCT",
            "consistency of perturbed features",
            preset=_CCT,
            uses=f"{_UNLABELED} auxiliary_heads",
        ),
        "cps": Entry(
            f"{_METHODS}.cps:CPS",
            "two networks label for each other",
            preset=_CPS,
            cases=_CPS_CASES,
            uses=f"{_UNLABELED} cutmix",
        ),
        "ecs": Entry(
            f"{_METHODS}.ecs:ECS",
            "our reading of error correction",
            preset=_ECS,
            uses=f"{_UNLABELED} discriminator_learning_rate",
        ),
        "fixmatch": Entry(
            f"{_METHODS}.fixmatch:FixMatch",
            "weak to strong, UniMatch too",
            preset=_FIXMATCH,
            uses=f"{CONTRASTIVE} {_UNLABELED} confidence ema_decay strong_views feature_dropout",
        ),
        "gct": Entry(
            f"{_METHODS}.gct:GCT",
            "two networks and a flaw detector",
            preset=_GCT,
            uses=f"{_UNLABELED} discriminator_learning_rate",
        ),
        "mean_teacher": Entry(
            f"{_METHODS}.mean_teacher:MeanTeacher",
            "probabilities of an averaged teacher",
            preset=_MEAN_TEACHER,
            uses=f"{_UNLABELED} ema_decay strong_views",
        ),
        "s4gan": Entry(
            f"{_METHODS}.s4gan:S4GAN",
            "by a discriminator",
            preset=_S4GAN,
            cases=_S4GAN_CASES,
            uses=f"{_UNLABELED} confidence discriminator_learning_rate",
        ),
        "self_training": Entry(
            f"{_METHODS}.self_training:SelfTraining",
            "by the masks of a trained teacher",
            preset=_SELF_TRAINING,
            uses="forward warmup confidence pseudo_loss_weight normalize_pseudo_loss",
        ),
        # The baseline is trained with the flags of what it is compared with.
        "supervised": Entry(f"{_METHODS}.supervised:Supervised", "the labeled images alone"),
    },
)
