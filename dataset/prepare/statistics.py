"""Mean and standard deviation of each channel over the images of a list."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dataset.bands import Bands, read_bands
from dataset.errors import DataError
from dataset.files import read_pixels
from dataset.transform import Normalization


def channel_statistics(paths: Iterable[Path], channels: int, bands: Bands | None) -> Normalization | None:
    """Over all pixels of the readable images as training reads them, as values from 0 to 1; None without any.

    Exact: the pixels of each of the 256 values are counted. A channel that never changes gets 1 / 255, to divide by.
    """
    counts = np.zeros((channels, 256), np.int64)
    for path in paths:
        try:
            pixels = read_bands(path, bands) if bands else read_pixels(path)
        except DataError:  # the check has reported it
            continue
        for channel in range(channels):
            counts[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    if not counts.any():
        return None
    values, total = np.arange(256) / 255, counts.sum(axis=1)
    mean = counts @ values / total
    std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
    return Normalization(*(tuple(map(float, row)) for row in (mean, np.maximum(std, 1 / 255))))
