"""The data path in its plainest form: what `dataset.semi` must equal, and what `scripts.benchmark` measures it against.

Each view decodes its image, resizes the whole picture, cuts the crop out and makes every strong view of it, whether a
method uses it or not; samples are normalised floats with maps of masks and boxes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import default_collate
from torchvision.transforms import functional as F

from dataset.files import IGNORE_INDEX, map_label, read_image, read_label
from dataset.resize import resized_size
from dataset.sampler import VIEW_U, VIEW_X, Key, stream
from dataset.semi import TrainDataset
from dataset.transform import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Box,
    Geometry,
    Photometry,
    draw_cutmix_box,
    draw_geometry,
    draw_photometry,
)
from dataset.views import UnlabeledViews


class NaiveDataset(TrainDataset):
    """TrainDataset, whose arguments and draws it has; an item is `((image, label), views, partner's views)`.

    The strong views of both are not mixed yet. Without a partner in the key the last is missing, and without unlabelled
    images there is the labelled sample alone.
    """

    def __getitem__(self, key: Key) -> Any:
        labeled = self._labeled(key)
        if self.unlabeled is None:
            return labeled
        return (labeled, self._views(key, 0)) if key.partner < 0 else (labeled, *self.pair(key))

    def pair(self, key: Key) -> tuple[UnlabeledViews, UnlabeledViews]:
        """The views of the unlabelled image and of its CutMix partner, whose pixels are not pasted."""
        return self._views(key, 0), self._views(key, 1)

    def _labeled(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self.labeled[key.labeled % len(self.labeled)]
        image = read_image(Path(self.source.root, sample.image))
        label = map_label(read_label(Path(self.source.root, sample.label)), self.source.label_map)
        geometry = draw_geometry(*image.size, self.crop_size, stream(self.seed, VIEW_X, key.epoch, key.labeled))
        image = resize_whole(image, geometry, self.crop_size, 0, Image.Resampling.BILINEAR)
        label = resize_whole(label, geometry, self.crop_size, IGNORE_INDEX, Image.Resampling.NEAREST)
        return to_float(image), torch.from_numpy(np.array(label)).long()

    def _views(self, key: Key, view: int) -> UnlabeledViews:
        image = read_image(Path(self.source.root, self.unlabeled[(key.unlabeled, key.partner)[view]].image))
        rng, size = stream(self.seed, VIEW_U, key.epoch, key.unlabeled, view), self.crop_size
        geometry = draw_geometry(*image.size, size, rng)
        weak = resize_whole(image, geometry, size, 0, Image.Resampling.BILINEAR)
        shown = Image.new("L", image.size, 0)
        ignore_mask = resize_whole(shown, geometry, size, IGNORE_INDEX, Image.Resampling.NEAREST)
        strong = [(to_float(whole_photometry(weak, draw_photometry(rng))), _box_map(size, rng)) for _ in range(2)]
        (strong1, box1), (strong2, box2) = strong
        ignore_mask = torch.from_numpy(np.array(ignore_mask)).long()
        return UnlabeledViews(to_float(weak), strong1, strong2, ignore_mask, box1, box2)


def collate_naive(samples: list[Any]) -> Any:
    """A batch of NaiveDataset's samples, ready for a step."""
    if isinstance(samples[0][1], torch.Tensor):
        return default_collate(samples)
    labeled, *views = zip(*samples, strict=True)
    stacked = [UnlabeledViews(*map(torch.stack, zip(*view, strict=True))) for view in views]
    return default_collate(labeled), *stacked


def resize_whole(
    image: Image.Image, geometry: Geometry, size: int, fill: int, resample: Image.Resampling
) -> Image.Image:
    """`apply_geometry` by its definition: resize, pad, crop, flip."""
    image = image.resize(resized_size(*image.size, geometry.long_side), resample)
    pad = (0, 0, max(size - image.width, 0), max(size - image.height, 0))
    if any(pad):
        image = ImageOps.expand(image, pad, fill=fill)
    image = image.crop((geometry.x, geometry.y, geometry.x + size, geometry.y + size))
    return ImageOps.mirror(image) if geometry.flip else image


def whole_photometry(image: Image.Image, photometry: Photometry) -> Image.Image:
    """`apply_photometry` of the whole picture."""
    for name, factor in photometry.jitter:
        image = getattr(F, f"adjust_{name}")(image, factor)
    if photometry.grey:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if photometry.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(photometry.blur_radius))
    return image


def to_float(image: Image.Image) -> torch.Tensor:
    """Normalised float32 (3, H, W)."""
    return F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


def _box_map(size: int, rng: np.random.Generator) -> torch.Tensor:
    box_map = torch.zeros(size, size, dtype=torch.int64)
    x, y, width, height = draw_cutmix_box(size, rng) or Box(0, 0, 0, 0)
    box_map[y : y + height, x : x + width] = 1
    return box_map
