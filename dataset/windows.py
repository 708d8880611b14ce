"""Large images row by row: PNG and TIFF by Pillow in bounded memory, others by rasterio where it is installed.

Rows come as 8-bit RGB from the top to the bottom, with the values of `read_image`; those of a JPEG that rasterio reads
may be some levels off. What can be read in no other way is decoded whole, and `whole` says why.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin
from PIL.TiffTags import LONG

from dataset.bands import Bands, band_rows
from dataset.files import check_pixels, errors_named, gives_upper_bits, open_image, orientation, read_image
from dataset.raster import ROWS, block_rows, find_rasterio, open_raster, read_rows

BLOCK_PIXELS = 2**26  # a compressed strip, or a row of tiles, of a TIFF holds at most so many, else it is no help
PIECE = 2**20  # bytes of a PNG that are read at once


class Rows:
    """The rows of an image from the top to the bottom; `whole` says why it is all in memory, and is empty if it isn't.

    `window(top, bottom)` gives uint8 (bottom - top, width, 3), or as many channels as the image has; neither may be
    smaller than in the call before. Raises DataError.
    """

    def __init__(self, path: Path, width: int, height: int, blocks: Iterator[np.ndarray], whole: str = "") -> None:
        self.path, self.width, self.height, self.whole = path, width, height, whole
        self._blocks, self._held, self._top = blocks, np.empty((0, width, 3), np.uint8), 0

    def window(self, top: int, bottom: int) -> np.ndarray:
        parts, end = [self._held[top - self._top :]] if len(self._held) else [], self._top + len(self._held)
        with errors_named(self.path, "image"):
            while end < bottom:
                block = next(self._blocks)
                parts.append(block[max(0, top - end) :])
                end += len(block)
        self._held, self._top = np.concatenate(parts) if len(parts) > 1 else parts[0], top
        return self._held[: bottom - top]


@contextlib.contextmanager
def open_rows(path: Path, upright: bool = False, whole: bool = False, bands: Bands | None = None) -> Iterator[Rows]:
    """The rows of the image at `path`; `upright`: turned as its EXIF orientation says. Raises DataError.

    `whole`: it is small enough to be decoded at once, which is faster. `bands`: it has other channels than 8-bit RGB.
    """
    with contextlib.ExitStack() as stack:
        if bands:
            yield Rows(path, *stack.enter_context(band_rows(path, bands)))
        elif whole:
            yield _decoded(path, upright, "it is small")
        else:
            yield _in_blocks(path, upright, stack)


def _in_blocks(path: Path, upright: bool, stack: contextlib.ExitStack) -> Rows:
    """The rows of a large image; its file stays open as long as the stack."""
    with errors_named(path, "image"):
        with no_pixel_limit(), Image.open(path) as image:
            width, height = image.size
            turned = upright and orientation(image) != 1
            kind, mode = image.format, image.mode
            tags = dict(image.tag_v2) if kind == "TIFF" else {}
        if mode[0] in "IF":
            read_image(path)  # refuses it, and says why
        reader = None if turned else _reader(path, kind, mode, tags)
        if reader is not None:
            return Rows(path, width, height, stack.enter_context(reader))
    check_pixels(path, width, height, _why(kind, turned))
    return _decoded(path, upright, _why(kind, turned))


def _decoded(path: Path, upright: bool, why: str) -> Rows:
    pixels = np.asarray(read_upright(path) if upright else read_image(path))
    return Rows(path, pixels.shape[1], pixels.shape[0], iter([pixels]), why)


def read_header(path: Path) -> tuple[int, int, bool]:
    """Width, height and `gives_upper_bits`, whatever the limit of pixels. Raises DataError."""
    with errors_named(path, "image"), no_pixel_limit(), Image.open(path) as image:
        return *image.size, gives_upper_bits(image)


def read_upright(path: Path) -> Image.Image:
    """8-bit RGB, turned as a viewer shows it: by its EXIF orientation. Raises DataError."""
    with open_image(path) as image:
        image.load()  # Pillow turns a TIFF by itself
        return ImageOps.exif_transpose(image).convert("RGB")


def _why(kind: str, turned: bool) -> str:
    if turned:
        return "its EXIF orientation turns it"
    ways = "store it as PNG or in tiles of a TIFF"
    ways += "" if find_rasterio() else ", or install rasterio (requirements-tools.txt) for JPEG and most TIFFs"
    return f"a {kind} of this kind is decoded whole: {ways}"


def _reader(path: Path, kind: str, mode: str, tags: dict[int, Any]) -> Any:
    """A context manager of the blocks of rows, or None."""
    if kind == "PNG" and (header := _png_header(path)):
        return _png_blocks(path, *header)
    if kind == "TIFF" and _tiff_has_blocks(tags := _in_small_strips(tags)):
        return _tiff_blocks(path, tags)
    if kind in ("TIFF", "JPEG", "MPO") and find_rasterio() and _rasterio_gives_the_same(mode, tags):
        return _rasterio_blocks(path)
    return None


@contextlib.contextmanager
def no_pixel_limit() -> Iterator[None]:
    """The limit is for images decoded whole."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decode(data: bytes) -> Image.Image:
    with no_pixel_limit(), Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


# --- PNG: https://www.w3.org/TR/png-3/

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
SAME_STEP = {1: 0, 2: 4, 3: 2, 4: 6}  # colour type of 8 bits a channel with so many bytes a pixel


def _png_header(path: Path) -> tuple[int, int, int, int, list[tuple[bytes, bytes]]] | None:
    """Width, height, bits, colour type and the chunks that give colours; None for what has to be decoded whole."""
    with open(path, "rb") as file:
        chunks = list(_chunks(file, before_data=True))
    width, height, bits, colour, _, _, interlace = struct.unpack(">IIBBBBB", chunks[0][1])
    if interlace or bits == 16:
        return None
    return width, height, bits, colour, [chunk for chunk in chunks if chunk[0] in (b"PLTE", b"tRNS")]


def _chunks(file: Any, before_data: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each chunk, the data in pieces."""
    file.seek(len(SIGNATURE))
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IEND" or (kind == b"IDAT" and before_data):
            return
        if kind == b"IDAT":  # some programs write all data as one chunk
            for start in range(0, size, PIECE):
                yield kind, file.read(min(PIECE, size - start))
        else:
            yield kind, file.read(size)
        file.read(4)  # checksum; the data have one of their own
    raise OSError("the file ends before its last chunk")


@contextlib.contextmanager
def _png_blocks(
    path: Path, width: int, height: int, bits: int, colour: int, colours: list[tuple[bytes, bytes]]
) -> Iterator[Iterator[np.ndarray]]:
    row_bytes = (width * bits * CHANNELS[colour] + 7) // 8
    step = max(1, bits * CHANNELS[colour] // 8)

    def blocks(file: Any) -> Iterator[np.ndarray]:
        inflated = _Inflated(data for kind, data in _chunks(file) if kind == b"IDAT")
        above = bytes(row_bytes)
        for top in range(0, height, ROWS):
            rows = min(ROWS, height - top)
            filtered = inflated.take(rows * (row_bytes + 1))
            # A row is stored as differences to its neighbours, to the left and above. Pillow undoes that in a picture
            # made of these rows below the one above them, whose pixels are as many bytes apart.
            picture = _decode(_png(row_bytes // step, rows + 1, 8, SAME_STEP[step], b"\0" + above + filtered))
            plain = np.asarray(picture).reshape(rows + 1, row_bytes)[1:]
            above = plain[-1].tobytes()
            unfiltered = np.concatenate([np.zeros((rows, 1), np.uint8), plain], axis=1).tobytes()
            yield np.asarray(_decode(_png(width, rows, bits, colour, unfiltered, colours)).convert("RGB"))

    with open(path, "rb") as file:
        yield blocks(file)


def _png(
    width: int, height: int, bits: int, colour: int, rows: bytes, colours: list[tuple[bytes, bytes]] | None = None
) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), *(colours or [])]
    chunks += [(b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    return SIGNATURE + b"".join(chunk(kind, data) for kind, data in chunks)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


class _Inflated:
    """The decompressed bytes of a zlib stream that comes in parts."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._inflate, self._tail = parts, zlib.decompressobj(), b""

    def take(self, count: int) -> bytes:
        taken = bytearray()
        while len(taken) < count:
            data = self._tail or next(self._parts, b"")
            if not data:
                raise OSError("the image data are incomplete")
            taken += self._inflate.decompress(data, count - len(taken))
            self._tail = self._inflate.unconsumed_tail
        return bytes(taken)


# --- TIFF: every strip, and every tile, is compressed for itself

WIDTH, HEIGHT, BITS, COMPRESSION, OFFSETS, SAMPLES = 256, 257, 258, 259, 273, 277
ROWS_PER_STRIP, COUNTS, PLANAR = 278, 279, 284
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 322, 323, 324, 325
# Tags that say how pixels are coded: bits, compression, photometric, fill order, samples, predictor, palette, extra
# samples, sample format, JPEG tables, subsampling, reference black and white.
CODING = (258, 259, 262, 266, 277, 317, 320, 338, 339, 347, 530, 532)
OLD_JPEG = 6  # a compression whose tables lie anywhere in the file
YCBCR = 6  # colours of which some are stored once for several pixels


def _in_small_strips(tags: dict[int, Any]) -> dict[int, Any]:
    """The tags with the strips of an uncompressed TIFF cut into few rows each: Pillow writes one strip for all."""
    offsets, counts = (_tuple(tags.get(key, ())) for key in (OFFSETS, COUNTS))
    if tags.get(COMPRESSION, 1) != 1 or tags.get(262) == YCBCR or len(offsets) != len(counts) or not offsets:
        return tags
    bits = _tuple(tags.get(BITS, 1))
    row = (tags[WIDTH] * (sum(bits) if len(bits) > 1 else bits[0] * tags.get(SAMPLES, 1)) + 7) // 8
    end = offsets[0] + row * tags[HEIGHT]
    apart = any(offsets[i] + counts[i] != offsets[i + 1] for i in range(len(offsets) - 1))
    if apart or end > offsets[-1] + counts[-1]:
        return tags
    starts = range(offsets[0], end, ROWS * row)
    sizes = tuple(min(ROWS * row, end - start) for start in starts)
    return tags | {ROWS_PER_STRIP: ROWS, OFFSETS: tuple(starts), COUNTS: sizes}


def _tiff_has_blocks(tags: dict[int, Any]) -> bool:
    rows = tags.get(TILE_HEIGHT) or tags.get(ROWS_PER_STRIP) or tags[HEIGHT]
    known = {TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS} <= tags.keys() or {OFFSETS, COUNTS} <= tags.keys()
    together = tags.get(PLANAR, 1) == 1 and tags.get(COMPRESSION, 1) != OLD_JPEG
    small = rows < tags[HEIGHT] and rows * tags[WIDTH] <= BLOCK_PIXELS
    return known and together and tags.get(274, 1) == 1 and small


@contextlib.contextmanager
def _tiff_blocks(path: Path, tags: dict[int, Any]) -> Iterator[Iterator[np.ndarray]]:
    tiled = TILE_OFFSETS in tags
    rows = tags[TILE_HEIGHT] if tiled else tags[ROWS_PER_STRIP]
    across = -(-tags[WIDTH] // tags[TILE_WIDTH]) if tiled else 1
    offsets, counts = (_tuple(tags[key]) for key in ((TILE_OFFSETS, TILE_COUNTS) if tiled else (OFFSETS, COUNTS)))

    def blocks(file: Any) -> Iterator[np.ndarray]:
        for index, top in enumerate(range(0, tags[HEIGHT], rows)):
            parts = []
            for offset, count in zip(offsets[index * across :][:across], counts[index * across :], strict=False):
                file.seek(offset)
                parts.append(file.read(count))
            picture = _decode(_tiff(tags, min(rows, tags[HEIGHT] - top), parts, tiled, prefix))
            yield np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))

    with open(path, "rb") as file:
        prefix = file.read(2)
        yield blocks(file)


def _tiff(tags: dict[int, Any], height: int, parts: list[bytes], tiled: bool, prefix: bytes) -> bytes:
    """A TIFF file of one row of tiles, or of one strip."""
    header = prefix + struct.pack("<HI" if prefix == b"II" else ">HI", 42, 8)
    directory = TiffImagePlugin.ImageFileDirectory_v2(header)
    for key in CODING:
        if key in tags:
            directory[key] = tags[key]
    directory[WIDTH], directory[HEIGHT] = tags[WIDTH], height
    where, sizes = (TILE_OFFSETS, TILE_COUNTS) if tiled else (OFFSETS, COUNTS)
    if tiled:
        directory[TILE_WIDTH], directory[TILE_HEIGHT] = tags[TILE_WIDTH], tags[TILE_HEIGHT]
    else:
        directory[ROWS_PER_STRIP] = height
    directory.tagtype[where] = directory.tagtype[sizes] = LONG
    directory[where] = tuple(0 for _ in parts)  # Pillow adds where the directory ends to a strip's, not to tiles'
    directory[sizes] = tuple(map(len, parts))
    start = 8 + len(directory.tobytes(8)) if tiled else 0
    directory[where] = tuple(start + sum(map(len, parts[:index])) for index in range(len(parts)))
    return header + directory.tobytes(8) + b"".join(parts)


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


# --- other kinds, by GDAL


def _rasterio_gives_the_same(mode: str, tags: dict[int, Any]) -> bool:
    """Whether the first three bands are red, green and blue as Pillow converts them, or the only one is grey."""
    upright, inverted, premultiplied = tags.get(274, 1) == 1, tags.get(262) == 0, 1 in _tuple(tags.get(338, ()))
    plain = mode in ("RGB", "RGBA", "L", "LA", "P") and set(_tuple(tags.get(BITS, 8))) == {8}
    return plain and upright and not inverted and not premultiplied


@contextlib.contextmanager
def _rasterio_blocks(path: Path) -> Iterator[Iterator[np.ndarray]]:
    def blocks(source: Any) -> Iterator[np.ndarray]:
        bands = [1, 2, 3] if source.count >= 3 else [1, 1, 1]
        rows = block_rows(source)
        for top in range(0, source.height, rows):
            block = read_rows(source, top, min(top + rows, source.height), bands)
            yield np.ascontiguousarray(block if palette is None else palette[block[..., 0]])

    with open_raster(path) as source:
        palette = None
        if source.colorinterp[0] == find_rasterio().enums.ColorInterp.palette:
            palette = np.zeros((256, 3), np.uint8)
            for index, value in source.colormap(1).items():
                palette[index] = value[:3]
        yield blocks(source)
