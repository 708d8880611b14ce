"""DINOv2's vision transformer (ViT) with patches of 14 x 14 pixels, without register tokens.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024 (arXiv 2304.07193); Dosovitskiy
et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv 2010.11929).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activation_checkpoint import run
from model.backbone.positions import interpolated

PATCH = 14  # pixels
GRID = 37  # patches per side of the images that the positional embedding is for, of 518 pixels
LAYER_NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """A token for each patch: one convolution without overlap."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; its matrix of tokens x tokens is in memory with the math kernel only."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer, arXiv 2002.05202): w3(silu(a) * b), where a and b are the halves of w12(x).

    Two thirds as wide inside as the plain one, so about as large.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * ((int(4 * width * 2 / 3) + 7) // 8)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention, then MLP; each sees normalised tokens, and its scaled output is added to them."""

    def __init__(self, width: int, heads: int, mlp: type[MLP | SwiGLU]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.mlp = mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """The encoder: `forward` gives the tokens after four of its blocks.

    `width`: channels of a token. `taps`: the four blocks, counted from 0. A frozen encoder, of which no parameter needs
    a gradient, keeps nothing for the backward pass. `exporting`: positions are computed as torch.export can follow.
    """

    checkpoint_activations = False
    exporting = False

    def __init__(self, width: int, depth: int, heads: int, taps: Sequence[int], mlp: type[MLP | SwiGLU] = MLP) -> None:
        super().__init__()
        self.width, self.taps = width, tuple(taps)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + GRID * GRID, width))
        # Of DINOv2's own training. Never used here, so neither an optimiser nor DDP is to wait for its gradient.
        self.mask_token = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(depth))
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self._interpolations: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

        # DINOv2 truncates these normals at 2, which is 100 standard deviations: that is, not at all.
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def __getstate__(self) -> dict[str, Any]:
        """A copy computes its own interpolations: those kept here may be of a FakeTensorMode."""
        return {**self.__dict__, "_interpolations": {}}

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (B, 3, H, W) -> four times (B, H / 14 * W / 14, width): normalised patch tokens, row by row.

        H and W are multiples of 14. The class token takes part in attention and is dropped from what is given.
        """
        frozen = not any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self._tapped(x)

    def _tapped(self, x: Tensor) -> list[Tensor]:
        grid = (x.shape[2] // PATCH, x.shape[3] // PATCH)
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions(grid)
        features = []
        for index, block in enumerate(self.blocks):
            x = run(block, x, again=self.checkpoint_activations)
            if index in self.taps:
                features.append(self.norm(x)[:, 1:])
        return features

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The positional embedding for a grid of patches, (1, 1 + rows * columns, width), the class token's first.

        Bicubic interpolation is linear in what is interpolated and goes along one axis after the other: two matrices,
        which depend on the grid alone. They are kept, not the result: that is never out of date, gradients reach
        `pos_embed`, and what is left to do for each image are two small products.
        """
        if self.exporting:
            patches = interpolated(self.pos_embed[0, 1:].unflatten(0, (GRID, GRID)), *grid)
            return torch.cat([self.pos_embed[:, :1], patches.flatten(0, 1)[None]], dim=1)
        if grid == (GRID, GRID):
            return self.pos_embed
        dtype = torch.promote_types(self.pos_embed.dtype, torch.float32)
        patches = self.pos_embed[0, 1:].to(dtype)
        rows, columns = (self._interpolation(size, dtype) for size in grid)
        with torch.autocast(patches.device.type, enabled=False):
            patches = rows @ patches.view(GRID, -1)  # rows, GRID * width
            patches = columns @ patches.view(grid[0], GRID, -1)  # rows, columns, width
        return torch.cat([self.pos_embed[:, :1], patches.view(1, -1, self.width).to(self.pos_embed.dtype)], dim=1)

    def _interpolation(self, size: int, dtype: torch.dtype) -> Tensor:
        """Matrix (size, GRID) that interpolates GRID values to `size`."""
        device = self.pos_embed.device
        key = (size, dtype, device)
        if key not in self._interpolations:
            # Not as inference tensors, with which training could not go on.
            with torch.inference_mode(False), torch.no_grad():
                identity = torch.eye(GRID, dtype=dtype, device=device).view(1, GRID, GRID, 1)
                # The release computes source coordinates with this scale, not with size / GRID.
                scale = ((size + 0.1) / GRID, 1.0)
                matrix = F.interpolate(identity, scale_factor=scale, mode="bicubic", align_corners=False)
                self._interpolations[key] = matrix[0, :, :, 0].T.contiguous()
        return self._interpolations[key]


def dinov2_small() -> DINOv2:
    return DINOv2(width=384, depth=12, heads=6, taps=(2, 5, 8, 11))


def dinov2_base() -> DINOv2:
    return DINOv2(width=768, depth=12, heads=12, taps=(2, 5, 8, 11))


def dinov2_large() -> DINOv2:
    return DINOv2(width=1024, depth=24, heads=16, taps=(4, 11, 17, 23))


def dinov2_giant() -> DINOv2:
    return DINOv2(width=1536, depth=40, heads=24, taps=(9, 19, 29, 39), mlp=SwiGLU)
