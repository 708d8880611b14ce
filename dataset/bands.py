"""Images of other channels than 8-bit RGB: multi-band TIFF and .npy files, decoded to 8 bits a channel.

TIFFs go through rasterio, which reads windows of them, or tifffile, where one is installed, else through Pillow, which
reads some kinds of 3 and 4 channels only. .npy files and, by tifffile, uncompressed TIFFs are mapped: a part of one
costs no more memory than that part.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageMode

from dataset.errors import DataError
from dataset.files import check_pixels, errors_named, gives_upper_bits
from dataset.raster import ROWS, block_rows, find_rasterio, open_raster, read_rows

IMAGENET_RGB = (0, 1, 2)
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


class Stored(NamedTuple):
    """What an image file stores: `read(top, bottom)` gives rows, (bottom - top, width, channels) of any number type.

    They are best read `step` rows at a time. `whole` says why all are in memory then, and is empty if they aren't.
    """

    width: int
    height: int
    read: Callable[[int, int], np.ndarray]
    step: int = ROWS
    whole: str = ""
    mapped: bool = False


def read_bands(path: str | Path, bands: Bands) -> np.ndarray:
    """An image's pixels, uint8 (H, W, channels). Raises DataError naming the file."""
    with open_bands(path, bands) as stored, errors_named(path, "image"):
        check_pixels(path, stored.width, stored.height)
        result, top = np.empty((stored.height, stored.width, bands.channels), np.uint8), 0
        for block in _blocks(stored, bands):
            result[top : top + len(block)] = block
            top += len(block)
    return result


@contextlib.contextmanager
def open_bands(path: str | Path, bands: Bands) -> Iterator[Stored]:
    """The image at `path`, of which the header is read. Raises DataError."""
    path = Path(path)
    with contextlib.ExitStack() as stack:
        with errors_named(path, "image"):
            if path.suffix.lower() == ".npy":
                stored = _mapped(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False), bands)
            elif path.suffix.lower() in (".tif", ".tiff"):
                stored = _tiff(path, bands, stack)
            else:
                stored = _plain(path, bands, stack)
        yield stored


def scale(values: np.ndarray, bands: Bands) -> np.ndarray:
    """Values as stored -> uint8, by `value_range`; not-a-number becomes 0."""
    if bands.value_range is None:
        return values
    low, high = bands.value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).round().astype(np.uint8)


def bands_size(path: str | Path, bands: Bands, whole: bool = False) -> tuple[int, int]:
    """(width, height), as the header says; `whole`: the values are read too, which finds damage. Raises DataError."""
    with open_bands(path, bands) as stored, errors_named(path, "image"):
        for top in range(0, stored.height, stored.step) if whole and not stored.mapped else ():
            stored.read(top, min(top + stored.step, stored.height))
    return stored.width, stored.height


@contextlib.contextmanager
def band_rows(path: Path, bands: Bands) -> Iterator[tuple[int, int, Iterator[np.ndarray], str]]:
    """Width, height, blocks of rows from the top, uint8 (rows, width, channels), and why all are in memory, or ""."""
    with open_bands(path, bands) as stored:
        yield stored.width, stored.height, _blocks(stored, bands), stored.whole


def _blocks(stored: Stored, bands: Bands) -> Iterator[np.ndarray]:
    for top in range(0, stored.height, stored.step):
        values = stored.read(top, min(top + stored.step, stored.height))
        for start in range(0, len(values), ROWS):
            yield np.ascontiguousarray(scale(values[start : start + ROWS], bands))


def _layout(path: Path, shape: tuple[int, ...], dtype: np.dtype, bands: Bands) -> tuple[int, int, bool]:
    """Width, height and whether the channels come first. Raises DataError for values that do not fit `bands`."""
    shape, channels = (*shape, 1) if len(shape) == 2 else shape, bands.channels
    if len(shape) != 3 or channels not in (shape[0], shape[2]):
        raise _wrong_shape(path, shape, channels)
    _check_type(path, dtype, bands)
    first = shape[2] != channels
    height, width = shape[1:] if first else shape[:2]
    return width, height, first


def _wrong_shape(path: Path, shape: tuple[int, ...], channels: int) -> DataError:
    return DataError(
        f"{path}: the image's values are {' x '.join(map(str, shape))}; channels: {channels} needs height x width x "
        f"{channels}, or {channels} x height x width",
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


def _rows(values: np.ndarray, top: int, bottom: int, first: bool) -> np.ndarray:
    if first:
        return values[:, top:bottom].transpose(1, 2, 0)
    return values[top:bottom] if values.ndim == 3 else values[top:bottom, :, None]


def _mapped(path: Path, map_file: Callable[[], np.ndarray], bands: Bands) -> Stored:
    """Mapped again for each block of rows: a map keeps the pages that were read through it in memory."""
    values = map_file()
    width, height, first = _layout(path, values.shape, values.dtype, bands)
    return Stored(width, height, lambda top, bottom: _rows(map_file(), top, bottom, first), mapped=True)


def _decoded(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, decode: Callable[[], np.ndarray], bands: Bands, why: str
) -> Stored:
    """Decoded whole, once, when the first rows are read."""
    width, height, first = _layout(path, shape, dtype, bands)
    check_pixels(path, width, height, why)
    values = functools.cache(decode)
    return Stored(width, height, lambda top, bottom: _rows(values(), top, bottom, first), whole=why)


def _tiff(path: Path, bands: Bands, stack: contextlib.ExitStack) -> Stored:
    """By the first package that reads it as so many channels."""
    fault = None
    if find_rasterio():
        try:
            return _by_rasterio(path, bands, stack)
        except Exception as error:  # several pages, say: tifffile takes them for channels
            fault = error
    if importlib.util.find_spec("tifffile"):
        try:
            return _by_tifffile(path, bands)
        except Exception as error:
            raise (error if fault is None or isinstance(error, DataError) else fault) from None
    if fault is not None:
        raise fault
    try:
        return _plain(path, bands, stack)
    except Exception:
        raise DataError(
            f"{path}: a TIFF of {bands.channels} channels needs rasterio or tifffile: "
            "pip install -r requirements-tools.txt (or store .npy)",
            "TIFFs that need rasterio or tifffile",
        ) from None


def _by_rasterio(path: Path, bands: Bands, stack: contextlib.ExitStack) -> Stored:
    source = stack.enter_context(open_raster(path))
    if source.count != bands.channels:
        raise _wrong_shape(path, (source.height, source.width, source.count), bands.channels)
    _check_type(path, np.dtype(source.dtypes[0]), bands)
    return Stored(source.width, source.height, functools.partial(read_rows, source), block_rows(source))


def _by_tifffile(path: Path, bands: Bands) -> Stored:
    import tifffile

    with tifffile.TiffFile(path) as file:
        if not file.series:
            raise OSError("no picture in it")
        shape, dtype = file.series[0].shape, file.series[0].dtype
    with contextlib.suppress(ValueError):  # compressed
        return _mapped(path, lambda: tifffile.memmap(path, mode="r"), bands)

    def decode() -> np.ndarray:
        try:
            return tifffile.imread(path)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise DataError(
                f"{path}: compressed in a way that needs rasterio, or imagecodecs beside tifffile: "
                "pip install -r requirements-tools.txt",
                "TIFFs that need rasterio or imagecodecs",
            ) from None

    return _decoded(path, shape, dtype, decode, bands, "without rasterio, compressed TIFFs are decoded whole")


def _plain(path: Path, bands: Bands, stack: contextlib.ExitStack) -> Stored:
    """What Pillow reads without changing values: grey, of 16 bits too, RGB, and four channels."""
    with Image.open(path) as image:
        if image.mode not in PLAIN_MODES and image.mode[0] != "I":
            raise DataError(
                f"{path}: Pillow reads it as {image.mode}, which is no plain list of channels: store .npy or TIFF",
                "images of another number of channels",
            )
        upper_bits, dtype = gives_upper_bits(image), np.dtype(ImageMode.getmode(image.mode).typestr)
        shape = (image.height, image.width, len(image.getbands()))
    if not upper_bits:
        return _decoded(path, shape, dtype, lambda: _pillow_values(path), bands, "PNGs of this kind are decoded whole")
    if find_rasterio():
        return _by_rasterio(path, bands, stack)
    raise DataError(
        f"{path}: of its 16 bits per channel Pillow gives the upper 8: install rasterio (requirements-tools.txt), or "
        "store .npy",
        "images of 16 bits per channel that need rasterio",
    )


def _pillow_values(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)
