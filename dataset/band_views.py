"""Strong views of images of many channels: colour jitter on red, green and blue, less on the others."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dataset.transform import Box, Photometry, apply_photometry

SHARED = ("brightness", "contrast")  # what means the same on a single channel


def strong_bands(
    rgb: tuple[int, int, int],
    weak: np.ndarray,
    photometry: Photometry,
    box: Box | None = None,
    partner: np.ndarray | None = None,
    photometry_mix: Photometry | None = None,
) -> np.ndarray:
    """`dataset.transform.strong_view` of uint8 (H, W, N): the channels `rgb` as an RGB image.

    Every other channel gets the brightness and contrast that are drawn, in their order, and the blur; saturation, hue
    and grey-scale mean nothing there.
    """
    strong = np.empty_like(weak)
    others = [channel for channel in range(weak.shape[2]) if channel not in rgb]
    alone = _of_one_channel(photometry)
    strong[..., list(rgb)] = apply_photometry(Image.fromarray(weak[..., list(rgb)]), photometry)
    for channel in others:
        strong[..., channel] = apply_photometry(Image.fromarray(weak[..., channel]), alone)
    if box is not None:
        inside = (slice(box.y, box.y + box.height), slice(box.x, box.x + box.width))
        strong[inside] = strong_bands(rgb, partner, photometry_mix)[inside]
    return strong


def _of_one_channel(photometry: Photometry) -> Photometry:
    jitter = tuple((name, factor) for name, factor in photometry.jitter if name in SHARED)
    return Photometry(jitter, False, photometry.blur_radius)
