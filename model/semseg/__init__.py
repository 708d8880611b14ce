"""Segmentation heads: DeepLabV3+ with its atrous convolution, DPT, and the complementary dropout of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear; corner pixels stay corner pixels."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
