"""Which paths of the operator have run, and were right, on which GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Proof(NamedTuple):
    """A path that ran and was right on a GPU.

    architecture: as `architecture` names it.
    path: a back end's name.
    record: the file below bench/results/ that shows it, as bench/dc_loss.py writes it.
    """

    architecture: str
    path: str
    record: str


# Of each architecture the fastest path first. tests/test_proven.py holds each line to its record.
PROOFS: tuple[Proof, ...] = ()


def architecture(device: torch.device) -> str:
    """That of a GPU: "sm_90" on NVIDIA, "gfx942" on AMD."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def proven_paths(device: torch.device) -> list[str]:
    """The back ends proven on GPUs like this one, the fastest first."""
    here = architecture(device) if PROOFS else None
    return [proof.path for proof in PROOFS if proof.architecture == here]
