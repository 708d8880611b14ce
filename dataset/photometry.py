"""Photometry of a whole batch on its device: the strong views' jitter, grey and blur, whatever each sample drew.

Every sample goes through the same operations, with numbers of its own: blends before the hue, the hue, blends after it,
grey, blur. What a sample did not draw has numbers that change nothing. So a batch takes the same kernels every time,
and no value is read back. The arithmetic is Pillow's on 8-bit values: less than one value in a million is a level off.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dataset.transform import Photometry

# A blend is other + factor * (image - other); the other is black, the mean grey or the grey picture: the shares of both
# greys in it. UNCHANGED is a whole blend, with its factor.
BLENDS = {"brightness": (0.0, 0.0), "contrast": (1.0, 0.0), "saturation": (0.0, 1.0)}
UNCHANGED = (1.0, 0.0, 0.0)
BOX_BLURS = 3  # stand for a Gaussian blur, along each side
REACH = 2  # pixels that one of them mixes in on each side, with the largest radius drawn, 2
NUMBERS = 2 * 3 * len(BLENDS) + 2 + 2 * REACH + 1


def photometry_numbers(photometry: Photometry) -> list[float]:
    """What was drawn as NUMBERS numbers: three blends, the hue's shift, three blends, grey, weights of the blur."""
    before, after, shift = [], [], -1
    side = before
    for name, factor in photometry.jitter:
        if name == "hue":
            shift, side = int(factor * 255) % 256, after  # 8-bit hues wrap
        else:
            side += (factor, *BLENDS[name])
    for side in (before, after):
        side += UNCHANGED * (len(BLENDS) - len(side) // 3)
    return [*before, shift, *after, photometry.grey, *_blur_weights(photometry.blur_radius)]


def apply_photometry_batch(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The strong views of 8-bit images (N, 3, H, W), uint8, on their device: nearly those of `apply_photometry`.

    `numbers`: float32 (N, NUMBERS) of `photometry_numbers`, on the same device.
    """
    sizes = (9, 1, 9, 1, 2 * REACH + 1)
    before, shift, after, grey, weights = numbers[:, :, None, None, None].split(sizes, dim=1)
    image = images.float()
    for blend in before.split(3, dim=1):
        image = _blend(image, *blend.unbind(1))
    image = _shift_hue(image, shift[:, 0])
    for blend in after.split(3, dim=1):
        image = _blend(image, *blend.unbind(1))
    image = torch.where(grey[:, 0] > 0, _grey(image), image)
    return _blur(image, weights[..., 0, 0, 0]).to(torch.uint8)


def _blend(image: torch.Tensor, factor: torch.Tensor, of_mean: torch.Tensor, of_grey: torch.Tensor) -> torch.Tensor:
    """other + factor * (image - other), cut to 8 bits; the other is black, the mean grey or the grey picture."""
    grey = _grey(image)
    mean = (grey.mean((2, 3), keepdim=True, dtype=torch.float64) + 0.5).floor().float()
    other = grey * of_grey + mean * of_mean
    return ((image - other) * factor).add_(other).clamp_(0, 255).floor_()


def _grey(image: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W): ITU-R 601 luma in 16-bit fixed point. All sums are below 2**24, so float32 holds them exactly."""
    red, green, blue = image.split(1, dim=1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).div_(65536).floor_()


def _shift_hue(image: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """To 8-bit hue, saturation and value, the hue shifted, and back; -1 leaves an image as it is."""
    top = image.amax(1, keepdim=True)
    span = top - image.amin(1, keepdim=True)
    # In float64, but kept in float32, as Pillow does: hue and saturation are cut off, and some are just below a number.
    red, green, blue = ((top - image) / span.clamp(min=1)).double().split(1, dim=1)
    hue = torch.where(green == 0, 2 + red - blue, 4 + green - red)
    hue = torch.where(red == 0, blue - green, hue).float().double()
    hue = ((hue / 6 + 1) % 1).float().double().mul_(255).floor_().float()
    saturation = (span / top.clamp(min=1)).double().mul_(255).floor_().float()
    position = (hue + shift) % 256 * 6 / 255
    # Each channel is at its top for two sixths of the circle, falls for one, is low for two and rises for one.
    start = torch.arange(5, 0, -2, device=image.device).view(3, 1, 1)
    turn = (position + start) % 6
    shifted = (top - top * (saturation / 255) * torch.minimum(turn, 4 - turn).clamp_(0, 1)).round_()
    return torch.where(shift < 0, image, shifted)


def _blur_weights(radius: float | None) -> list[float]:
    """2 * REACH + 1 weights of the box blur that, three times, is nearly a Gaussian; None: the pixel itself.

    Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering" (SSVM 2011).
    """
    if radius is None:
        weights = [1.0]
    else:
        variance = radius**2 / BOX_BLURS
        whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
        part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
        weights = [weight / (2 * (whole + part) + 1) for weight in (part, *[1.0] * (2 * whole + 1), part)]
    padding = [0.0] * (REACH - len(weights) // 2)
    return [*padding, *weights, *padding]


def _blur(image: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each image (N, 3, H, W) with its own weights (N, 2 * REACH + 1), along rows, then along columns."""
    count, channels, height, width = image.shape
    weights = weights[:, None].expand(-1, channels, -1).reshape(count * channels, 1, -1)
    image = image.reshape(1, -1, height, width)
    for pad, kernel in (((REACH, REACH, 0, 0), weights[:, :, None]), ((0, 0, REACH, REACH), weights[..., None])):
        for _ in range(BOX_BLURS):
            padded = F.pad(image, pad, mode="replicate")
            image = F.conv2d(padded, kernel, groups=len(weights)).add_(0.5).floor_()
    return image.view(count, channels, height, width)
