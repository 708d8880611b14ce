"""torchvision's own ResNets, whose stem is one 7x7 convolution: its ImageNet weights are the ones that everyone has.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385).
"""

from __future__ import annotations

from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

from model.backbone.resnet import forward_stages


class TorchvisionResNet(ResNet):
    """torchvision's ResNet without its classifier; `blocks`: blocks in each of the four stages."""

    c1_channels = 256
    c4_channels = 2048
    checkpoint_activations = False

    def __init__(self, blocks: list[int], replace_stride_with_dilation: tuple[bool, bool, bool]) -> None:
        super().__init__(Bottleneck, blocks, replace_stride_with_dilation=list(replace_stride_with_dilation))
        del self.avgpool, self.fc

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) -> c1, the output of stage 1 at stride 4, and c4, that of stage 4."""
        return forward_stages(self, x)


def resnet50_tv(replace_stride_with_dilation: tuple[bool, bool, bool]) -> TorchvisionResNet:
    return TorchvisionResNet([3, 4, 6, 3], replace_stride_with_dilation)


def resnet101_tv(replace_stride_with_dilation: tuple[bool, bool, bool]) -> TorchvisionResNet:
    return TorchvisionResNet([3, 4, 23, 3], replace_stride_with_dilation)
