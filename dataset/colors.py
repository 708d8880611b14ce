"""Labels drawn in colours: RGB pixels to label values, exact colours only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

IGNORED_COLOUR = (224, 224, 192)  # of 255 in Pascal VOC's labels and in the tools' pictures


class UnknownColour(ValueError):
    """A pixel has a colour that stands for no label value; the message names both."""


def color_indices(pixels: np.ndarray, colors: Mapping[tuple[int, int, int], int]) -> np.ndarray:
    """The label value of each pixel, uint8 (H, W), of `pixels`, uint8 (H, W, 3).

    `colors` is {(red, green, blue): value}. Raises UnknownColour.
    """
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    codes = red << 16 | green << 8 | blue
    known = sorted((red << 16 | green << 8 | blue, value) for (red, green, blue), value in colors.items())
    known_codes, values = (np.array(column) for column in zip(*known, strict=True))
    found = np.searchsorted(known_codes, codes).clip(max=len(known) - 1)
    odd = known_codes[found] != codes
    if odd.any():
        y, x = np.unravel_index(int(odd.argmax()), odd.shape)
        others = len(np.unique(codes[odd]))
        more = f" (in all {np.count_nonzero(odd)} pixels of {others} such colours)" if others > 1 else ""
        raise UnknownColour(
            f"the colour {pixels[y, x].tolist()} at x = {x}, y = {y}, which is none of label_colors{more}"
        )
    return values[found].astype(np.uint8)
