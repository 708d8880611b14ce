"""dataset/band_views.py: colour jitter on the RGB channels, brightness and contrast on the others."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dataset.band_views import strong_bands
from dataset.resize import resized_size
from dataset.transform import Box, Geometry, Photometry, apply_photometry, crop_pixels, strong_view

JITTER = (("hue", 0.2), ("brightness", 1.3), ("saturation", 0.6), ("contrast", 0.7))


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 24, 5), dtype=np.uint8)


@pytest.mark.parametrize("box", [None, Box(3, 5, 10, 8)])
def test_the_rgb_channels_are_jittered_as_those_of_an_rgb_image(pixels, box):
    draws, others = Photometry(JITTER, True, 1.2), Photometry(JITTER[::-1], False, None)
    partner = pixels[::-1].copy()
    found = strong_bands((4, 2, 0), pixels, draws, box, partner, others)
    images = [Image.fromarray(np.ascontiguousarray(image[..., [4, 2, 0]])) for image in (pixels, partner)]
    expected = np.asarray(strong_view(images[0], draws, box, images[1], others))
    np.testing.assert_array_equal(found[..., [4, 2, 0]], expected)


def test_other_channels_get_brightness_contrast_and_blur_alone(pixels):
    found = strong_bands((4, 2, 0), pixels, Photometry(JITTER, True, 1.2))
    for channel in (1, 3):
        alone = Photometry((("brightness", 1.3), ("contrast", 0.7)), False, 1.2)
        expected = np.asarray(apply_photometry(Image.fromarray(pixels[..., channel]), alone))
        np.testing.assert_array_equal(found[..., channel], expected)
        assert not np.array_equal(found[..., channel], pixels[..., channel])


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_of_many_channels_is_that_of_each_channel(pixels, flip):
    geometry = Geometry(37, 6, 2, flip)
    found = crop_pixels(pixels, geometry, 40, 0, Image.Resampling.BILINEAR)
    assert found.shape == (40, 40, 5) and resized_size(24, 24, 37) == (37, 37)
    rgb = np.ascontiguousarray(pixels[..., :3])
    np.testing.assert_array_equal(found[..., :3], crop_pixels(rgb, geometry, 40, 0, Image.Resampling.BILINEAR))
