"""BatchNorm with statistics over all processes, on the CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from util.distributed.collectives import all_reduce_sum


class _AllReduceSum(torch.autograd.Function):
    """The sum over all processes; what flows back to each process's share is the sum of the gradients of all.

    torch.distributed.nn.functional.all_reduce is the same, but deprecated since torch 2.14, and its successor is not in
    older versions.
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient.clone())


class SyncBatchNormCPU(nn.BatchNorm2d):
    """BatchNorm with statistics over all processes, on the CPU, where torch's own SyncBatchNorm refuses to train.

    Same formulas, parameters and buffers as nn.BatchNorm2d of the joined batch; gradients flow through the sums.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) float -> the same shape."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        count = x.numel() // x.shape[1] * torch.ones(1, dtype=x.dtype)
        total = _AllReduceSum.apply(torch.cat([x.sum((0, 2, 3)), count]))
        n = total[-1].detach()
        mean = total[:-1] / n
        centred = x - mean[:, None, None]
        # Summed after centring: sums of raw squares would cancel in float32.
        var = _AllReduceSum.apply(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


def convert_batchnorm(module: nn.Module) -> None:
    """Turn every BatchNorm2d in place; the instances, with their parameters and buffers, stay the same objects."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncBatchNormCPU
