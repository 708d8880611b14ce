"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, lr: float, lr_multi: float, momentum: float = 0.9, weight_decay: float = 1e-4
) -> torch.optim.SGD:
    """SGD with two parameter groups: the backbone at `lr`, all else at `lr * lr_multi`; on a GPU its fused kernel."""
    backbone = [p for name, p in model.named_parameters() if "backbone" in name.split(".")]
    rest = [p for name, p in model.named_parameters() if "backbone" not in name.split(".")]
    groups = [
        {"params": backbone, "lr": lr, "base_lr": lr},
        {"params": rest, "lr": lr * lr_multi, "base_lr": lr * lr_multi},
    ]
    # With float16's scaler the fused kernel is also the one that does not wait for the device.
    fused = all(p.device.type == "cuda" for p in model.parameters()) or None
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)


def poly_lr(lr: float, iteration: int, total: int, power: float = 0.9) -> float:
    """Learning rate of step `iteration` (from 0) of `total`: lr * (1 - max(iteration - 1, 0) / total) ** power.

    The release sets the rate after the step: steps 0 and 1 share it.
    """
    return lr * (1 - max(iteration - 1, 0) / total) ** power


def set_poly_lr(optimizer: torch.optim.Optimizer, iteration: int, total: int) -> None:
    """Set every group's rate for step `iteration`; the group's `base_lr` is the rate at the start."""
    for group in optimizer.param_groups:
        group["lr"] = poly_lr(group["base_lr"], iteration, total)
