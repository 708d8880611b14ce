"""Aligned Xception-65 at output stride 16.

Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017 (arXiv 1610.02357), as changed for
segmentation by Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018 (arXiv 1802.02611).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from model.activation_checkpoint import run

# Of every BatchNorm here; ImageNet training used it, and fine-tuning keeps it.
BN_MOMENTUM = 0.0003


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=BN_MOMENTUM)


class SeparableConv(nn.Module):
    """Depthwise 3x3 convolution, BN, pointwise convolution, BN; with `relu`, a ReLU after each BN."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, relu: bool = False) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = batch_norm(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = batch_norm(out_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.depthwise(x))
        if self.relu:
            x = F.relu_(x)
        x = self.bn2(self.pointwise(x))
        return F.relu_(x) if self.relu else x


class Block(nn.Module):
    """Three separable convolutions, each after a ReLU, and a shortcut.

    Channels grow at the first convolution, or at the second (`grow_second`); the third has the stride.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, grow_second: bool = False) -> None:
        super().__init__()
        if stride != 1 or in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.skipbn = batch_norm(out_channels)
        else:
            self.skip = None
        width = in_channels if grow_second else out_channels
        self.sepconv1 = SeparableConv(in_channels, width)
        self.sepconv2 = SeparableConv(width, out_channels)
        self.sepconv3 = SeparableConv(out_channels, out_channels, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in, H, W) -> the block's output, and the output of its second separable convolution, at full size."""
        activated = F.relu(x)
        # The release's ReLU works in place, so its identity shortcut sees the input after the ReLU; the published
        # weights were trained so. A shortcut with a convolution is computed before and sees the raw input.
        shortcut = activated if self.skip is None else self.skipbn(self.skip(x))
        second = self.sepconv2(F.relu_(self.sepconv1(activated)))
        out = self.sepconv3(F.relu(second))  # not in place: block 2's `second` is c1
        out += shortcut
        return out, second


class Xception65(nn.Module):
    """Xception-65 without its classifier: strides 2 in conv1 and blocks 1, 2, 3; dilation 1 everywhere."""

    c1_channels = 256
    c4_channels = 2048
    checkpoint_activations = False

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = batch_norm(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn2 = batch_norm(64)

        self.block1 = Block(64, 128, stride=2)
        self.block2 = Block(128, 256, stride=2)
        self.block3 = Block(256, 728, stride=2)
        for i in range(4, 20):
            self.add_module(f"block{i}", Block(728, 728))
        self.block20 = Block(728, 1024, grow_second=True)

        self.conv3 = SeparableConv(1024, 1536, relu=True)
        self.conv4 = SeparableConv(1536, 1536, relu=True)
        self.conv5 = SeparableConv(1536, 2048, relu=True)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Outputs are counted as if depthwise convolutions were dense, unlike kaiming_normal_'s fan_out.
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) -> c1, inside block 2 before its stride (stride 4), and c4 (stride 16)."""
        again = self.checkpoint_activations
        x, _ = run(self.block1, run(self, x, again=again, function=self._stem), again=again)
        x, c1 = run(self.block2, x, again=again)
        for i in range(3, 21):
            x, _ = run(getattr(self, f"block{i}"), x, again=again)
        for conv in (self.conv3, self.conv4, self.conv5):
            x = run(conv, x, again=again)
        return c1, x

    def _stem(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x))))))


def xception65(replace_stride_with_dilation: tuple[bool, bool, bool]) -> Xception65:
    """Raises ValueError if another output stride than 16 is asked for."""
    if replace_stride_with_dilation != (False, False, True):
        raise ValueError(
            "replace_stride_with_dilation: backbone xception has output stride 16 only, "
            f"set [false, false, true] (got {[bool(dilate) for dilate in replace_stride_with_dilation]})"
        )
    return Xception65()
