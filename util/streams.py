"""Writing large outputs band by band, from the top to the bottom: PNG, NumPy's .npz and GeoTIFF."""

from __future__ import annotations

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataset.errors import DataError, one_line
from dataset.raster import find_rasterio, open_raster
from dataset.windows import SIGNATURE, chunk
from util.outputs import FINGERPRINT, MARK, comment

COLOUR_TYPES = {"L": 0, "RGB": 2, "P": 3}  # of PNG


class PngStream:
    """An 8-bit PNG of mode L, RGB or P; `write` takes uint8 (rows, W) or (rows, W, 3).

    Rows are stored as differences to the row above where that is smaller in sum, as libpng chooses too.
    """

    def __init__(
        self, file: BinaryIO, size: tuple[int, int], mode: str, fingerprint: str, palette: bytes | None = None
    ) -> None:
        self._file, self._above = file, None
        self._deflate = zlib.compressobj(6 if mode != "RGB" else 3)
        file.write(SIGNATURE)
        file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, COLOUR_TYPES[mode], 0, 0, 0)))
        for key, text in (("Software", MARK), (FINGERPRINT, fingerprint)):
            file.write(chunk(b"tEXt", key.encode() + b"\0" + text.encode()))
        if palette is not None:
            file.write(chunk(b"PLTE", palette))

    def write(self, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, np.uint8).reshape(len(rows), -1)
        above = np.concatenate([np.zeros_like(rows[:1]) if self._above is None else self._above, rows[:-1]])
        differences = rows - above  # modulo 256
        filters = (_magnitude(differences) < _magnitude(rows)).astype(np.uint8)[:, None]
        lines = np.concatenate([2 * filters, np.where(filters, differences, rows)], axis=1)
        self._above = rows[-1:].copy()
        self._put(self._deflate.compress(lines.tobytes()))

    def close(self) -> None:
        self._put(self._deflate.flush())
        self._file.write(chunk(b"IEND", b""))

    def _put(self, data: bytes) -> None:
        if data:
            self._file.write(chunk(b"IDAT", data))


def _magnitude(rows: np.ndarray) -> np.ndarray:
    """The sum of each row's bytes, taken as signed."""
    return np.abs(rows.view(np.int8).astype(np.int16)).sum(axis=1, dtype=np.int64)


class NpzStream:
    """A compressed .npz with one array `name` (H, W, ...); `write` takes its next rows."""

    def __init__(self, file: BinaryIO, name: str, shape: Sequence[int], dtype: Any, fingerprint: str) -> None:
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        self._archive.comment = comment(fingerprint)
        member = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date: the same content is the same file
        member.compress_type = zipfile.ZIP_DEFLATED
        self._array = self._archive.open(member, "w", force_zip64=True)
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(self._array, header)

    def write(self, rows: np.ndarray) -> None:
        self._array.write(np.ascontiguousarray(rows).tobytes())

    def close(self) -> None:
        self._array.close()
        self._archive.close()


class GeoTiffStream:
    """A tiled, compressed GeoTIFF of classes with the palette, placed on the earth as the image at `source` is.

    Raises DataError for a source that rasterio cannot read.
    """

    def __init__(self, path: Path, source: Path, palette: np.ndarray, fingerprint: str) -> None:
        try:
            with open_raster(source) as image:
                profile = {"width": image.width, "height": image.height, "crs": image.crs, "transform": image.transform}
        except Exception as error:
            message = f"{source}: --geotiff: rasterio cannot read where it lies: {one_line(error)}"
            raise DataError(message, "images that rasterio cannot read") from None
        profile |= {
            "driver": "GTiff",
            "count": 1,
            "dtype": "uint8",
            "compress": "deflate",
            "tiled": True,
            "nodata": 255,
        }
        self._row, self._width, self._open = 0, profile["width"], contextlib.ExitStack()
        self._image = self._open.enter_context(open_raster(path, "w", **profile, BIGTIFF="IF_SAFER"))
        self._image.write_colormap(1, {index: (*map(int, colour), 255) for index, colour in enumerate(palette)})
        self._image.update_tags(TIFFTAG_SOFTWARE=MARK, TIFFTAG_IMAGEDESCRIPTION=f"{FINGERPRINT} {fingerprint}")

    def write(self, rows: np.ndarray) -> None:
        self._image.write(rows, 1, window=find_rasterio().windows.Window(0, self._row, self._width, len(rows)))
        self._row += len(rows)

    def close(self) -> None:
        self._open.close()
