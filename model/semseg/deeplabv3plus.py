"""DeepLabV3+ with UniMatch's feature perturbation.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018
(arXiv 1802.02611); Yang et al., "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation",
CVPR 2023 (arXiv 2208.09910), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activation_checkpoint import run
from model.semseg import resize
from model.semseg.atrous import AtrousConv2d
from model.semseg.complementary import dropout_factors, own_rows


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> list[nn.Module]:
    """Convolution (3x3 if dilated) that keeps the size, BN, ReLU: the layers, to stand in a longer Sequential."""
    if dilation == 1:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    else:
        conv = AtrousConv2d(in_channels, out_channels, dilation)
    return [
        conv,
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class ImagePooling(nn.Module):
    """The mean over the image, through a 1x1 convolution, at every position."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.gap = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # Interpolating a single pixel repeats it.
        return self.gap(x).expand(-1, -1, *x.shape[2:])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three dilated 3x3 and an image-pooling branch, concatenated, projected."""

    def __init__(self, in_channels: int, out_channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.b0 = nn.Sequential(*conv_bn_relu(in_channels, out_channels, 1))
        self.b1 = nn.Sequential(*conv_bn_relu(in_channels, out_channels, 3, dilations[0]))
        self.b2 = nn.Sequential(*conv_bn_relu(in_channels, out_channels, 3, dilations[1]))
        self.b3 = nn.Sequential(*conv_bn_relu(in_channels, out_channels, 3, dilations[2]))
        self.b4 = ImagePooling(in_channels, out_channels)
        self.project = nn.Sequential(*conv_bn_relu(5 * out_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # Pooling comes first here, so its gradient is added last in the backward pass. That gradient is never in
        # channels_last format: were it first, all others would be added to it in a slow order of memory.
        pooled = self.b4(x)
        return self.project(torch.cat([self.b0(x), self.b1(x), self.b2(x), self.b3(x), pooled], dim=1))


class DeepLabV3Plus(nn.Module):
    """Backbone, ASPP head on c4, decoder on its output and c1, per-pixel classifier.

    `backbone(x)` gives (c1, c4); the decoder is an eighth of c4 wide (256 for 2048).
    `checkpoint_activations`: the parts that are computed again in the backward pass, "none", "backbone" or "all".
    `autocast_dtype`, a 16-bit type, is what the forward pass computes in where that is safe; logits are float32.
    `fp_dropout` is the rate of the channel dropout of the feature perturbation; 0 turns it off.
    `share`, (number of this process, processes), is which of a step's samples it has: dropout is drawn for all.
    """

    size_multiple = 1  # what an image's sides must be multiples of, in pixels
    REDUCED_CHANNELS = 48  # of c1, so that it does not outweigh the head's output

    def __init__(
        self,
        backbone: nn.Module,
        nclass: int,
        dilations: Sequence[int] = (6, 12, 18),
        checkpoint_activations: str = "none",
    ) -> None:
        super().__init__()
        width = backbone.c4_channels // 8
        self.fp_dropout = 0.5
        self.share = (0, 1)
        self.autocast_dtype: torch.dtype | None = None
        self.drop_width = backbone.c1_channels + backbone.c4_channels
        self.backbone = backbone
        self.backbone.checkpoint_activations = checkpoint_activations != "none"
        self._decode_again = checkpoint_activations == "all"
        self.head = ASPP(backbone.c4_channels, width, dilations)
        self.reduce = nn.Sequential(*conv_bn_relu(backbone.c1_channels, self.REDUCED_CHANNELS, 1))
        self.fuse = nn.Sequential(
            *conv_bn_relu(self.REDUCED_CHANNELS + width, width, 3),
            *conv_bn_relu(width, width, 3),
        )
        self.classifier = nn.Conv2d(width, nclass, 1)

    def forward(
        self, x: Tensor, need_fp: bool = False, comp_drop: bool | Tensor = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised image (B, 3, H, W) -> logits (B, nclass, H, W); with `need_fp`, (logits, logits_fp).

        logits_fp come from the same features after channel dropout (UniMatch, section 3.2), in eval mode as well.
        `comp_drop`: complementary dropout (UniMatch V2) of c1 and c4 on a batch of both strong views, [s1; s2]. A
        tensor (B, drop_width) gives the factors, c1's first, as `complementary_dropout` draws them.
        """
        factors = dropout_factors(comp_drop, x.shape[0], self.drop_width, self.share)
        if self.autocast_dtype is None:
            logits = self._logits(x, need_fp, factors)
        else:
            with torch.autocast(x.device.type, self.autocast_dtype):
                # In float32 before upsampling: rounded to 16 bits, neighbouring pixels' logits and classes would tie.
                logits = self._logits(x, need_fp, factors).float()
        logits = resize(logits, x.shape[2:])
        return logits.chunk(2) if need_fp else logits

    def _logits(self, x: Tensor, need_fp: bool, factors: Tensor | None) -> Tensor:
        """Logits at stride 4, (B, nclass, h, w), or clean and perturbed ones (2 B, nclass, h, w)."""
        c1, c4 = self.backbone(x)
        if factors is not None:
            factors = factors.to(c1.device, c1.dtype, non_blocking=True)[:, :, None, None]
            c1, c4 = (c * part for c, part in zip((c1, c4), factors.split([c1.shape[1], c4.shape[1]], 1), strict=True))
        if not need_fp:
            return self._decode(c1, c4)
        # Drawn for c1 first. Functions, not modules, so that eval mode does not turn them off.
        return self._decode(c1, c4, self._channel_dropout(c1), self._channel_dropout(c4))

    def _channel_dropout(self, c: Tensor) -> Tensor:
        """Factors (B, channels, 1, 1)."""
        whole = c.new_ones(c.shape[0] * self.share[1], c.shape[1], 1, 1)
        return own_rows(F.dropout2d(whole, self.fp_dropout, training=True), self.share)

    def _decode(self, c1: Tensor, c4: Tensor, *drops: Tensor) -> Tensor:
        """(B, c1_channels, h, w), (B, c4_channels, ., .) -> logits (B, nclass, h, w).

        With `drops`, factors (B, channels, 1, 1) for c1 and c4, clean and dropped features go through the decoder as
        one batch of 2 B: its BN statistics cover both.
        """
        drop1, drop4 = drops or (None, None)
        c4 = run(self, c4, drop4, again=self._decode_again, function=self._context)
        return run(self, c1, c4, drop1, again=self._decode_again, function=self._classify)

    def _context(self, c4: Tensor, drop: Tensor | None) -> Tensor:
        return self.head(_with_dropped(c4, drop))

    def _classify(self, c1: Tensor, context: Tensor, drop: Tensor | None) -> Tensor:
        context = resize(context, c1.shape[2:])
        return self.classifier(self.fuse(torch.cat([self.reduce(_with_dropped(c1, drop)), context], dim=1)))


def _with_dropped(features: Tensor, drop: Tensor | None) -> Tensor:
    return features if drop is None else torch.cat([features, features * drop])
