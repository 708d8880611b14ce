"""The model of the benchmark: the same weights for the naive way and for ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model import build_model
from scripts.benchmark.naive import with_plain_convolutions
from util.config import load_config
from util.precision import set_precision


def make_model(backbone: str, crop: int, **options: Any) -> nn.Module:
    """The model of a recipe with `options`; the same weights each time."""
    settings = {
        "dataset": "synthetic",
        "nclass": 19,
        "backbone": backbone,
        "pretrained": False,
        "crop_size": crop,
        "device": "cpu",
        **options,
    }
    cfg = load_config("configs/pascal.yaml", settings)
    torch.manual_seed(0)
    return set_precision(build_model(cfg), cfg)


def make_naive_model(backbone: str, crop: int) -> nn.Module:
    """The same in float32, contiguous and with PyTorch's convolutions."""
    return with_plain_convolutions(make_model(backbone, crop, channels_last=False))
