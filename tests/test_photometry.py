"""dataset/photometry.py: a batch's photometry is that of its samples, one by one, as the loading workers make it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.photometry import NUMBERS, apply_photometry_batch, photometry_numbers
from dataset.transform import Photometry, apply_photometry, draw_photometry

NAMES = ("brightness", "contrast", "saturation", "hue")
PICTURES = np.random.default_rng(0).integers(0, 256, (6, 24, 20, 3), dtype=np.uint8)


def _batch(pictures: np.ndarray, photometries: list[Photometry]) -> torch.Tensor:
    numbers = torch.tensor([photometry_numbers(photometry) for photometry in photometries])
    assert numbers.shape == (len(pictures), NUMBERS) and numbers.dtype == torch.float32
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return apply_photometry_batch(images, numbers).permute(0, 2, 3, 1)


def _one_by_one(pictures: np.ndarray, photometries: list[Photometry]) -> torch.Tensor:
    pairs = zip(pictures, photometries, strict=True)
    return torch.stack([torch.from_numpy(np.array(apply_photometry(Image.fromarray(p), d))) for p, d in pairs])


def _assert_nearly_equal(pictures: np.ndarray, photometries: list[Photometry], share: float) -> None:
    found, expected = _batch(pictures, photometries), _one_by_one(pictures, photometries)
    off = (found.int() - expected.int()).abs()
    assert found.dtype == torch.uint8 and off.max() <= 1 and (off > 0).double().mean() <= share


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("picture", ["noise", "white", "black"])
def test_brightness_contrast_and_saturation_are_the_workers_bit_for_bit(name, picture):
    pictures = {"noise": PICTURES, "white": np.full_like(PICTURES, 255), "black": np.zeros_like(PICTURES)}[picture]
    _assert_nearly_equal(
        pictures, [Photometry(((name, f),), False, None) for f in (0.5, 0.77, 0.99, 1.0, 1.01, 1.5)], 0
    )


def test_a_hue_of_nearly_nothing_is_not_no_hue():
    """The way to 8-bit hues and back loses something even where they do not move."""
    photometries = [Photometry((("hue", f),), False, None) for f in (-0.25, -0.1, -0.001, 0.001, 0.1, 0.25)]
    _assert_nearly_equal(PICTURES, photometries, 1e-3)
    assert not torch.equal(_batch(PICTURES[2:4], photometries[2:4]), torch.from_numpy(PICTURES[2:4]))


def test_grey_blur_and_nothing_are_the_workers_bit_for_bit():
    others = [(True, None), (False, 0.13), (False, 0.77), (True, 1.23), (False, 1.99), (False, None)]
    photometries = [Photometry((), grey, radius) for grey, radius in others]
    _assert_nearly_equal(PICTURES, photometries, 0)
    assert np.array_equal(_batch(PICTURES, photometries)[-1], PICTURES[-1])


def test_each_sample_has_its_own_order_of_the_jitter():
    factors = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.3, "hue": 0.2}
    orders = list(itertools.permutations(NAMES))
    photometries = [Photometry(tuple((name, factors[name]) for name in order), False, None) for order in orders]
    _assert_nearly_equal(np.repeat(PICTURES[:1], len(orders), 0), photometries, 1e-3)


def test_what_training_draws_is_the_workers_but_for_a_level_here_and_there():
    rng = np.random.default_rng(1)
    for _ in range(3):
        _assert_nearly_equal(PICTURES, [draw_photometry(rng) for _ in PICTURES], 1e-3)
