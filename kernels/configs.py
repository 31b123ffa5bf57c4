"""Sizes of tiles by GPU, precision and D: a table, so that nothing is tuned while training.

The lines were chosen by what the compiler reports for them (registers, shared memory, no spills).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """A line of the table.

    tile: anchors of a tile.
    block: negatives of a block.
    warps, stages: Triton's num_warps and num_stages.
    programs: how many of them are to share a multiprocessor.
    """

    tile: int
    block: int
    warps: int
    stages: int
    programs: int


# By GPU, by the precision of the products, by the largest padded D. "half": bfloat16 and float16.
# float32 has no matrix unit on NVIDIA GPUs: bf16x6 makes its products of three bfloat16 parts.
TABLE: dict[str, dict[str, dict[int, Config]]] = {
    "sm_90": {
        "half": {
            64: Config(64, 128, 4, 3, 3),
            128: Config(128, 128, 8, 3, 1),
            256: Config(128, 64, 8, 2, 1),
        },
        "tf32": {128: Config(64, 32, 4, 2, 2), 256: Config(32, 32, 8, 2, 1)},
        "bf16x6": {
            64: Config(64, 32, 4, 2, 2),
            128: Config(64, 16, 4, 2, 2),
            256: Config(16, 16, 8, 1, 1),
        },
    },
    # Within the 99 KB of shared memory that sm_86, sm_89 and sm_120 have.
    "sm_80": {
        "half": {
            64: Config(64, 64, 4, 3, 2),
            128: Config(128, 32, 8, 3, 1),
            256: Config(64, 64, 8, 2, 1),
        },
        "tf32": {128: Config(32, 32, 8, 2, 2), 256: Config(32, 32, 8, 2, 1)},
        "bf16x6": {
            64: Config(32, 32, 4, 2, 2),
            128: Config(32, 32, 8, 2, 1),
            256: Config(16, 16, 8, 1, 1),
        },
    },
    "gfx": {
        "half": {128: Config(64, 64, 4, 2, 2), 256: Config(64, 32, 4, 2, 1)},
        "ieee": {128: Config(64, 32, 4, 2, 2), 256: Config(32, 32, 4, 1, 1)},
    },
}


class Specialized(NamedTuple):
    """As Config, for the kernel whose warps have roles.

    stages: blocks that shared memory holds.
    registers: of a computing thread.
    """

    tile: int
    block: int
    stages: int
    registers: int


# By padded D: bfloat16 and float16 on compute capability 9.0, one program a multiprocessor.
GLUON: dict[int, Specialized] = {
    64: Specialized(128, 128, 8, 240),
    128: Specialized(128, 128, 6, 240),
    256: Specialized(128, 64, 5, 240),
}


class Gpu(NamedTuple):
    """What sizes depend on.

    family: a line of the table.
    multiprocessors: how many there are.
    """

    family: str
    multiprocessors: int


@cache
def describe(device: torch.device) -> Gpu:
    """The GPU behind a device; for the CPU, where only Triton's interpreter runs, a small one."""
    if device.type == "cpu":
        return Gpu("gfx", 3)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        family = "gfx"
    else:
        # Datacenter GPUs; the others have less shared memory.
        family = "sm_90" if properties.major in (9, 10) else "sm_80"
    return Gpu(family, properties.multi_processor_count)


def precision(dtype: torch.dtype, family: str) -> str:
    """How products are made: "half", or for float32 what PyTorch's own matrix products may use."""
    if dtype != torch.float32:
        return "half"
    if family == "gfx":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "bf16x6"


def find(family: str, kind: str, padded: int) -> Config:
    """The table's line for a GPU, a precision and a padded D of at most 256."""
    lines = TABLE[family][kind]
    return lines[min(size for size in lines if size >= padded)]
