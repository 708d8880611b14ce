"""What weak-to-strong consistency is made of: pseudo-labels, CutMix and the consistency loss (UniMatch, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dataset.files import IGNORE_INDEX


def pseudo_label(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, C, H, W) -> pseudo-label int64 (B, H, W) and its confidence (B, H, W), both detached."""
    conf, label = logits.detach().softmax(dim=1).max(dim=1)
    return label, conf


@torch.no_grad()
def predict_pseudo_label(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pseudo-label and confidence of `image` (B, 3, H, W) by the model in eval mode, in which it is left."""
    model.eval()
    return pseudo_label(model(image))


def cutmix(own: torch.Tensor, partner: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """`own` with the partner's values inside the box: images (B, 3, H, W) or maps (B, H, W), box (B, H, W)."""
    inside = box.bool()
    return torch.where(inside.unsqueeze(1) if own.ndim == 4 else inside, partner, own)


def consistency_loss(
    logits: torch.Tensor, label: torch.Tensor, conf: torch.Tensor, ignore_mask: torch.Tensor, conf_thresh: float
) -> torch.Tensor:
    """Cross entropy of logits (B, C, H, W) against confident pseudo-labels (B, H, W), over all valid pixels -> scalar.

    Divided by the valid, not by the confident, pixels: where few are confident they weigh little. 0 if none is valid.
    """
    valid = ignore_mask != IGNORE_INDEX
    loss = F.cross_entropy(logits, label, reduction="none")
    return (loss * (valid & (conf >= conf_thresh))).sum() / valid.sum().clamp(min=1)


def mask_ratio(conf: torch.Tensor, ignore_mask: torch.Tensor, conf_thresh: float) -> torch.Tensor:
    """Share of the valid pixels whose pseudo-label is confident -> scalar in [0, 1]."""
    valid = ignore_mask != IGNORE_INDEX
    return (valid & (conf >= conf_thresh)).sum() / valid.sum().clamp(min=1)
