"""model/input_channels.py: the rule of inflation; whole models are in test_bands.py."""

from __future__ import annotations

import torch

from model.input_channels import inflated


def test_an_image_of_equal_channels_gives_the_features_that_it_had():
    weight = torch.randn(4, 3, 3, 3)
    wide = inflated(weight, 7, (6, 0, 3))
    assert wide.shape == (4, 7, 3, 3)
    torch.testing.assert_close(wide.sum(1), weight.sum(1))
    torch.testing.assert_close(wide[:, 6] * 7 / 3, weight[:, 0])
    torch.testing.assert_close(wide[:, 1] * 7 / 3, weight.mean(1))
