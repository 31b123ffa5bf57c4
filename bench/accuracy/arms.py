"""What takes part in a comparison. A further arm is a line in ARMS."""

from __future__ import annotations

from typing import NamedTuple

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
