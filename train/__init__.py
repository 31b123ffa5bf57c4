"""The trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cac_fast.train.inference import Predictor

__all__ = ["load"]


def load(path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Load a run's `best.pt` or `last.pt` for inference, in eval mode, on `device`.

    Raises:
        InputError: the file is missing, truncated, or no checkpoint of this program.
    """
    # Imported late: every command imports this package, and answers mistakes without torchvision.
    from cac_fast.train.inference import load as load_predictor

    return load_predictor(path, device)
