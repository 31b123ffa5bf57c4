"""The directional contrastive loss of "Semi-supervised Semantic Segmentation with Directional
Context-aware Consistency" (Lai et al., CVPR 2021), with its feature bank and crop geometry."""

from __future__ import annotations

from cac_fast._extension import build_info
from cac_fast.backend import backends
from cac_fast.bank import FeatureBank
from cac_fast.choice import settle_backend, verify
from cac_fast.loss import (
    DCLossOutput,
    DirectionalContrastiveLoss,
    directional_contrastive_loss,
)
from cac_fast.overlap import Overlap, overlap_from_crops
from cac_fast.verification import Verification, VerificationError

__version__ = "0.1.0"

__all__ = [
    "DCLossOutput",
    "DirectionalContrastiveLoss",
    "FeatureBank",
    "Overlap",
    "Verification",
    "VerificationError",
    "__version__",
    "backends",
    "build_info",
    "directional_contrastive_loss",
    "overlap_from_crops",
    "settle_backend",
    "verify",
]
