"""What takes part in a comparison. A further arm is a line in ARMS; `--methods` adds others."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import NamedTuple

from cac_fast.train import registry
from cac_fast.train.errors import InputError, did_you_mean

METHODS = ("supervised", "cac")
"""The arms of a comparison that asks for no others."""

_READING = "ecs: our reading of its paper, whose authors published neither code nor settings."

# Of variants, and of methods without a line in ARMS, in the registry's order.
_PALETTE = "tab:brown tab:pink tab:olive tab:cyan black gold navy lime magenta teal".split()


class Arm(NamedTuple):
    """A method of `train/main.py`, the color of its curve, whether it sees the masks of all
    images or those of the list, and its further options.

    adapts: another arm, if this one trains nothing but gives that one's networks the batch
        statistics of the unlabeled images (`train/adapt.py`).
    """

    method: str
    color: str
    all_masks: bool = False
    more: tuple[str, ...] = ()
    adapts: str | None = None


# Cheap ones first: where all masks gain nothing, the others need not run.
ARMS = {
    "supervised": Arm("supervised", "tab:gray"),
    "supervised_all": Arm("supervised", "tab:green", all_masks=True),
    "control": Arm("cac", "tab:orange", more=("--dc-weight", "0")),
    "cac": Arm("cac", "tab:blue"),
    "fixmatch": Arm("fixmatch", "tab:red", more=("--dc-weight", "0")),
    "fixmatch_cac": Arm("fixmatch", "tab:purple", more=("--dc-weight", "0.1")),
    "supervised_adapted": Arm("supervised", "dimgray", adapts="supervised"),
    "cac_adapted": Arm("cac", "deepskyblue", adapts="cac"),
}


_OWN = frozenset(ARMS)


def needs_teacher(method: str) -> bool:
    """Whether a method learns from what a trained network says of the unlabeled images."""
    kind = registry.METHODS.load(method)
    return kind.needs_labels and "teacher" in kind.label_sources


def footnote(names: Iterable[str]) -> str:
    """What a table with rows of these methods or arms has to say below it, maybe nothing."""
    with_ecs = any(arm.method == "ecs" for arm in map(_arm, names) if arm is not None)
    return f"\n\n{_READING}" if with_ecs else ""


def needed_arm(arm: str) -> str | None:
    """The arm whose run an arm begins with, if there is one."""
    return ARMS[arm].adapts or ("supervised" if needs_teacher(ARMS[arm].method) else None)


def _arm(name: str) -> Arm | None:
    """An arm of ARMS, or a method of the registry as an arm; None for another name."""
    if name in ARMS or name not in registry.METHODS.entries:
        return ARMS.get(name)
    others = [method for method in registry.METHODS.entries if method not in _OWN]
    return Arm(name, _PALETTE[others.index(name) % len(_PALETTE)])


def method_names(text: str) -> list[str]:
    """Methods of the registry, names between commas or `all`.

    Raises:
        InputError: one is not there.
    """
    there = list(registry.METHODS.entries)
    names = there if text == "all" else text.split(",")
    for name in names:
        if name not in there:
            raise InputError(
                f"--methods {text}: there is no method {name!r}{did_you_mean(name, there)} "
                f"(all, or of {', '.join(there)})"
            )
    return names


def add_methods(text: str) -> list[str]:
    """Add methods of the registry, as `method_names` has them, to ARMS; the arms to compare.

    These are the methods, what their gain has to be seen against (the masks of all images,
    supervised with new batch statistics), and CAC's control beside CAC.

    Raises:
        InputError: a method is not there.
    """
    names = method_names(text)
    for name in names:
        ARMS.setdefault(name, _arm(name))
    wanted = {"supervised", "supervised_all", "supervised_adapted", *names}
    wanted |= {"control"} if "cac" in names else set()
    return [arm for arm in ARMS if arm in wanted]


def add_variant(text: str) -> str:
    """Add the arm `NAME=ARM OPTIONS`, another arm with further options; its name.

    Raises:
        InputError: `text` has another form, or there is another arm of that name.
    """
    name, _, words = text.partition("=")
    base, *more = shlex.split(words) or [""]
    found = _arm(base)
    if not name.isidentifier() or found is None or found.adapts is not None:
        trained = (other for other, arm in ARMS.items() if arm.adapts is None)
        names = dict.fromkeys([*trained, *registry.METHODS.entries])
        raise InputError(
            f"--variant {text}: give NAME=ARM OPTIONS, with an arm of {', '.join(names)}"
        )
    taken = [arm.color for arm in ARMS.values()]
    arm = found._replace(color=min(_PALETTE, key=taken.count), more=(*found.more, *more))
    kept = ARMS.setdefault(name, arm)
    if kept._replace(color=arm.color) != arm:
        raise InputError(f"--variant {text}: there is another arm {name}: give another name")
    return name
