"""What weak-to-strong consistency is made of: pseudo-labels, CutMix and the consistency loss (UniMatch, section 3)."""

from __future__ import annotations

import torch
from torch import nn

from dataset.files import IGNORE_INDEX
from dataset.views import Partner
from util.losses import pixel_cross_entropy, slices, upcast


def pseudo_label(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, C, H, W) -> pseudo-label int64 (B, H, W) and its confidence (B, H, W), both detached."""
    labels, confs = [], []
    for part in slices(logits.detach()):
        top, label = upcast(part).max(dim=1, keepdim=True)
        labels.append(label.squeeze(1))
        # The largest softmax probability is exp(top) / sum(exp(logits)).
        confs.append((upcast(part) - top).exp_().sum(dim=1).reciprocal_())
    return torch.cat(labels, dim=1), torch.cat(confs, dim=1)


@torch.no_grad()
def predict_pseudo_label(model: nn.Module, partner: Partner) -> tuple[torch.Tensor, torch.Tensor]:
    """Pseudo-label (B, H, W) and confidence of the partner's weak views by the model in eval mode, in which it is left.

    Where only some of the samples are `used`, the model sees these only (samples do not mix in eval mode), and the
    others' values are 0.
    """
    model.eval()
    used = getattr(partner, "used", None)  # UnlabeledViews have none: they are whole
    if used is None:
        return pseudo_label(model(partner.weak))
    label = torch.zeros_like(partner.ignore_mask, dtype=torch.int64)
    conf = torch.zeros_like(partner.ignore_mask, dtype=partner.weak.dtype)
    if len(partner.weak):
        own_label, own_conf = pseudo_label(model(partner.weak))
        label, conf = label.index_copy(0, used, own_label), conf.index_copy(0, used, own_conf)
    return label, conf


def cutmix(own: torch.Tensor, partner: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """`own` with the partner's values inside the box: images (B, 3, H, W) or maps (B, H, W), box (B, H, W)."""
    inside = box.bool()
    return torch.where(inside.unsqueeze(1) if own.ndim == 4 else inside, partner, own)


def cutmix_reversed(own: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """CutMix whose partner is the reversed batch: inside its box, sample k gets what sample B - 1 - k has."""
    return cutmix(own, own.flip(0), box)


def consistency_loss(
    logits: torch.Tensor, label: torch.Tensor, conf: torch.Tensor, ignore_mask: torch.Tensor, conf_thresh: float
) -> torch.Tensor:
    """Cross entropy of logits (B, C, H, W) against confident pseudo-labels (B, H, W), over all valid pixels -> scalar.

    Divided by the valid, not by the confident, pixels: where few are confident they weigh little. 0 if none is valid.
    """
    valid = ignore_mask != IGNORE_INDEX
    loss = pixel_cross_entropy(logits, label)
    return (loss * (valid & (conf >= conf_thresh))).sum() / valid.sum().clamp(min=1)


def mask_ratio(conf: torch.Tensor, ignore_mask: torch.Tensor, conf_thresh: float) -> torch.Tensor:
    """Share of the valid pixels whose pseudo-label is confident -> scalar in [0, 1]."""
    valid = ignore_mask != IGNORE_INDEX
    return (valid & (conf >= conf_thresh)).sum() / valid.sum().clamp(min=1)
