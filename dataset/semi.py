"""Datasets, their order in an epoch, and loaders for semi-supervised and supervised training and for validation.

A sample is a function of its key (epoch, indices): its draws are seeded by (seed, epoch, index, view). So two runs see
the same data whatever the number of workers, and N processes together see what one process would.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from dataset.cache import ImageCache
from dataset.files import (
    IGNORE_INDEX,
    RowsNeeded,
    decode_image,
    map_label,
    read_indices,
    size_fault,
)
from dataset.lists import Sample
from dataset.resize import picture_size
from dataset.transform import (
    Box,
    Extent,
    Geometry,
    Photometry,
    apply_photometry,
    crop_pixels,
    draw_cutmix_box,
    draw_geometry,
    draw_photometry,
    rows_needed,
    to_tensor,
    visible_extent,
)

# What a random stream is for: part of its seed, so that no two purposes share one.
ORDER_X, ORDER_U, VIEW_X, VIEW_U = range(4)


class UnlabeledViews(NamedTuple):
    """Views of a batch of B unlabelled images, as a step takes them.

    weak, strong1, strong2: normalised (B, 3, H, W); ignore_mask: (B, H, W), 255 on padding, else 0; box1, box2:
    (B, H, W), nonzero inside the CutMix box of the strong view. strong2 and box2 are None where a method has one only.
    The CutMix partners' boxes are None too. `used`: (U,) int64, which of the B samples `weak` holds; None: all of them.
    """

    weak: torch.Tensor
    strong1: torch.Tensor
    strong2: torch.Tensor | None
    ignore_mask: torch.Tensor
    box1: torch.Tensor | None
    box2: torch.Tensor | None
    used: torch.Tensor | None = None


class Key(NamedTuple):
    """One sample of an epoch. `labeled` counts through the repeated labelled set, so each repetition has own draws."""

    epoch: int
    labeled: int
    unlabeled: int = -1
    partner: int = -1


def stream(seed: int, *purpose: int) -> np.random.Generator:
    """An independent generator for each tuple of non-negative integers below 2**32, among tuples of one length."""
    return np.random.default_rng(np.array([seed, *purpose], np.uint32))  # sooner than from a list


class EpochSampler(Sampler[Key]):
    """The keys of one process for one epoch: a pass over the unlabelled set, shuffled anew, as in the release.

    Each of the `processes` gets ceil(N / processes) images, the last few repeated, cut to whole batches. Position p of
    the epoch's order goes to process p mod `processes`, so a step's images are the same at any number of processes.
    The labelled set is repeated to the unlabelled one's length; if it is longer, each epoch takes the first part of a
    fresh permutation. Without unlabelled images (`num_unlabeled` None) it is one pass over the labelled set.
    """

    def __init__(
        self,
        num_labeled: int,
        num_unlabeled: int | None,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        partner: str = "same_image",
    ) -> None:
        self.num_labeled, self.num_unlabeled, self.batch_size, self.seed = num_labeled, num_unlabeled, batch_size, seed
        self.rank, self.processes, self.partner = rank, processes, partner
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and how many of its samples it leaves out."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        length = self.num_labeled if self.num_unlabeled is None else self.num_unlabeled
        return math.ceil(length / self.processes) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        return islice(self._keys(), self.start, None)

    def _keys(self) -> Iterator[Key]:
        if self.num_unlabeled is None:
            order = stream(self.seed, ORDER_X, self.epoch).permutation(self.num_labeled)
            yield from (Key(self.epoch, int(x)) for x in self._own_share(order))
            return
        pool = max(self.num_labeled, self.num_unlabeled)
        order_x = stream(self.seed, ORDER_X, self.epoch).permutation(pool)[: self.num_unlabeled]
        order_u = stream(self.seed, ORDER_U, self.epoch).permutation(self.num_unlabeled)
        # Another image as partner: the next one in the epoch's order, so never the image itself.
        order_mix = np.roll(order_u, -1) if self.partner == "other_image" else order_u
        shares = (self._own_share(order) for order in (order_x, order_u, order_mix))
        for x, u, mix in zip(*shares, strict=True):
            yield Key(self.epoch, int(x), int(u), int(mix))

    def _own_share(self, order: np.ndarray) -> np.ndarray:
        padded = np.resize(order, math.ceil(len(order) / self.processes) * self.processes)
        return padded[self.rank :: self.processes][: len(self)]


class UnlabeledSample(NamedTuple):
    """PackedViews of one sample, without the leading dimension; `partner` is None where no box needs it."""

    weak: torch.Tensor
    strong: tuple[torch.Tensor, ...]
    partner: torch.Tensor | None
    extent: tuple[Extent, Extent]
    boxes: tuple[Box | None, ...]
    photometry: tuple[tuple[Photometry | None, ...], ...]


class TrainDataset(Dataset):
    """`(image, label)` of a labelled sample; with unlabelled images `((image, label), UnlabeledSample)`.

    8-bit tensors: images (S, S, 3), label (S, S), S = crop_size; `collate` and `to_device` make of them what a step
    takes. `strong_views` is 1 or 2. `label_map` gives the class of values in the label files that are no class
    themselves. `photometry` is "worker", or "device" where `to_device` is to make the strong views.
    """

    def __init__(
        self,
        labeled: Sequence[Sample],
        unlabeled: Sequence[Sample] | None,
        data_root: str | Path,
        crop_size: int,
        seed: int,
        strong_views: int = 2,
        label_map: Mapping[int, int] | None = None,
        cache: ImageCache | None = None,
        photometry: str = "worker",
    ) -> None:
        self.labeled, self.unlabeled, self.data_root = labeled, unlabeled, Path(data_root)
        self.label_map, self.cache, self.photometry = label_map, cache, photometry
        self.crop_size, self.seed, self.strong_views = crop_size, seed, strong_views

    def __getitem__(self, key: Key) -> Any:
        labeled = self._labeled(key)
        return labeled if self.unlabeled is None else (labeled, self._unlabeled(key))

    def _labeled(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        sample, size = self.labeled[key.labeled % len(self.labeled)], self.crop_size

        def draw(width: int, height: int) -> Geometry:
            return draw_geometry(width, height, size, stream(self.seed, VIEW_X, key.epoch, key.labeled))

        def rows(width: int, height: int) -> int:
            return rows_needed(width, height, draw(width, height), size)

        image, label = load_sample(sample, self.data_root, self.label_map, self.cache, rows)
        geometry = draw(*picture_size(image))
        crop = crop_pixels(image, geometry, size, 0, Image.Resampling.BILINEAR)
        label_crop = crop_pixels(label, geometry, size, IGNORE_INDEX, Image.Resampling.NEAREST)
        return torch.from_numpy(crop), torch.from_numpy(label_crop)

    def _unlabeled(self, key: Key) -> UnlabeledSample:
        def rows(width: int, height: int) -> int:
            geometries = (self._draw_view(key, view, width, height)[0] for view in (0, 1))
            return max(rows_needed(width, height, geometry, self.crop_size) for geometry in geometries)

        image = load_image(os.path.join(self.data_root, self.unlabeled[key.unlabeled].image), self.cache, rows)
        weak, extent, draws, boxes = self._view(image, key, view=0)
        partner, extent_mix, draws_mix = None, extent, (None,) * len(draws)
        if any(boxes):  # else nothing of the partner is used
            if key.partner != key.unlabeled:  # an image that is its own partner is decoded once
                image = load_image(os.path.join(self.data_root, self.unlabeled[key.partner].image), self.cache, rows)
            partner, extent_mix, draws_mix, _ = self._view(image, key, view=1)
        strong, later = (), (draws, draws_mix)
        if self.photometry == "worker":
            pictures = [None if pixels is None else Image.fromarray(pixels) for pixels in (weak, partner)]
            views = zip(draws, draws_mix, boxes, strict=True)
            strong, later = tuple(_strong_view(*pictures, *view) for view in views), ()
        mix = None if partner is None else torch.from_numpy(partner)
        return UnlabeledSample(torch.from_numpy(weak), strong, mix, (extent, extent_mix), boxes, later)

    def _view(
        self, image: Image.Image | np.ndarray, key: Key, view: int
    ) -> tuple[np.ndarray, Extent, tuple[Photometry, ...], tuple[Box | None, ...]]:
        """The weak view, and what is drawn for the strong views that start from it."""
        geometry, photometry, boxes = self._draw_view(key, view, *picture_size(image))
        weak = crop_pixels(image, geometry, self.crop_size, 0, Image.Resampling.BILINEAR)
        return weak, visible_extent(*picture_size(image), geometry, self.crop_size), photometry, boxes

    def _draw_view(
        self, key: Key, view: int, width: int, height: int
    ) -> tuple[Geometry, tuple[Photometry, ...], tuple[Box | None, ...]]:
        """All that is drawn for a view of an image of `width` x `height`: nothing but the arguments tells what."""
        rng = stream(self.seed, VIEW_U, key.epoch, key.unlabeled, view)
        geometry = draw_geometry(width, height, self.crop_size, rng)
        draws = [(draw_photometry(rng), draw_cutmix_box(self.crop_size, rng)) for _ in range(self.strong_views)]
        return geometry, *zip(*draws, strict=True)


def _strong_view(
    weak: Image.Image, partner: Image.Image | None, draw: Photometry, draw_mix: Photometry, box: Box | None
) -> torch.Tensor:
    """The strong view of `weak`, with the partner's inside the box."""
    strong = apply_photometry(weak, draw)
    if box is not None:
        strong.paste(apply_photometry(partner, draw_mix, box), (box.x, box.y))
    return torch.from_numpy(np.array(strong))


def load_sample(
    sample: Sample,
    root: Path,
    label_map: Mapping[int, int] | None,
    cache: ImageCache | None,
    rows: RowsNeeded | None = None,
) -> tuple[Image.Image | np.ndarray, np.ndarray]:
    """The image, as `load_image` gives it, and the label (H, W) of class indices, uint8. Raises DataError."""
    image = load_image(os.path.join(root, sample.image), cache, rows)
    path = os.path.join(root, sample.label)
    label = read_indices(path, rows) if cache is None else cache.label(path)
    if fault := size_fault(sample, root, picture_size(image), picture_size(label)):
        raise fault
    return image, np.asarray(map_label(Image.fromarray(label), label_map)) if label_map else label


def load_image(path: str | Path, cache: ImageCache | None, rows: RowsNeeded | None = None) -> Image.Image | np.ndarray:
    """8-bit RGB: a Pillow image or uint8 (H, W, 3), whichever is there first, maybe no further than the `rows` needed.

    Raises DataError.
    """
    return decode_image(path, rows) if cache is None else cache.image(path)


class ValDataset(Dataset):
    """`(image, label)` at native size: 8-bit tensors (3, H, W) and (H, W). `label_map` as in TrainDataset."""

    def __init__(
        self,
        samples: Sequence[Sample],
        data_root: str | Path,
        label_map: Mapping[int, int] | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        self.samples, self.data_root, self.label_map, self.cache = samples, Path(data_root), label_map, cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = load_sample(self.samples[index], self.data_root, self.label_map, self.cache)
        return to_tensor(image), to_tensor(label)
