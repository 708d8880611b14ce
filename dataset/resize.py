"""Resizing only the part of an image that a crop shows, with the values of resizing the whole image."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

SEARCHED = 32  # how many pixels beyond the crop, on each side, the part that is resized may reach
SMALL = 2**16  # a picture of at most so many pixels is resized whole: a part of it would save nothing


def resized_size(width: int, height: int, long_side: int) -> tuple[int, int]:
    """(width, height) once the longer side is `long_side`, in pixels, at least 1."""
    if height > width:
        return max(1, int(width * long_side / height + 0.5)), long_side
    return long_side, max(1, int(height * long_side / width + 0.5))


def picture_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height) of a Pillow image or of its pixels (H, W, ...)."""
    return image.size if isinstance(image, Image.Image) else image.shape[1::-1]


def resize_nearest(
    image: Image.Image | np.ndarray, new_size: tuple[int, int], window: tuple[slice, slice], flip: bool
) -> np.ndarray:
    """The (rows, columns) `window` of `image` resized to `new_size`, mirrored if `flip`; no other pixel is read."""
    pixels = np.asarray(image)
    (height, width), (new_width, new_height) = pixels.shape[:2], new_size
    rows, columns = _nearest_index(height, new_height)[window[0]], _nearest_index(width, new_width)[window[1]]
    pixels = pixels[:, columns[0] : columns[-1] + 1][rows]  # ten times as fast as one index for both
    columns = columns - columns[0]
    return pixels[:, columns[::-1] if flip else columns]


@functools.lru_cache(maxsize=4096)  # some MB; a data set has few sizes
def _nearest_index(old: int, new: int) -> np.ndarray:
    """Which of `old` pixels Pillow takes for each of `new`. Pillow itself is asked, since it rounds in its own way."""
    ramp = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    return np.asarray(ramp.resize((new, 1), Image.Resampling.NEAREST))[0]


def resize_bilinear(
    image: Image.Image | np.ndarray, new_size: tuple[int, int], window: tuple[slice, slice], flip: bool
) -> np.ndarray:
    """The (rows, columns) `window` of `image` resized to `new_size`, mirrored if `flip`, from what it depends on."""
    (width, height), (new_width, new_height), (rows, columns) = picture_size(image), new_size, window
    if _resized_whole(width, height, *new_size):
        source = _cut(image, 0, 0, width, height).resize(new_size, Image.Resampling.BILINEAR)
        left, top = columns.start, rows.start
    else:
        span_x, span_y = _source_span(columns, width, new_width), _source_span(rows, height, new_height)
        source = _cut(image, span_x.first, span_y.first, span_x.last, span_y.last)
        if _in_height_first(*source.size, span_x.size, span_y.size):
            box = (span_x.begin, 0, span_x.end, source.height)
            source = source.resize((span_x.size, source.height), Image.Resampling.BILINEAR, box)
            span_x = span_x._replace(begin=0, end=span_x.size)
        box = (span_x.begin, span_y.begin, span_x.end, span_y.end)
        source = source.resize((span_x.size, span_y.size), Image.Resampling.BILINEAR, box)
        left, top = columns.start - span_x.start, rows.start - span_y.start
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if flip:
        source, left = ImageOps.mirror(source), source.width - left - width
    return np.asarray(source)[top : top + height, left : left + width]


def source_rows(size: tuple[int, int], new_size: tuple[int, int], stop: int) -> int:
    """The rows, from the top, that the rows before `stop` need of a picture resized to `new_size` (width, height)."""
    height, new_height = size[1], new_size[1]
    if _resized_whole(*size, *new_size):
        return height
    stop = min(stop + SEARCHED, new_height)
    return min(int(stop * height / new_height + _reach(height / new_height)) + 1, height)


def _resized_whole(width: int, height: int, new_width: int, new_height: int) -> bool:
    return new_width * new_height <= SMALL or _in_height_first(width, height, new_width, new_height)


def _in_height_first(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Whether Pillow may resize a picture in height before width: newer versions do, where that is less work.

    The order shows in the result, since values are rounded between the two passes. All other pictures are resized in
    width first.
    """
    return height - new_height > 2 * max(width - new_width, 0)


def _cut(image: Image.Image | np.ndarray, left: int, top: int, right: int, bottom: int) -> Image.Image:
    """A part of a picture as a Pillow image."""
    if isinstance(image, Image.Image):
        return image.crop((left, top, right, bottom))
    if not image.flags.c_contiguous:
        return Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    # Read in place, row by row, from its first byte on.
    first = (top * image.shape[1] + left) * image[0, 0].size
    mode = "L" if image.ndim == 2 else "RGB"
    return Image.frombytes(mode, (right - left, bottom - top), image.reshape(-1)[first:], "raw", mode, image.strides[0])


class _Span(NamedTuple):
    """What is resized along one axis.

    The source's pixels `first` to `last` (excluded) are cut out. Of these the part from `begin` to `end`, counted from
    `first`, becomes `size` pixels of the resized picture, which begin at its pixel `start`.
    """

    first: int
    last: int
    begin: float
    end: float
    start: int
    size: int


def _source_span(window: slice, old: int, new: int) -> _Span:
    """Which part of `old` pixels to resize, where all of them would become `new`, so that the result holds `window`.

    The part is somewhat larger than needed. Pillow keeps `begin`, `end` and their difference in float32, and gives the
    values of the whole picture only where float32 holds them nearly exactly. Choosing the best ends nearby leaves a
    tenth as many pixels off by one level.
    """
    scale = old / new
    reach = _reach(scale)
    starts = np.arange(max(window.start - SEARCHED, 0), window.start + 1)[:, None]
    stops = np.arange(window.stop, min(window.stop + SEARCHED, new) + 1)
    firsts = np.maximum((starts * scale - reach).astype(int), 0)
    exact = starts * old / new - firsts
    begins, ends = exact.astype(np.float32), (stops * old / new - firsts).astype(np.float32)
    sizes = stops - starts
    error = np.abs(begins - exact) + np.abs((ends - begins) - sizes * old / new)
    # Prefer the shortest of the exact parts; where none is exact, a short one that is nearly the best.
    error += sizes * np.where(error < 1e-10, 1e-12, 3e-8)
    row, column = divmod(int(error.argmin()), len(stops))
    start, stop, first = int(starts[row, 0]), int(stops[column]), int(firsts[row, 0])
    last = min(int(stop * scale + reach) + 1, old)
    return _Span(first, last, float(begins[row, 0]), min(float(ends[row, column]), last - first), start, stop - start)


def _reach(scale: float) -> float:
    """Half the width of the bilinear filter in pixels of the source, and one for rounding."""
    return max(scale, 1.0) + 1
