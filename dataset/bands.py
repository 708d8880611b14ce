"""Images of other channels than 8-bit RGB: multi-band TIFF and .npy files, decoded to 8 bits a channel.

TIFFs go through tifffile or rasterio where one is installed, else through Pillow, which reads some kinds of 3 and 4
channels only. .npy files are mapped, so that a part of one costs no more memory than that part.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.errors import DataError
from dataset.files import errors_named, image_pixel_limit, too_many_pixels

IMAGENET_RGB = (0, 1, 2)
ROWS = 64  # rows that are scaled at once
# Pillow's modes whose channels are stored as they are decoded.
PLAIN_MODES = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}


class Bands(NamedTuple):
    """What an image file holds: `channels`, of which `rgb` are red, green and blue, counted from 0.

    `value_range` (low, high): a value v becomes round(255 (v - low) / (high - low)), cut off at 0 and 255. None: values
    have 8 bits already, and files with others are refused.
    """

    channels: int
    rgb: tuple[int, int, int] = IMAGENET_RGB
    value_range: tuple[float, float] | None = None


def read_bands(path: str | Path, bands: Bands) -> np.ndarray:
    """An image's pixels, uint8 (H, W, channels). Raises DataError naming the file."""
    pixels = open_bands(path, bands)
    height, width = pixels.shape[:2]
    if height * width > image_pixel_limit():
        raise too_many_pixels(path, "image", height * width)
    result = np.empty((height, width, bands.channels), np.uint8)
    for top in range(0, height, ROWS):
        result[top : top + ROWS] = scale(pixels[top : top + ROWS], bands)
    return result


def open_bands(path: str | Path, bands: Bands) -> np.ndarray:
    """An image's values as stored, (H, W, channels) of any number type, a .npy file mapped. Raises DataError."""
    path = Path(path)
    with errors_named(path, "image"):
        if path.suffix.lower() == ".npy":
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix.lower() in (".tif", ".tiff"):
            values = _read_tiff(path, bands.channels)
        else:
            values = _read_plain(path)
        values = _channels_last(path, values, bands.channels)
        _check_type(path, values.dtype, bands)
    return values


def scale(values: np.ndarray, bands: Bands) -> np.ndarray:
    """Values as stored -> uint8, by `value_range`; not-a-number becomes 0."""
    if bands.value_range is None:
        return values
    low, high = bands.value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).round().astype(np.uint8)


def bands_size(path: str | Path, bands: Bands) -> tuple[int, int]:
    """(width, height). Raises DataError."""
    return open_bands(path, bands).shape[1::-1]


def band_rows(path: Path, bands: Bands) -> tuple[int, int, Iterator[np.ndarray], str]:
    """Width, height, blocks of rows from the top, uint8 (rows, width, channels), and why all are in memory, or ""."""
    values = open_bands(path, bands)
    height, width = values.shape[:2]
    blocks = (np.ascontiguousarray(scale(values[top : top + ROWS], bands)) for top in range(0, height, ROWS))
    whole = "" if isinstance(values, np.memmap) else "TIFFs of many channels are decoded whole; .npy files are not"
    return width, height, blocks, whole


def _channels_last(path: Path, values: np.ndarray, channels: int) -> np.ndarray:
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim == 3 and values.shape[2] == channels:
        return values
    if values.ndim == 3 and values.shape[0] == channels:
        return values.transpose(1, 2, 0)
    shape = " x ".join(map(str, values.shape))
    raise DataError(
        f"{path}: the image's values are {shape}; channels: {channels} needs height x width x {channels}, or "
        f"{channels} x height x width",
        "images of another number of channels",
    )


def _check_type(path: Path, dtype: np.dtype, bands: Bands) -> None:
    if dtype.kind not in "uif":
        raise DataError(f"{path}: holds {dtype}, not numbers", "images that are not numbers")
    if bands.value_range is None and dtype != np.uint8:
        raise DataError(
            f"{path}: the image holds {dtype}, not 8 bits per channel: state how its values become 8 bits by "
            "value_range: [low, high]",
            "images of more than 8 bits without value_range",
        )


def _read_tiff(path: Path, channels: int) -> np.ndarray:
    if importlib.util.find_spec("tifffile"):
        import tifffile

        return tifffile.imread(path)
    if importlib.util.find_spec("rasterio"):
        import rasterio

        with rasterio.open(path) as source:
            return source.read()
    try:
        return _read_plain(path)
    except Exception:
        raise DataError(
            f"{path}: a TIFF of {channels} channels needs tifffile or rasterio: "
            "pip install -r requirements-tools.txt (or store .npy)",
            "TIFFs that need tifffile",
        ) from None


def _read_plain(path: Path) -> np.ndarray:
    """What Pillow reads without changing values: grey, of 16 bits too, RGB, and four channels."""
    with Image.open(path) as image:
        if image.mode not in PLAIN_MODES and image.mode[0] != "I":
            raise DataError(
                f"{path}: Pillow reads it as {image.mode}, which is no plain list of channels: store .npy or TIFF",
                "images of another number of channels",
            )
        return np.asarray(image)
