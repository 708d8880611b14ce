"""What is measured: synthetic images like those of published data sets, and the sizes of model, crop and losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataset.lists import Sample
from dataset.transform import box_mask, draw_cutmix_box


@dataclass(frozen=True)
class Kind:
    """Synthetic images like those of a published data set, and the crop size of its recipe."""

    name: str
    size: tuple[int, int]
    suffix: str
    count: int
    crop: int
    noise: float  # makes the files as large as the data set's: about 110 kB and 2.3 MB
    samples: tuple[Sample, ...] = ()

    def write(self, root: Path) -> Kind:
        """Write the images and labels; a Kind with their names."""
        rng = np.random.default_rng(0)
        samples = tuple(Sample(f"{self.name}{i}{self.suffix}", f"{self.name}{i}_label.png") for i in range(self.count))
        width, height = self.size
        for sample in samples:
            coarse = rng.normal(110, 70, (height // 24 + 2, width // 24 + 2, 3)).clip(0, 255).astype(np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(self.size, Image.Resampling.BICUBIC)).astype(float)
            noisy = (smooth + rng.normal(0, self.noise, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / sample.image, quality=92)
            blocks = rng.integers(0, 19, (height // 24 + 1, width // 24 + 1), dtype=np.uint8)
            Image.fromarray(blocks.repeat(24, 0).repeat(24, 1)[:height, :width]).save(root / sample.label)
        return replace(self, samples=samples)


PASCAL = Kind("pascal", (500, 375), ".jpg", 24, 321, noise=14.0)
CITYSCAPES = Kind("cityscapes", (2048, 1024), ".png", 6, 801, noise=0.8)


@dataclass(frozen=True)
class Inputs:
    """What a group measures: images below `root`, how often, and on what sizes."""

    root: Path
    kinds: Sequence[Kind]
    rounds: int
    backbone: str = "resnet50"
    crop: int = 321
    backbone_v2: str = "dinov2_small"
    crop_v2: int = 518
    loss_size: int = 801  # height and width of the logits


def write_inputs(root: Path, rounds: int) -> Inputs:
    """The inputs of the published sizes; images are written below `root`."""
    return Inputs(root, [kind.write(root) for kind in (PASCAL, CITYSCAPES)], rounds)


def noise_batch(seed: int, images: int, size: int, nclass: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Two samples: images of noise, two CutMix boxes as often and as large as in training, label, ignore mask."""
    rng = np.random.default_rng(seed)
    found = [noise_images(10 * seed + i, 2, size).to(dtype) for i in range(images)]
    boxes = [box_mask(torch.tensor([draw_cutmix_box(size, rng) or (0, 0, 0, 0) for _ in range(2)]), size) for _ in "12"]
    label = torch.from_numpy(rng.integers(0, nclass, (2, size, size)))
    ignore_mask = torch.zeros(2, size, size, dtype=torch.uint8)
    ignore_mask[:, size * 3 // 4 :] = 255
    return found, boxes, label, ignore_mask


def noise_images(seed: int, count: int, size: int) -> torch.Tensor:
    """Float (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
