"""DINOv2's positional embedding for a grid that is known only when an exported model runs, by a formula.

Bicubic interpolation with the kernel of Keys, "Cubic Convolution Interpolation for Digital Image Processing" (1981),
a = -0.75, as in torch.nn.functional.interpolate. torch.export follows tensors, so neither a cache of matrices nor
a branch may depend on the grid; and ONNX has no interpolation whose scale is not its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

A = -0.75
OFFSET = 0.1  # the release's scale is (size + 0.1) / GRID, not size / GRID


def interpolated(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Values (G, G, width) at the grid of an image, (rows, columns, width); unchanged where that is (G, G) itself.

    `rows` and `columns` may be symbols of torch.export. The same as `F.interpolate` but for rounding.
    """
    size, width = patches.shape[0], patches.shape[2]
    down, across = _count(patches, rows), _count(patches, columns)
    as_stored = (down[-1] == size) & (across[-1] == size)
    patches = _matrix(down, size, as_stored) @ patches.reshape(size, -1)  # rows, G * width
    return _matrix(across, size, as_stored) @ patches.reshape(rows, size, width)


def _count(like: Tensor, size: int) -> Tensor:
    """1, 2, ..., size. Not by arange, which would bind an exported model to the device of its export."""
    return like.new_ones(size).cumsum(0)


def _matrix(count: Tensor, size: int, as_stored: Tensor) -> Tensor:
    """Matrix (N, size) that interpolates `size` values to N, `count` being 1 to N; 1 on its diagonal if `as_stored`."""
    place = torch.where(as_stored, count - 1, (count - 0.5) * (size / (count[-1] + OFFSET)) - 0.5)
    first = place.floor()
    stored = _count(count, size) - 1
    matrix = count.new_zeros(1)
    for neighbour in (-1, 0, 1, 2):
        at = first + neighbour
        weight = _kernel((place - at).abs())
        # Beyond the border the outermost value is repeated.
        matrix = matrix + weight[:, None] * (at.clamp(0, size - 1)[:, None] == stored)
    return matrix


def _kernel(distance: Tensor) -> Tensor:
    near = ((A + 2) * distance - (A + 3)) * distance * distance + 1
    far = ((A * distance - 5 * A) * distance + 8 * A) * distance - 4 * A
    return torch.where(distance <= 1, near, far)
