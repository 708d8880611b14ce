"""util/evaluate.py with a network of patches: UniMatch V2's reference figures, and the rules for small images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model import build_model
from tests.reference import formulas
from tests.reference.weights import check_summary, reference_state_v2
from util.evaluate import class_scores, evaluate, seen_size, whole, window_starts

FIGURES = json.loads((Path(__file__).parent / "reference" / "figures_v2.json").read_text())
SEED = FIGURES["seed"]


@pytest.fixture(scope="module")
def big():
    return torch.from_numpy(formulas.image(SEED + 50, 1, 168, 168)).double()


@pytest.fixture(scope="module")
@torch.no_grad()
def model(big):
    """DPT small in float64, each class's logits brought to mean 0 and deviation 1 on a part of the image."""
    cfg = SimpleNamespace(model="dpt", backbone="dinov2_small", nclass=19, pretrained=False)
    model = build_model(cfg).double().eval()
    model.load_state_dict(reference_state_v2(model))
    last = model.head.scratch.output_conv[2]
    last.bias.zero_()
    logits = model(big[:, :, :56, :84]).transpose(0, 1).flatten(1)
    mean, deviation = logits.mean(dim=1), logits.std(dim=1)
    last.weight /= deviation[:, None, None, None]
    last.bias.copy_(-mean / deviation)
    return model


@torch.no_grad()
def test_the_networks_logits_are_the_releases(model, big, device):
    check_summary(model.to(device)(big.to(device)), FIGURES["evaluate_first_logits"])
    model.cpu()


@pytest.mark.parametrize("figures", FIGURES["evaluate"], ids=lambda one: f"{one['mode']}-{one['crop_size']}")
def test_evaluation_gives_the_reference_figures_of_v2(model, big, figures, device):
    samples = [
        (
            big[:, :, 5 * i : 5 * i + height, 7 * i : 7 * i + width],
            torch.from_numpy(formulas.mask(SEED + 60 + i, 1, height, width, 19)),
        )
        for i, (height, width) in enumerate(figures["sizes"])
    ]
    result = evaluate(model.to(device), samples, figures["mode"], figures["crop_size"], 19, device)
    model.cpu()
    assert result.iou.tolist() == pytest.approx(figures["iou"], rel=1e-6)
    assert result.miou == pytest.approx(figures["miou"], rel=1e-6)


@pytest.mark.parametrize("side, multiple", FIGURES["resize_to_multiple"])
def test_sides_are_rounded_to_multiples_as_in_the_release(side, multiple):
    assert seen_size((side, side), 1.0, 14) == (multiple, multiple)


def test_the_last_window_is_moved_back_to_the_border():
    assert [window_starts(length, 798, moved_back=True) for length in (1024, 2048)] == [[0, 226], [0, 532, 1064, 1250]]
    assert [window_starts(length, 42, moved_back=True) for length in (42, 41, 5)] == [[0], [0], [0]]


class _Patches(nn.Module):
    """Two classes by the first channel; keeps the sizes that it saw, which must be whole patches."""

    size_multiple = 14

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] % 14 == 0 and x.shape[3] % 14 == 0
        self.sizes.append(tuple(x.shape[2:]))
        return torch.stack([x[:, 0], -x[:, 0]], dim=1)


@pytest.mark.parametrize("mode", ["original", "sliding_window"])
@pytest.mark.parametrize("height, width", [(1, 50), (6, 6), (30, 100), (100, 30)])
def test_images_smaller_than_a_window_or_a_patch_are_seen_whole(mode, height, width):
    model = _Patches()
    scores = class_scores(model, torch.randn(2, 3, height, width), mode, 42)
    assert scores.values.shape == (2, 2, height, width) and scores.values.isfinite().all()
    assert all(min(size) >= 14 for size in model.sizes)
    assert mode == "original" or max(max(size) for size in model.sizes) <= 42


def test_a_scale_goes_to_whole_patches_at_once():
    model = _Patches()
    assert whole(model, torch.randn(1, 3, 60, 90), scale=0.5).shape == (1, 2, 60, 90)
    assert model.sizes == [(28, 42)]  # 30 and 45 pixels, rounded to multiples of 14
