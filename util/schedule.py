"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(
    model: nn.Module,
    lr: float,
    lr_multi: float,
    kind: str = "sgd",
    weight_decay: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """Two parameter groups, the backbone at `lr` and all else at `lr * lr_multi`; on a GPU the fused kernel.

    `kind` is sgd (momentum 0.9) or adamw; `weight_decay` is 1e-4 and 0.01 by default, on every parameter. Parameters
    that need no gradient are left out, so a locked backbone's group is empty.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["backbone" in name.split(".")].append(parameter)
    groups = [
        {"params": groups[True], "lr": lr, "base_lr": lr},
        {"params": groups[False], "lr": lr * lr_multi, "base_lr": lr * lr_multi},
    ]
    # With float16's scaler the fused kernel is also the one that does not wait for the device.
    fused = all(p.device.type == "cuda" for p in model.parameters()) or None
    if kind == "adamw":
        weight_decay = 0.01 if weight_decay is None else weight_decay
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    weight_decay = 1e-4 if weight_decay is None else weight_decay
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=fused)


def poly_lr(lr: float, iteration: int, total: int, power: float = 0.9) -> float:
    """Learning rate of step `iteration` (from 0) of `total`: lr * (1 - max(iteration - 1, 0) / total) ** power.

    The release sets the rate after the step: steps 0 and 1 share it.
    """
    return lr * (1 - max(iteration - 1, 0) / total) ** power


def set_poly_lr(optimizer: torch.optim.Optimizer, iteration: int, total: int) -> None:
    """Set every group's rate for step `iteration`; the group's `base_lr` is the rate at the start."""
    for group in optimizer.param_groups:
        group["lr"] = poly_lr(group["base_lr"], iteration, total)
