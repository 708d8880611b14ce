"""A backbone for images of other channels than three: its first convolution inflated from that of RGB."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def inflate_input(backbone: nn.Module, channels: int, rgb: Sequence[int]) -> None:
    """Replace the first convolution (DINOv2: the patch embedding) by one of `channels` inputs, in place.

    The channels `rgb` get the weights of red, green and blue; each other channel gets their mean; all are scaled by
    3 / channels, so that the features of an image whose channels are alike keep their size.
    """
    name, old = next((name, part) for name, part in backbone.named_modules() if isinstance(part, nn.Conv2d))
    shape = (channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation)
    new = nn.Conv2d(*shape, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(inflated(old.weight, channels, rgb))
        if old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, new)


def inflated(weight: Tensor, channels: int, rgb: Sequence[int]) -> Tensor:
    """Weights (O, 3, k, k) -> (O, channels, k, k) by that rule."""
    wide = weight.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1)
    wide[:, list(rgb)] = weight
    return wide * (3 / channels)
