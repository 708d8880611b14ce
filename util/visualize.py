"""Labels, predictions and class frequencies as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset.colors import IGNORED_COLOUR
from dataset.files import IGNORE_INDEX

GAP, TITLE = 4, 16  # pixels between the pictures of a panel, and for the titles above them
WRONG, RIGHT = (213, 94, 0), (86, 180, 233)  # vermilion and sky blue: apart with every kind of colour vision


def colorize(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """An index PNG's worth of `label` (H, W), 8-bit: mode P, so that its pixel values stay class indices."""
    image = Image.fromarray(np.ascontiguousarray(label, dtype=np.uint8))
    image.putpalette(full_palette(palette).tobytes())
    return image


def full_palette(palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """The colour of each 8-bit label value, uint8 (256, 3): the classes', black, and one for ignored pixels."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORE_INDEX] = IGNORED_COLOUR
    return colours


def panel(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] = ()) -> Image.Image:
    """Pictures in rows and columns on white, each column as wide and each row as high as its largest picture.

    `titles` head the columns, if there are any. By Pillow, as training draws panels and does not need matplotlib.
    """
    font, top = ImageFont.load_default(), TITLE if titles else 0
    lengths = [math.ceil(font.getlength(title)) for title in titles] or [0] * len(rows[0])
    widths = [
        max(length, *(image.width for image in column))
        for length, column in zip(lengths, zip(*rows, strict=True), strict=True)
    ]
    heights = [max(image.height for image in row) for row in rows]
    size = (sum(widths) + GAP * (len(widths) + 1), top + sum(heights) + GAP * (len(heights) + 1))
    sheet, y = Image.new("RGB", size, "white"), GAP + top
    for index, title in enumerate(titles):
        x = sum(widths[:index]) + GAP * (index + 1)
        ImageDraw.Draw(sheet).text((x, 3), title, "black", font)
    for row, height in zip(rows, heights, strict=True):
        x = GAP
        for image, width in zip(row, widths, strict=True):
            sheet.paste(image.convert("RGB"), (x, y))
            x += width + GAP
        y += height + GAP
    return sheet


def errors(image: np.ndarray, label: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The image in grey, with wrong pixels in vermilion and right ones in sky blue; ignored ones stay grey."""
    grey = image.mean(axis=2, keepdims=True)
    colour = np.where((label == classes)[..., None], RIGHT, WRONG)
    mixed = np.where((label == IGNORE_INDEX)[..., None], grey, 0.4 * grey + 0.6 * colour)
    return np.broadcast_to(mixed, image.shape).round().astype(np.uint8)


def percent(share: float) -> str:
    """A share (0 to 1) in percent, to two places; what would round to nothing but is there stays visible."""
    if share == 0:
        return "absent"
    return "< 0.01 %" if share < 0.00005 else f"{100 * share:.2f} %"
