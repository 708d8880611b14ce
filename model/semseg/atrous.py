"""Atrous convolution whose weights' gradient, on a CPU, skips what falls into the padding.

With a dilation near the size of the feature map most taps of most positions see padding only: of 21 x 21 features (crop
321 at output stride 16) a dilation of 18 leaves 18% of the products. oneDNN skips the rest in the forward pass and in
the gradient of the input, not in that of the weights. GPUs keep their own kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AtrousConv2d(nn.Conv2d):
    """3x3 convolution without bias, padded by its dilation: it keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled() and _share_inside(x, self.dilation[0]) <= 0.5:
            # In the type of x, which autocast chose: cast once, for the forward and the backward pass.
            return _SkippingPadding.apply(x, self.weight.to(x.dtype), self.dilation[0])
        return super().forward(x)


class _SkippingPadding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return F.conv2d(x, weight, padding=dilation, dilation=dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved = ctx.saved_tensors
        # Under autocast the output may have fewer bits than x.
        x, weight = (tensor.to(gradient.dtype) for tensor in saved)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            size = {"padding": ctx.dilation, "dilation": ctx.dilation}
            of_x = torch.nn.grad.conv2d_input(x.shape, weight, gradient, **size).to(saved[0].dtype)
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(x, gradient, weight, ctx.dilation).to(saved[1].dtype)
        return of_x, of_weight, None


def weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """x (B, I, H, W), gradient of the output (B, O, H, W) -> gradient of the weight (O, I, 3, 3), in its layout."""
    result = torch.empty_like(weight)
    for i, (rows, rows_seen) in enumerate(_taps(x.shape[2], dilation)):
        for j, (columns, columns_seen) in enumerate(_taps(x.shape[3], dilation)):
            result[:, :, i, j] = torch.einsum(
                "bohw,bihw->oi", gradient[:, :, rows, columns], x[:, :, rows_seen, columns_seen]
            )
    return result


def _taps(size: int, dilation: int) -> list[tuple[slice, slice]]:
    """Of the three taps along an axis: the outputs for which it lies inside, and the inputs that it sees there."""
    inside = max(size - dilation, 0)
    low, high = slice(0, inside), slice(min(dilation, size), size)
    return [(high, low), (slice(0, size), slice(0, size)), (low, high)]


def _share_inside(x: Tensor, dilation: int) -> float:
    """Share of the taps of x (B, C, H, W) that do not fall into the padding."""
    height, width = (1 + 2 * max(size - dilation, 0) / size for size in x.shape[2:])
    return height * width / 9
