"""What takes part in a comparison. A further arm is a line in ARMS."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from cac_fast.train.errors import InputError

METHODS = ("supervised", "cac")
"""The arms of a comparison that asks for no others."""


class Arm(NamedTuple):
    """A method of `train/main.py`, the color of its curve, whether it sees the masks of all
    images or those of the list, and its further options."""

    method: str
    color: str
    all_masks: bool = False
    more: tuple[str, ...] = ()


# Cheap ones first: where all masks gain nothing, the others need not run.
ARMS = {
    "supervised": Arm("supervised", "tab:gray"),
    "supervised_all": Arm("supervised", "tab:green", all_masks=True),
    "control": Arm("cac", "tab:orange", more=("--dc-weight", "0")),
    "cac": Arm("cac", "tab:blue"),
    "fixmatch": Arm("fixmatch", "tab:red", more=("--dc-weight", "0")),
    "fixmatch_cac": Arm("fixmatch", "tab:purple", more=("--dc-weight", "0.1")),
}


def add_variant(text: str) -> str:
    """Add the arm `NAME=ARM OPTIONS`, another arm with further options; its name.

    Raises:
        InputError: `text` has another form, or there is another arm of that name.
    """
    name, _, words = text.partition("=")
    base, *more = shlex.split(words) or [""]
    if not name.isidentifier() or base not in ARMS:
        raise InputError(
            f"--variant {text}: give NAME=ARM OPTIONS, with an arm of {', '.join(ARMS)}"
        )
    arm = ARMS[base]._replace(color=f"C{len(ARMS) % 10}", more=(*ARMS[base].more, *more))
    kept = ARMS.setdefault(name, arm)
    if (kept.method, kept.more) != (arm.method, arm.more):
        raise InputError(f"--variant {text}: there is another arm {name}: give another name")
    return name
