"""Geometry, photometry and CutMix boxes: what is drawn, and how it is applied (UniMatch, section 3 and its release).

Drawing and applying are apart. Every draw comes from a generator that is passed in, so a view is a function of that
generator's seed alone: not of workers, of processes, or of what ran before.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as F

from dataset.files import IGNORE_INDEX

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Geometry(NamedTuple):
    """Resize to `long_side` pixels, crop with its origin at (x, y) after padding, then mirror if `flip`."""

    long_side: int
    x: int
    y: int
    flip: bool


class Photometry(NamedTuple):
    """Colour jitter as (operation, factor) pairs in order of application, grey-scale, blur radius in pixels or None."""

    jitter: tuple[tuple[str, float], ...]
    grey: bool
    blur_radius: float | None


class Box(NamedTuple):
    """A CutMix rectangle in pixels of the crop."""

    x: int
    y: int
    width: int
    height: int


def resized_size(width: int, height: int, long_side: int) -> tuple[int, int]:
    """(width, height) once the longer side is `long_side`, in pixels, at least 1."""
    if height > width:
        return max(1, int(width * long_side / height + 0.5)), long_side
    return long_side, max(1, int(height * long_side / width + 0.5))


def draw_geometry(width: int, height: int, size: int, rng: np.random.Generator) -> Geometry:
    """Draw scale in [0.5, 2], crop origin and flip for an image of `width` x `height` and a crop of `size` pixels."""
    longer = max(width, height)
    long_side = int(rng.integers(int(longer * 0.5), int(longer * 2.0), endpoint=True))
    long_side = max(1, long_side)
    new_width, new_height = resized_size(width, height, long_side)
    x = int(rng.integers(0, max(new_width - size, 0), endpoint=True))
    y = int(rng.integers(0, max(new_height - size, 0), endpoint=True))
    return Geometry(long_side, x, y, bool(rng.random() < 0.5))


def apply_geometry(
    image: Image.Image, geometry: Geometry, size: int, fill: int, resample: Image.Resampling
) -> Image.Image:
    """Resize, pad right and bottom with `fill`, crop `size` x `size` pixels, flip. Pillow image in, same mode out.

    Images take `Image.BILINEAR` (Pillow's, antialiased) and 0; labels `Image.NEAREST` and 255.
    """
    image = image.resize(resized_size(*image.size, geometry.long_side), resample)
    pad = (0, 0, max(size - image.width, 0), max(size - image.height, 0))
    if any(pad):
        image = ImageOps.expand(image, pad, fill=fill)
    image = image.crop((geometry.x, geometry.y, geometry.x + size, geometry.y + size))
    return ImageOps.mirror(image) if geometry.flip else image


def padding_mask(width: int, height: int, geometry: Geometry, size: int) -> torch.Tensor:
    """uint8 (size, size): 0 where a crop of a `width` x `height` image shows the image, 255 on its padding."""
    new_width, new_height = resized_size(width, height, geometry.long_side)
    mask = torch.full((size, size), IGNORE_INDEX, dtype=torch.uint8)
    mask[: min(new_height, size), : min(new_width, size)] = 0
    return mask.flip(1) if geometry.flip else mask


def draw_photometry(rng: np.random.Generator) -> Photometry:
    """Colour jitter with probability 0.8, grey-scale with 0.2, Gaussian blur with 0.5."""
    jitter: tuple[tuple[str, float], ...] = ()
    if rng.random() < 0.8:
        factors = {name: float(rng.uniform(0.5, 1.5)) for name in ("brightness", "contrast", "saturation")}
        factors["hue"] = float(rng.uniform(-0.25, 0.25))
        names = list(factors)
        jitter = tuple((names[i], factors[names[i]]) for i in rng.permutation(len(names)))
    grey = bool(rng.random() < 0.2)
    blur_radius = float(rng.uniform(0.1, 2.0)) if rng.random() < 0.5 else None
    return Photometry(jitter, grey, blur_radius)


def apply_photometry(image: Image.Image, photometry: Photometry) -> Image.Image:
    """The strong view of an 8-bit RGB Pillow image; the operations are torchvision's and Pillow's on 8-bit values."""
    for name, factor in photometry.jitter:
        image = getattr(F, f"adjust_{name}")(image, factor)
    if photometry.grey:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if photometry.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(photometry.blur_radius))
    return image


def draw_cutmix_box(size: int, rng: np.random.Generator) -> Box | None:
    """A CutMix box inside a crop of `size` pixels, or None with probability 0.5."""
    if rng.random() >= 0.5:
        return None
    area = rng.uniform(0.02, 0.4) * size * size
    while True:  # the area is kept, so large boxes are as frequent as small ones although they fit less often
        ratio = rng.uniform(0.3, 1 / 0.3)
        width, height = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
        x, y = int(rng.integers(size)), int(rng.integers(size))
        if x + width <= size and y + height <= size:
            return Box(x, y, width, height)


def box_mask(box: Box | None, size: int) -> torch.Tensor:
    """bool (size, size): True inside the box."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    if box is not None:
        mask[box.y : box.y + box.height, box.x : box.x + box.width] = True
    return mask


def to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    """uint8 (3, H, W) of an RGB image, or (H, W) of a one-channel one."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return array.permute(2, 0, 1).contiguous() if array.ndim == 3 else array


def normalize(image: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """float32 (..., 3, H, W): /255, then ImageNet's mean and standard deviation per channel.

    Takes a Pillow image, an 8-bit array (H, W, 3) or an 8-bit tensor (..., 3, H, W), which stays on its device.
    """
    if not isinstance(image, torch.Tensor):
        image = to_tensor(image)
    image = image.float() / 255
    # torchvision's normalize reads from the device, which makes the host wait for it; plain numbers do not.
    for channel, mean, std in zip(image.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(std)
    return image
