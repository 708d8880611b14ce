"""What a sample is: the training and validation datasets.

A sample is a function of its key (epoch, indices): its draws are seeded by (seed, epoch, index, view). So two runs see
the same data whatever the number of workers, and N processes together see what one process would.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dataset.band_views import strong_bands
from dataset.files import IGNORE_INDEX, decode_image, decoded_size
from dataset.lists import Sample
from dataset.sampler import VIEW_U, VIEW_X, EpochSampler, Key, stream
from dataset.source import DataSource
from dataset.transform import (
    Box,
    Extent,
    Geometry,
    Photometry,
    crop_pixels,
    draw_cutmix_box,
    draw_geometry,
    draw_photometry,
    rows_needed,
    strong_view,
    to_tensor,
    visible_extent,
)
from dataset.views import Partner, PartnerSample, UnlabeledSample, UnlabeledViews

# What a dataset is used with can be imported from here, too.
__all__ = ["EpochSampler", "Key", "Partner", "TrainDataset", "UnlabeledViews", "ValDataset", "stream"]

Pixels = Image.Image | np.ndarray  # 8-bit RGB, as the decoder gives them


class ViewDraws(NamedTuple):
    """What is drawn for one view of an unlabelled image, and what follows from that before the image is decoded."""

    geometry: Geometry
    rows: int  # of the image, from the top, that the view needs
    extent: Extent
    photometry: tuple[Photometry, ...]  # of each strong view
    boxes: tuple[Box | None, ...]


class TrainDataset(Dataset):
    """`(image, label)` of a labelled sample; with unlabelled images `((image, label), UnlabeledSample)`.

    8-bit tensors: images (S, S, 3), label (S, S), S = crop_size; `collate` and `to_device` make of them what a step
    takes. `strong_views` is 1 or 2. `photometry` is "worker", or "device" where `to_device` is to make the strong
    views.
    """

    def __init__(
        self,
        labeled: Sequence[Sample],
        unlabeled: Sequence[Sample] | None,
        source: DataSource,
        crop_size: int,
        seed: int,
        strong_views: int = 2,
        photometry: str = "worker",
    ) -> None:
        self.labeled, self.unlabeled, self.source = labeled, unlabeled, source
        self.crop_size, self.seed, self.strong_views, self.photometry = crop_size, seed, strong_views, photometry

    def __getitem__(self, key: Key) -> Any:
        labeled = self._labeled(key)
        return labeled if self.unlabeled is None else (labeled, self._unlabeled(key))

    def _labeled(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        size, sample = self.crop_size, self.labeled[key.labeled % len(self.labeled)]
        with self.source.open_image(sample.image) as image, self.source.open_label(sample.label) as label:
            width, height = decoded_size(image)
            geometry = draw_geometry(width, height, size, stream(self.seed, VIEW_X, key.epoch, key.labeled))
            image, label = self.source.decode_pair(sample, image, label, rows_needed(width, height, geometry, size))
        crop = crop_pixels(image, geometry, size, 0, Image.Resampling.BILINEAR)
        label_crop = crop_pixels(label, geometry, size, IGNORE_INDEX, Image.Resampling.NEAREST)
        return torch.from_numpy(crop), torch.from_numpy(label_crop)

    def _unlabeled(self, key: Key) -> UnlabeledSample:
        (image, own), (image_mix, mix) = self._decode(key)
        weak = self._crop(image, own)
        weak_mix = self._crop(image_mix, mix) if mix else None
        return UnlabeledSample(
            torch.from_numpy(weak),
            self._strong_views(weak, own, weak_mix, mix) if self.photometry == "worker" else (),
            own.extent,
            own.boxes,
            own.photometry,
            PartnerSample(torch.from_numpy(weak_mix), mix.extent, mix.photometry) if mix else None,
            pasted=key.partner >= 0,
        )

    def label_of_weak_view(self, key: Key, sample: Sample) -> torch.Tensor:
        """uint8 (S, S): the label of `sample`, seen like the weak view of the same image at `key.unlabeled`.

        For pictures and statistics of labelled images that stand among the unlabelled ones; no step sees it.
        """
        with self.source.open_image(sample.image) as image, self.source.open_label(sample.label) as label:
            own = self._draw(key, 0, *decoded_size(image))
            _, label = self.source.decode_pair(sample, image, label, own.rows)
        return torch.from_numpy(
            crop_pixels(label, own.geometry, self.crop_size, IGNORE_INDEX, Image.Resampling.NEAREST)
        )

    def _strong_views(
        self, weak: np.ndarray, own: ViewDraws, weak_mix: np.ndarray | None, mix: ViewDraws | None
    ) -> tuple[torch.Tensor, ...]:
        if bands := self.source.bands:
            view_of, image, partner = partial(strong_bands, bands.rgb), weak, weak_mix
        else:
            view_of, image = strong_view, Image.fromarray(weak)
            partner = None if mix is None else Image.fromarray(weak_mix)
        if mix is None:
            views = [view_of(image, draw) for draw in own.photometry]
        else:
            draws = zip(own.photometry, own.boxes, mix.photometry, strict=True)
            views = [view_of(image, draw, box, partner, draw_mix) for draw, box, draw_mix in draws]
        return tuple(torch.from_numpy(np.array(view)) for view in views)

    def _decode(self, key: Key) -> tuple[tuple[Pixels, ViewDraws], tuple[Pixels, ViewDraws] | tuple[None, None]]:
        """The image and its CutMix partner, if any box needs one, each decoded as far as the draws for its view say."""
        with self.source.open_image(self.unlabeled[key.unlabeled].image) as opened:
            own = self._draw(key, 0, *decoded_size(opened))
            if key.partner < 0 or not any(own.boxes):
                return (decode_image(opened, own.rows), own), (None, None)
            if key.partner == key.unlabeled:  # decoded once
                mix = self._draw(key, 1, *decoded_size(opened))
                image = decode_image(opened, max(own.rows, mix.rows))
                return (image, own), (image, mix)
            image = decode_image(opened, own.rows)
        with self.source.open_image(self.unlabeled[key.partner].image) as opened:
            mix = self._draw(key, 1, *decoded_size(opened))
            return (image, own), (decode_image(opened, mix.rows), mix)

    def _draw(self, key: Key, view: int, width: int, height: int) -> ViewDraws:
        """All that is drawn for a view of an image of `width` x `height`: 0 is the sample's own, 1 its partner's."""
        rng, size = stream(self.seed, VIEW_U, key.epoch, key.unlabeled, view), self.crop_size
        geometry = draw_geometry(width, height, size, rng)
        draws = [(draw_photometry(rng), draw_cutmix_box(size, rng)) for _ in range(self.strong_views)]
        photometry, boxes = zip(*draws, strict=True)
        rows, extent = rows_needed(width, height, geometry, size), visible_extent(width, height, geometry, size)
        return ViewDraws(geometry, rows, extent, photometry, boxes)

    def _crop(self, image: Pixels, draws: ViewDraws) -> np.ndarray:
        return crop_pixels(image, draws.geometry, self.crop_size, 0, Image.Resampling.BILINEAR)


class ValDataset(Dataset):
    """`(image, label)` at native size: 8-bit tensors (3, H, W) and (H, W)."""

    def __init__(self, samples: Sequence[Sample], source: DataSource) -> None:
        self.samples, self.source = samples, source

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.source.load(self.samples[index])
        return to_tensor(image), to_tensor(label)
