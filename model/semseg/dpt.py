"""DPT: dense prediction on the tokens of a vision transformer, with UniMatch V2's complementary dropout.

Ranftl et al., "Vision Transformers for Dense Prediction", ICCV 2021 (arXiv 2103.13413); Yang et al., "UniMatch V2",
TPAMI 2025 (arXiv 2410.10777).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activation_checkpoint import run
from model.backbone.dinov2 import PATCH, DINOv2
from model.semseg import resize
from model.semseg.complementary import dropout_factors, own_rows

# Channels of the fused features, and of the features of each tap before they are fused.
HEAD_WIDTHS = {
    "dinov2_small": (64, (48, 96, 192, 384)),
    "dinov2_base": (128, (96, 192, 384, 768)),
    "dinov2_large": (256, (256, 512, 1024, 1024)),
    "dinov2_giant": (384, (1536, 1536, 1536, 1536)),
}


class ResidualUnit(nn.Module):
    """x + conv2(relu(conv1(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu_(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a shallower tap's features to the deeper ones' fused so far, and enlarges the result."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        self.resConfUnit1 = ResidualUnit(channels)
        self.resConfUnit2 = ResidualUnit(channels)

    def forward(self, size: Sequence[int], deeper: Tensor, shallower: Tensor | None = None) -> Tensor:
        x = deeper if shallower is None else deeper + self.resConfUnit1(shallower)
        # The release convolves after resizing. A 1x1 convolution and the interpolation, whose weights sum to 1,
        # give the same in either order, and this one is on a quarter of the pixels.
        return resize(self.out_conv(self.resConfUnit2(x)), size)


class DPTHead(nn.Module):
    """Logits at 8 times the patch grid from the tokens of four blocks.

    The taps become maps at 4, 2, 1 and 1/2 times the patch grid, fused from the deepest on. Module names are the
    release's.
    """

    def __init__(self, width: int, nclass: int, features: int, out_channels: Sequence[int]) -> None:
        super().__init__()
        self.projects = nn.ModuleList(nn.Conv2d(width, channels, 1) for channels in out_channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(out_channels[0], out_channels[0], 4, 4),
                nn.ConvTranspose2d(out_channels[1], out_channels[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(out_channels[3], out_channels[3], 3, 2, 1),
            ]
        )
        scratch = self.scratch = nn.Module()
        for i, channels in enumerate(out_channels, 1):
            scratch.add_module(f"layer{i}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
        for i in range(1, 5):
            scratch.add_module(f"refinenet{i}", Fusion(features))
        scratch.output_conv = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(features, nclass, 1)
        )
        # The deepest features are fused with nothing: this unit has weights in every checkpoint and no input ever, so
        # neither an optimiser nor DDP is to wait for its gradients.
        scratch.refinenet4.resConfUnit1.requires_grad_(False)

    def forward(self, taps: Sequence[Tensor], grid: tuple[int, int], again: bool = False) -> Tensor:
        """Four times tokens (B, gh * gw, width), `grid` = (gh, gw) -> logits (B, nclass, 8 gh, 8 gw).

        `again`: activations are computed again in the backward pass.
        """
        scratch = self.scratch
        r1, r2, r3, r4 = (
            run(self, tokens, grid, i, again=again, function=self._reassemble) for i, tokens in enumerate(taps)
        )
        x = run(scratch.refinenet4, r3.shape[2:], r4, again=again)
        x = run(scratch.refinenet3, r2.shape[2:], x, r3, again=again)
        x = run(scratch.refinenet2, r1.shape[2:], x, r2, again=again)
        x = run(scratch.refinenet1, [2 * side for side in r1.shape[2:]], x, r1, again=again)
        return run(scratch.output_conv, x, again=again)

    def _reassemble(self, tokens: Tensor, grid: tuple[int, int], i: int) -> Tensor:
        """Tokens of tap i (from 0) -> their map, `features` channels wide, at the tap's own scale."""
        x = self.resize_layers[i](self.projects[i](tokens.transpose(1, 2).unflatten(2, grid)))
        return self.scratch.get_submodule(f"layer{i + 1}_rn")(x)


class DPT(nn.Module):
    """DINOv2 and the DPT head. No layer mixes samples, and training and eval mode compute the same.

    `checkpoint_activations`: the parts that are computed again in the backward pass, "none", "backbone" or "all".
    `autocast_dtype`, a 16-bit type, is what the forward pass computes in where that is safe; logits are float32.
    `fp_dropout` is the rate of the channel dropout of UniMatch's feature perturbation; 0 turns it off.
    `share`, (number of this process, processes), is which of a step's samples it has: dropout is drawn for all.
    """

    size_multiple = PATCH  # what an image's sides must be multiples of, in pixels

    def __init__(
        self,
        backbone: DINOv2,
        nclass: int,
        features: int,
        out_channels: Sequence[int],
        checkpoint_activations: str = "none",
    ) -> None:
        super().__init__()
        self.fp_dropout = 0.5
        self.share = (0, 1)
        self.autocast_dtype: torch.dtype | None = None
        self.drop_width = backbone.width
        self.backbone = backbone
        self.backbone.checkpoint_activations = checkpoint_activations != "none"
        self._decode_again = checkpoint_activations == "all"
        self.head = DPTHead(backbone.width, nclass, features, out_channels)

    def forward(
        self, x: Tensor, need_fp: bool = False, comp_drop: bool | Tensor = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised image (B, 3, H, W), H and W multiples of 14 -> logits (B, nclass, H, W).

        `comp_drop`: complementary dropout (UniMatch V2) on a batch of both strong views, [s1; s2]. A tensor
        (B, drop_width) gives the factors, as `complementary_dropout` draws them, say for one view at a time.
        `need_fp`: (logits, logits_fp); logits_fp come from the same features after channel dropout (UniMatch).
        Both go by these flags alone, in eval mode as well. Raises ValueError for other sizes, or an odd batch of pairs.
        """
        height, width = x.shape[2:]
        if height % PATCH or width % PATCH:
            raise ValueError(f"image of {height} x {width} pixels: DINOv2 needs sides that are multiples of {PATCH}")
        factors = dropout_factors(comp_drop, x.shape[0], self.drop_width, self.share)
        if self.autocast_dtype is None:
            logits = self._logits(x, need_fp, factors)
        else:
            with torch.autocast(x.device.type, self.autocast_dtype):
                # In float32 before upsampling: rounded to 16 bits, neighbouring pixels' logits and classes would tie.
                logits = self._logits(x, need_fp, factors).float()
        logits = resize(logits, (height, width))
        return logits.chunk(2) if need_fp else logits

    def _logits(self, x: Tensor, need_fp: bool, factors: Tensor | None) -> Tensor:
        """Logits at 8 times the patch grid; with `need_fp` clean and perturbed ones, (2 B, nclass, ., .)."""
        taps = self.backbone(x)
        if factors is not None:
            # The same for all tokens of all taps. The copy to a GPU is not waited for.
            factors = factors.to(taps[0].device, taps[0].dtype, non_blocking=True).unsqueeze(1)
            taps = [tokens * factors for tokens in taps]
        if need_fp:
            # Drawn for each tap on its own, the shallowest first, as for DeepLabV3+'s two feature maps.
            taps = [torch.cat([tokens, tokens * self._channel_dropout(tokens)]) for tokens in taps]
        return self.head(taps, (x.shape[2] // PATCH, x.shape[3] // PATCH), self._decode_again)

    def _channel_dropout(self, tokens: Tensor) -> Tensor:
        """Factors (B, 1, width). A function, not a module, so that eval mode does not turn it off."""
        whole = tokens.new_ones(len(tokens) * self.share[1], 1, tokens.shape[2])
        return own_rows(F.dropout(whole, self.fp_dropout, training=True), self.share)
