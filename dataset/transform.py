"""Geometry, photometry and CutMix boxes: what is drawn, and how it is applied (UniMatch, section 3 and its release).

Drawing and applying are apart. Every draw comes from a generator that is passed in, so a view is a function of that
generator's seed alone: not of workers, of processes, or of what ran before.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from dataset.files import IGNORE_INDEX
from dataset.resize import picture_size, resize_bilinear, resize_nearest, resized_size, source_rows

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, of values from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalization(IMAGENET_MEAN, IMAGENET_STD)


class Geometry(NamedTuple):
    """Resize to `long_side` pixels, crop with its origin at (x, y) after padding, then mirror if `flip`."""

    long_side: int
    x: int
    y: int
    flip: bool


class Extent(NamedTuple):
    """Pixels of a crop that show the image, from the left edge, or the right one if `flip`, and from the top."""

    width: int
    height: int
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
    image: Image.Image | np.ndarray, geometry: Geometry, size: int, fill: int, resample: Image.Resampling
) -> Image.Image:
    """Resize, pad right and bottom with `fill`, crop `size` x `size` pixels, flip; only the crop is ever resized.

    `image` is a Pillow image of mode RGB or L, or its pixels, uint8 (H, W, 3) or (H, W). Images take `Image.BILINEAR`
    (Pillow's, antialiased) and 0; labels `Image.NEAREST` and 255. Labels are exactly what resizing the whole picture
    gives, and so are small images; else some pixels in a thousand are a level off: Pillow places the window in float32.
    """
    return Image.fromarray(crop_pixels(image, geometry, size, fill, resample))


def crop_pixels(
    image: Image.Image | np.ndarray, geometry: Geometry, size: int, fill: int, resample: Image.Resampling
) -> np.ndarray:
    """The pixels of `apply_geometry`, uint8 (size, size, 3) or (size, size), in memory of their own."""
    new_size = resized_size(*picture_size(image), geometry.long_side)
    window = (
        slice(geometry.y, min(geometry.y + size, new_size[1])),
        slice(geometry.x, min(geometry.x + size, new_size[0])),
    )
    resize = resize_nearest if resample == Image.Resampling.NEAREST else resize_bilinear
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] != 3:  # Pillow has no such pictures
        planes = [np.ascontiguousarray(plane) for plane in image.transpose(2, 0, 1)]
        shown = np.stack([resize(plane, new_size, window, geometry.flip) for plane in planes], axis=2)
    else:
        shown = resize(image, new_size, window, geometry.flip)
    height, width = shown.shape[:2]
    result = np.empty((size, size, *shown.shape[2:]), np.uint8)
    if (height, width) != (size, size):
        result.fill(fill)
    left = size - width if geometry.flip else 0
    result[:height, left : left + width] = shown
    return result


def rows_needed(width: int, height: int, geometry: Geometry, size: int) -> int:
    """Of a `width` x `height` picture, the rows, from the top, of which `apply_geometry` looks at the pixels."""
    new_size = resized_size(width, height, geometry.long_side)
    return source_rows((width, height), new_size, geometry.y + size)


def visible_extent(width: int, height: int, geometry: Geometry, size: int) -> Extent:
    """What a crop of a `width` x `height` image shows of it; the rest is padding."""
    new_width, new_height = resized_size(width, height, geometry.long_side)
    return Extent(min(new_width, size), min(new_height, size), geometry.flip)


def padding_mask(extents: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (B, size, size): 0 where a crop shows the image, 255 on padding. `extents` (B, 3): Extent's numbers."""
    width, height, flip = extents.unsqueeze(-1).unbind(1)
    row = torch.arange(size, device=extents.device)
    column = torch.where(flip.bool(), size - 1 - row, row)
    outside = (row >= height).unsqueeze(2) | (column >= width).unsqueeze(1)
    return outside.to(torch.uint8) * IGNORE_INDEX


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


def apply_photometry(image: Image.Image, photometry: Photometry, box: Box | None = None) -> Image.Image:
    """The strong view of an 8-bit RGB Pillow image, by Pillow's operations on 8-bit values.

    With `box`, the part of it inside the box, which costs less: all that is needed of a CutMix partner.
    """
    box = box or Box(0, 0, *image.size)
    # Contrast depends on the mean of the whole picture, and so does what comes before it; the rest is local.
    names = [name for name, _ in photometry.jitter]
    whole = names.index("contrast") + 1 if "contrast" in names else 0
    image = _adjust(image, photometry.jitter[:whole])
    # A blur mixes in what lies around the box: it is three box blurs, none reaching further than the radius and one.
    reach = 0 if photometry.blur_radius is None else 3 * (int(photometry.blur_radius) + 1)
    left, top = max(box.x - reach, 0), max(box.y - reach, 0)
    right, bottom = min(box.x + box.width + reach, image.width), min(box.y + box.height + reach, image.height)
    image = _adjust(image.crop((left, top, right, bottom)), photometry.jitter[whole:])
    if photometry.grey:
        image = image.convert("L").convert("RGB")
    if photometry.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(photometry.blur_radius))
    x, y = box.x - left, box.y - top
    return image.crop((x, y, x + box.width, y + box.height))


def strong_view(
    weak: Image.Image,
    photometry: Photometry,
    box: Box | None = None,
    partner: Image.Image | None = None,
    photometry_mix: Photometry | None = None,
) -> Image.Image:
    """The strong view of a weak one: its photometry and, inside a CutMix box, the strong view of its partner.

    `partner` is the partner's weak view, `photometry_mix` what is drawn for its strong one. Without a box none is used.
    """
    strong = apply_photometry(weak, photometry)
    if box is not None:
        strong.paste(apply_photometry(partner, photometry_mix, box), (box.x, box.y))
    return strong


_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def _adjust(image: Image.Image, jitter: tuple[tuple[str, float], ...]) -> Image.Image:
    """Colour jitter, as torchvision's on Pillow images. Importing torchvision would double the time to start."""
    for name, factor in jitter:
        if name == "hue":
            hue, saturation, value = image.convert("HSV").split()
            shift = int(factor * 255)  # of 256 hues on a circle
            hue = hue.point([(level + shift) % 256 for level in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        else:
            image = _ENHANCERS[name](image).enhance(factor)
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


def box_mask(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """bool (B, size, size): True inside the boxes, (B, 4) with Box's numbers; nowhere for one without extent."""
    x, y, width, height = boxes.unsqueeze(-1).unbind(1)
    position = torch.arange(size, device=boxes.device)
    rows, columns = (position >= y) & (position < y + height), (position >= x) & (position < x + width)
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    """uint8 (3, H, W) of an RGB image, or (H, W) of a one-channel one."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return array.permute(2, 0, 1).contiguous() if array.ndim == 3 else array


def normalize(image: Image.Image | np.ndarray | torch.Tensor, by: Normalization = IMAGENET) -> torch.Tensor:
    """float32, torch's default type, (..., C, H, W): /255, minus the mean and over the standard deviation of a channel.

    Takes a Pillow image, an 8-bit array (H, W, C) or an 8-bit tensor (..., C, H, W), which stays on its device.
    """
    if not isinstance(image, torch.Tensor):
        image = to_tensor(image)
    image = image.to(torch.get_default_dtype(), memory_format=torch.contiguous_format, copy=True).div_(255)
    # torchvision's normalize reads from the device, which makes the host wait for it; plain numbers do not.
    for channel, mean, std in zip(image.unbind(-3), *by, strict=True):
        channel.sub_(mean).div_(std)
    return image
