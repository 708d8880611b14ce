"""Labels and predictions as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dataset.files import IGNORE_INDEX

IGNORED_COLOUR = (224, 224, 192)
GAP = 4  # pixels between the pictures of a panel


def colorize(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """An index PNG's worth of `label` (H, W), 8-bit: mode P, so that its pixel values stay class indices."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORE_INDEX] = IGNORED_COLOUR
    image = Image.fromarray(np.ascontiguousarray(label, dtype=np.uint8))
    image.putpalette(colours.tobytes())
    return image


def panel(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows and columns on white, each column as wide and each row as high as its largest picture."""
    widths = [max(image.width for image in column) for column in zip(*rows, strict=True)]
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), sum(heights) + GAP * (len(heights) + 1)), "white")
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        x = GAP
        for image, width in zip(row, widths, strict=True):
            sheet.paste(image.convert("RGB"), (x, y))
            x += width + GAP
        y += height + GAP
    return sheet
