"""Where images and labels come from: paths below a root folder, decoded or taken from a cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.bands import Bands, read_bands
from dataset.cache import ImageCache
from dataset.files import LabelColors, decode_image, decode_label, map_label, open_image, open_label, size_fault
from dataset.lists import Sample
from dataset.resize import picture_size

# A file of which the header is read, or the pixels, uint8 (H, W, 3) or (H, W), that the cache has of it.
Opened = Image.Image | np.ndarray


class DataSource(NamedTuple):
    """The folder that list files' paths are relative to, the `label_map` of its labels, and a cache of its pictures.

    `label_map` gives the class of values in the label files that are no class themselves, `label_colors` the values of
    labels that are drawn in colours, `bands` how images of other channels than 8-bit RGB are read.
    Each method raises DataError.
    """

    root: str | Path
    label_map: Mapping[int, int] | None = None
    cache: ImageCache | None = None
    label_colors: LabelColors | None = None
    bands: Bands | None = None

    def open_image(self, name: str) -> AbstractContextManager[Opened]:
        """The image of that name in a list."""
        path = os.path.join(self.root, name)
        if self.bands is None:
            return open_image(path) if self.cache is None else contextlib.nullcontext(self.cache.image(path))
        read = partial(read_bands, bands=self.bands)
        if self.cache is None:
            return contextlib.nullcontext(read(path))
        variant = f" {self.bands.value_range}"
        return contextlib.nullcontext(self.cache.image(path, self.bands.channels, read, variant))

    def open_label(self, name: str) -> AbstractContextManager[Opened]:
        """The label of that name in a list."""
        path = os.path.join(self.root, name)
        if self.cache is None:
            return open_label(path, self.label_colors)
        return contextlib.nullcontext(self.cache.label(path, self.label_colors))

    def decode_pair(
        self, sample: Sample, image: Opened, label: Opened, rows: int | None = None
    ) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        """The opened image, 8-bit RGB, and the opened label, uint8 (H, W), of a labelled sample.

        They are of equal size, and the label is mapped by `label_map`. `rows` as for `dataset.files.decode_image`.
        """
        image, label = decode_image(image, rows), decode_label(label, rows, self.label_colors)
        root = Path(self.root)
        if fault := size_fault(root / sample.image, root / sample.label, picture_size(image), picture_size(label)):
            raise fault
        return image, np.asarray(map_label(Image.fromarray(label), self.label_map)) if self.label_map else label

    def load(self, sample: Sample) -> tuple[Image.Image | np.ndarray, np.ndarray]:
        """The whole image and label of a labelled sample."""
        with self.open_image(sample.image) as image, self.open_label(sample.label) as label:
            return self.decode_pair(sample, image, label)
