"""Supervised losses: plain cross entropy and OHEM. Neither reads a value back from the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from dataset.files import IGNORE_INDEX

if TYPE_CHECKING:
    from util.config import Config


class CrossEntropy(nn.Module):
    """Cross entropy, mean over the pixels that are not ignored; 0, not NaN, where there are none."""

    def __init__(self, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """logits (B, C, H, W) float, label (B, H, W) int64 -> scalar."""
        total = F.cross_entropy(logits, label, ignore_index=self.ignore_index, reduction="sum")
        return total / (label != self.ignore_index).sum().clamp(min=1)


class OhemCrossEntropy(nn.Module):
    """Cross entropy of the hard pixels only (online hard example mining).

    p = softmax probability of the true class. Kept are the pixels with p <= max(thresh, q), q being the `min_kept`-th
    smallest p of this process's batch (ignored pixels count as p = 1). With fewer valid pixels than `min_kept`, or with
    min_kept = 0, every valid pixel is kept.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX, thresh: float = 0.7, min_kept: int = 200_000) -> None:
        super().__init__()
        self.ignore_index, self.thresh, self.min_kept = ignore_index, thresh, min_kept

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """logits (B, C, H, W) float, label (B, H, W) int64 -> scalar."""
        loss = F.cross_entropy(logits, label, ignore_index=self.ignore_index, reduction="none")
        kept = label != self.ignore_index
        if 0 < self.min_kept <= loss.numel():
            prob = torch.exp(-loss.detach())  # 1 on ignored pixels, whose loss is 0
            threshold = prob.flatten().kthvalue(self.min_kept).values.clamp(min=self.thresh)
            few_valid = kept.sum() < self.min_kept
            kept = kept & ((prob <= threshold) | few_valid)
        return (loss * kept).sum() / kept.sum().clamp(min=1)


def build_criterion(cfg: Config) -> nn.Module:
    """The supervised loss that `cfg.criterion` names."""
    if cfg.criterion.name == "OHEM":
        return OhemCrossEntropy(IGNORE_INDEX, cfg.criterion.thresh, cfg.criterion.min_kept)
    return CrossEntropy(IGNORE_INDEX)
