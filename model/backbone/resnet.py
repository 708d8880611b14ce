"""ResNet with a deep stem and dilated stages.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385). The stride of a bottleneck is
on its 3x3 convolution, and the stem is three 3x3 convolutions instead of one 7x7: the "v1s" variant, whose ImageNet
weights DeepLab implementations use.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.activation_checkpoint import run


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that pads by its dilation: it keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride, dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 (stride and dilation are here) and 1x1 convolutions, the last four times as wide, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet without its classifier.

    `blocks`: blocks in each of the four stages. `stem`: width of the three stem convolutions. `width`: of stage 1's 3x3
    convolutions; each later stage has twice as many channels.
    `replace_stride_with_dilation`: for stages 2, 3, 4, keep the resolution and dilate instead;
    (False, False, True) gives output stride 16, (False, True, True) gives 8.
    """

    checkpoint_activations = False

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: tuple[int, int, int, int],
        replace_stride_with_dilation: tuple[bool, bool, bool],
        stem: tuple[int, int, int] = (64, 64, 128),
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            conv3x3(3, stem[0], stride=2),
            nn.BatchNorm2d(stem[0]),
            nn.ReLU(inplace=True),
            conv3x3(stem[0], stem[1]),
            nn.BatchNorm2d(stem[1]),
            nn.ReLU(inplace=True),
            conv3x3(stem[1], stem[2]),
        )
        self.bn1 = nn.BatchNorm2d(stem[2])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        self._channels, self._dilation = stem[2], 1  # what the next stage starts from
        dilate2, dilate3, dilate4 = replace_stride_with_dilation
        self.layer1 = self._stage(block, width, blocks[0], stride=1, dilate=False)
        self.layer2 = self._stage(block, 2 * width, blocks[1], stride=2, dilate=dilate2)
        self.layer3 = self._stage(block, 4 * width, blocks[2], stride=2, dilate=dilate3)
        self.layer4 = self._stage(block, 8 * width, blocks[3], stride=2, dilate=dilate4)
        self.c1_channels = width * block.expansion
        self.c4_channels = 8 * width * block.expansion

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, block: type[BasicBlock | Bottleneck], width: int, blocks: int, stride: int, dilate: bool
    ) -> nn.Sequential:
        # As in torchvision, a dilated stage's first block still has the dilation before it: it stands where
        # the stride was, and sees the grid of the stage before.
        first_dilation = self._dilation
        if dilate:
            self._dilation *= stride
            stride = 1
        out_channels = width * block.expansion
        downsample = None
        if stride != 1 or self._channels != out_channels:
            downsample = nn.Sequential(conv1x1(self._channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        layers = [block(self._channels, width, stride, first_dilation, downsample)]
        layers += [block(out_channels, width, 1, self._dilation, None) for _ in range(blocks - 1)]
        self._channels = out_channels
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) -> c1, the output of stage 1 at stride 4, and c4, that of stage 4."""
        return forward_stages(self, x)


def forward_stages(resnet: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Stem and stages of a ResNet, ours or torchvision's: c1 and c4."""

    def stem(x: Tensor) -> Tensor:
        return resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))

    def stage(blocks: nn.Sequential, x: Tensor) -> Tensor:
        for block in blocks:
            x = run(block, x, again=resnet.checkpoint_activations)
        return x

    c1 = stage(resnet.layer1, run(resnet, x, again=resnet.checkpoint_activations, function=stem))
    return c1, stage(resnet.layer4, stage(resnet.layer3, stage(resnet.layer2, c1)))


def resnet10(replace_stride_with_dilation: tuple[bool, bool, bool]) -> ResNet:
    """A block a stage at half the width: small enough to compare methods on a CPU in minutes. From scratch only."""
    return ResNet(BasicBlock, (1, 1, 1, 1), replace_stride_with_dilation, stem=(16, 16, 32), width=32)


def resnet18(replace_stride_with_dilation: tuple[bool, bool, bool]) -> ResNet:
    """A light one for laptops and tests; half the stem width, which would otherwise cost more than all stages."""
    return ResNet(BasicBlock, (2, 2, 2, 2), replace_stride_with_dilation, stem=(32, 32, 64))


def resnet50(replace_stride_with_dilation: tuple[bool, bool, bool]) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), replace_stride_with_dilation)


def resnet101(replace_stride_with_dilation: tuple[bool, bool, bool]) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), replace_stride_with_dilation)
