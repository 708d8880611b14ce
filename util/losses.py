"""Supervised losses: plain cross entropy and OHEM. Neither reads a value back from the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from dataset.files import IGNORE_INDEX

if TYPE_CHECKING:
    from util.config_schema import Config


# Values of logits that a slice holds: few enough for a CPU's cache, enough to keep a device busy.
CPU_SLICE, DEVICE_SLICE = 2**20, 2**26


class CrossEntropy(nn.Module):
    """Cross entropy, mean over the pixels that are not ignored; 0, not NaN, where there are none."""

    def __init__(self, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """logits (B, C, H, W) float, label (B, H, W) int64 -> scalar."""
        total = pixel_cross_entropy(logits, label, self.ignore_index).sum()
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
        loss = pixel_cross_entropy(logits, label, self.ignore_index)
        kept = label != self.ignore_index
        if 0 < self.min_kept <= loss.numel():
            prob = torch.exp(-loss.detach())  # 1 on ignored pixels, whose loss is 0
            hard = prob <= self.thresh
            if not (reading_is_free(hard) and hard.sum() >= self.min_kept):  # else q <= thresh
                # The min_kept-th smallest p; on a CPU this is faster than kthvalue and than a sort.
                smallest = prob.flatten().topk(self.min_kept, largest=False, sorted=False).values
                hard = prob <= smallest.max().clamp(min=self.thresh)
            kept = kept & (hard | (kept.sum() < self.min_kept))
        return (loss * kept).sum() / kept.sum().clamp(min=1)


def pixel_cross_entropy(logits: torch.Tensor, label: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """F.cross_entropy(..., reduction="none") of logits (B, C, H, W) -> (B, H, W), in float32 for 16-bit logits.

    It works slice by slice: neither pass holds a softmax of the whole batch, and only the logits are saved for the
    backward pass.
    """
    return _PixelCrossEntropy.apply(logits, label, ignore_index)


class _PixelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, label: torch.Tensor, ignore_index: int) -> torch.Tensor:
        ctx.save_for_backward(logits, label)
        ctx.ignore_index = ignore_index
        return torch.cat(
            [
                F.cross_entropy(upcast(part), true, ignore_index=ignore_index, reduction="none")
                for part, true in zip(slices(logits), slices(label, logits), strict=True)
            ],
            dim=-2,
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, label = ctx.saved_tensors
        valid = label != ctx.ignore_index
        gradient = torch.where(valid, gradient, 0).unsqueeze(1)
        label = torch.where(valid, label, 0).unsqueeze(1)
        result = torch.empty_like(logits)
        parts = zip(slices(logits), slices(label, logits), slices(gradient, logits), slices(result), strict=True)
        for part, true, weight, out in parts:
            # (softmax - one-hot) * weight
            prob = upcast(part).softmax(dim=1).mul_(weight)
            out.copy_(prob.scatter_add_(1, true, -weight))
        return result, None, None


def upcast(logits: torch.Tensor) -> torch.Tensor:
    """float32 for logits of 16 bits, in which autocast computes; others as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def slices(tensor: torch.Tensor, like: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Split (..., H, W) along H into views whose size suits logits of this shape, or of that of `like`."""
    like = tensor if like is None else like
    size = CPU_SLICE if like.device.type == "cpu" else DEVICE_SLICE
    return tensor.split(max(1, size * like.shape[-2] // max(1, like.numel())), dim=-2)


def reading_is_free(tensor: torch.Tensor) -> bool:
    """Whether a branch may read values: the host would wait for a device, and a compiler has no values."""
    return tensor.device.type == "cpu" and type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def build_criterion(cfg: Config) -> nn.Module:
    """The supervised loss that `cfg.criterion` names."""
    if cfg.criterion.name == "OHEM":
        return OhemCrossEntropy(IGNORE_INDEX, cfg.criterion.thresh, cfg.criterion.min_kept)
    return CrossEntropy(IGNORE_INDEX)
