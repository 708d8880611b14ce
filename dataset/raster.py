"""Image files by rasterio (GDAL), which reads windows of them; it is in requirements-tools.txt, and may be missing."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 64  # rows that are decoded at once, where the file allows it
CACHE_BYTES = 2**26  # for GDAL's decoded blocks; by default it takes a twentieth of the machine


@functools.cache
def find_rasterio() -> Any:
    """The package, or None."""
    try:
        import rasterio
        import rasterio.errors
        import rasterio.windows
    except ImportError:
        return None
    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
    return rasterio


@contextlib.contextmanager
def open_raster(path: Path, mode: str = "r", **profile: Any) -> Iterator[Any]:
    """The open file, rasterio being there. Raises what rasterio does."""
    with find_rasterio().Env(GDAL_CACHEMAX=CACHE_BYTES), find_rasterio().open(path, mode, **profile) as opened:
        yield opened


def block_rows(source: Any) -> int:
    """How many rows to read at once: whole rows of the file's tiles, so that each is decoded once."""
    height = source.block_shapes[0][0]
    return max(1, ROWS // height) * height


def read_rows(source: Any, top: int, bottom: int, bands: list[int] | None = None) -> np.ndarray:
    """Values (bottom - top, width, bands), all bands by default."""
    window = find_rasterio().windows.Window(0, top, source.width, bottom - top)
    return source.read(bands, window=window).transpose(1, 2, 0)
