"""Prediction band by band: tiles with overlap, of which each pixel is taken from the one that it lies deepest in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from dataset.windows import Rows


class Span(NamedTuple):
    """A tile along one side: it sees the pixels [start, stop), and those of [first, last) are taken from it."""

    start: int
    stop: int
    first: int
    last: int


def tile_spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Tiles of `tile` pixels at stride `tile - overlap`, the last one moved back to end at the border.

    Two neighbours meet in the middle of what both see, so a pixel has half the overlap around it, or the border.
    """
    starts = [*range(0, length - tile, tile - overlap), max(0, length - tile)]
    stops = [min(start + tile, length) for start in starts]
    cuts = [0, *((start + stop) // 2 for start, stop in zip(starts[1:], stops[:-1], strict=True)), length]
    return [Span(*numbers) for numbers in zip(starts, stops, cuts[:-1], cuts[1:], strict=True)]


# From the pixels of a tile, uint8 (H, W, 3), to arrays (H, W, ...) of what is predicted for them.
Forward = Callable[[np.ndarray], dict[str, np.ndarray]]


def predict_bands(rows: Rows, tile: int, overlap: int, forward: Forward) -> Iterator[dict[str, np.ndarray]]:
    """`forward` of an image's tiles, joined to bands over its whole width, from the top to the bottom.

    Each has also the `image`'s own pixels. In memory are the rows of one band of tiles.
    """
    columns = tile_spans(rows.width, tile, overlap)
    for row in tile_spans(rows.height, tile, overlap):
        pixels = rows.window(row.start, row.stop)
        band: dict[str, np.ndarray] = {"image": pixels[row.first - row.start : row.last - row.start]}
        for column in columns:
            inside = (slice(row.first - row.start, row.last - row.start),)
            inside += (slice(column.first - column.start, column.last - column.start),)
            for name, values in forward(pixels[:, column.start : column.stop]).items():
                if name not in band:
                    band[name] = np.empty((row.last - row.first, rows.width, *values.shape[2:]), values.dtype)
                band[name][:, column.first : column.last] = values[inside]
        yield band
