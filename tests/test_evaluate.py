"""util/evaluate.py: the reference figures, windows against an obvious version, and what evaluation leaves alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dataset.transform import normalize
from scripts import evaluate as script
from scripts.benchmark import naive
from tests.helpers import make_model
from tests.reference import formulas
from tests.reference.weights import reference_state
from util.evaluate import center_crop, class_scores, evaluate, predict, sliding_window

FIGURES = json.loads((Path(__file__).parent / "reference" / "figures.json").read_text())
SEED = FIGURES["seed"]
MODES = ["original", "sliding_window", "center_crop"]


class _WindowModel(nn.Module):
    """Logits that depend on the whole input, so that overlapping windows disagree; keeps the sizes that it saw."""

    def __init__(self, nclass: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nclass, 3, generator=torch.manual_seed(0), dtype=torch.float64))
        self.norm = nn.BatchNorm2d(nclass).double()
        self.sizes = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes += len(x) * [tuple(x.shape[2:])]
        logits = torch.einsum("kc,bchw->bkhw", self.weight, x.double())
        return self.norm(3 * logits - logits.amax(dim=(2, 3), keepdim=True))


def _samples(nclass: int, sizes, count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`count` batches of an 8-bit image (1, 3, H, W) and its label (1, H, W)."""
    rng = np.random.default_rng(0)
    return [
        (
            torch.from_numpy(rng.integers(0, 256, (1, 3, *sizes[i % len(sizes)]), dtype=np.uint8)),
            torch.from_numpy(formulas.mask(i, 1, *sizes[i % len(sizes)], nclass).astype(np.uint8)),
        )
        for i in range(count)
    ]


# The reference figures


@pytest.fixture(scope="module")
def reference_samples():
    sizes = ((60, 90), (75, 50), (81, 81), (33, 64))
    return [
        (
            torch.from_numpy(formulas.image(SEED + 50 + i, 1, h, w)).double(),
            torch.from_numpy(formulas.mask(SEED + 60 + i, 1, h, w, 19)),
        )
        for i, (h, w) in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def reference_model(reference_samples):
    """ResNet-50 in float64, its classifier stretched and centred so that predictions spread over the classes."""
    model = make_model(backbone="resnet50", nclass=19)
    model.load_state_dict(reference_state(model))
    model.double().eval()
    with torch.no_grad():
        model.classifier.weight *= 30
        model.classifier.bias.zero_()
        model.classifier.bias -= model(reference_samples[0][0]).mean(dim=(0, 2, 3))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES["evaluate"])
def test_evaluation_gives_the_reference_figures(name, reference_model, reference_samples, device):
    mode, crop_size = name.split("/")
    result = evaluate(reference_model.to(device), reference_samples, mode, int(crop_size), 19, device)
    reference_model.cpu()
    assert result.iou.tolist() == pytest.approx(FIGURES["evaluate"][name]["iou"], rel=1e-4, abs=1e-9)
    assert result.miou == pytest.approx(FIGURES["evaluate"][name]["mIoU"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["original/48", "sliding_window/48"])
def test_a_checkpoint_of_the_release_through_the_script_gives_the_reference_figure(
    name, reference_model, reference_samples, tmp_path, monkeypatch, capsys
):
    """The images are floats: no file holds them. All else is as a user of the release has it."""
    state = {f"module.{key}": value.float() for key, value in reference_model.state_dict().items()}
    rest = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 79, "previous_best": np.float64(74.52)}
    torch.save({"model": state, **rest}, tmp_path / "best.pth")
    samples = [(image[0].float(), label[0]) for image, label in reference_samples]
    (tmp_path / "val.txt").write_text("".join(f"{i}.jpg {i}.png\n" for i in range(len(samples))))
    monkeypatch.setattr(script, "ValDataset", lambda *_: samples)
    mode, crop_size = name.split("/")
    config = tmp_path / "config.yaml"
    config.write_text(f"{{dataset: mini, data_root: {tmp_path}, nclass: 19, classes: {list('abcdefghijklmnopqrs')}}}")
    keys = {"val_id_path": tmp_path / "val.txt", "backbone": "resnet50", "crop_size": crop_size, "eval_mode": mode}
    keys |= {"epochs": 1, "batch_size": 2, "lr": 0.1, "device": "cpu", "workers": 0, "check_data": "false"}
    settings = [f"{key}={value}" for key, value in keys.items()]
    script.main(["--config", str(config), "--checkpoint", str(tmp_path / "best.pth"), "--set", *settings])
    shown = re.search(r"mIoU +([0-9.]+)$", capsys.readouterr().out, flags=re.M)[1]
    assert float(shown) == round(FIGURES["evaluate"][name]["mIoU"], 2)


# Windows and crops


@pytest.mark.parametrize(
    "height, width, size", [(20, 31, 12), (12, 12, 12), (5, 9, 12), (13, 4, 12), (1, 1, 3), (17, 17, 16), (8, 9, 2)]
)
def test_sliding_windows_equal_an_obvious_loop(height, width, size):
    model = _WindowModel().eval()
    image = torch.randn(2, 3, height, width, generator=torch.manual_seed(1), dtype=torch.float64)
    stride = int(size * 2 / 3)
    expected, windows = torch.zeros(2, 4, height, width, dtype=torch.float64), []
    with torch.no_grad():
        top = 0
        while top < height:
            left = 0
            while left < width:
                bottom, right = min(top + size, height), min(left + size, width)
                windows += 2 * [(bottom - top, right - left)]
                prob = torch.softmax(model(image[:, :, top:bottom, left:right]), dim=1)
                expected[:, :, top:bottom, left:right] += prob
                left += stride
            top += stride
        model.sizes.clear()
        scores = sliding_window(model, image, size)
        assert sorted(model.sizes) == sorted(windows)
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)
        assert torch.equal(predict(model, image, "sliding_window", size), expected.argmax(dim=1))
    assert (scores.sum(dim=1) > 1 - 1e-12).all()  # every pixel was in some window


def test_cityscapes_windows_are_those_of_the_release():
    """1024 x 2048 in windows of 801 at stride 534: two rows, four columns, cut off at the border."""
    shapes = []

    def model(window: torch.Tensor) -> torch.Tensor:
        shapes.append((len(window), *window.shape[2:]))
        return window

    with torch.device("meta"):
        scores = sliding_window(model, torch.empty(1, 3, 1024, 2048), 801)
    # Not a CPU: several windows at once, up to the pixels of one such image.
    assert shapes == [(3, 801, 801), (1, 801, 446), (3, 490, 801), (1, 490, 446)]
    assert scores.shape == (1, 3, 1024, 2048)


@pytest.mark.parametrize("waiting", [32, 2, 0])
def test_images_of_equal_size_go_through_together_and_none_is_lost(monkeypatch, waiting):
    monkeypatch.setattr("util.evaluate.CPU_PIXELS", 3 * 20 * 30)
    monkeypatch.setattr("util.evaluate.MAX_WAITING", waiting)
    samples = _samples(4, ((20, 30), (17, 9), (40, 50)), count=15)
    batches = []

    class Watched(_WindowModel):
        def forward(self, x):
            batches.append(tuple(x.shape))
            return super().forward(x)

    result = evaluate(Watched(), samples, "sliding_window", 12, 4, "cpu")
    each = [evaluate(_WindowModel(), [sample], "sliding_window", 12, 4, "cpu") for sample in samples]
    assert torch.equal(result.confusion, sum(part.confusion for part in each))
    assert all(n == 1 or n * h * w <= 3 * 20 * 30 for n, _, h, w in batches)
    assert sum(n for n, *_ in batches) == 5 * (3 * 4 + 3 * 2 + 5 * 7)
    together = max(n for n, _, h, w in batches if (h, w) == (1, 9))  # of 17 x 9: the last row of windows
    assert together == {32: 5, 2: 2, 0: 1}[waiting]


@pytest.mark.parametrize(
    "height, width, size, top, left",
    [(10, 14, 6, 2, 4), (9, 11, 6, 1, 2), (6, 6, 6, 0, 0), (4, 11, 6, 0, 2), (11, 4, 6, 2, 0), (3, 2, 6, 0, 0)],
)
def test_the_centre_crop_keeps_short_sides_whole(height, width, size, top, left):
    label = torch.arange(height * width).view(1, height, width)
    image = torch.stack([label, -label, 2 * label], dim=1)
    expected = label[:, top : min(top + size, height), left : min(left + size, width)]
    assert torch.equal(center_crop(label, size), expected)
    assert torch.equal(center_crop(image, size)[:, 0], expected)


def test_outside_the_centre_crop_nothing_counts():
    sizes = ((20, 30), (30, 10))
    samples = _samples(4, sizes)
    result = evaluate(_WindowModel(), samples, "center_crop", 12, 4, "cpu")
    valid = sum(int((center_crop(label, 12) != 255).sum()) for _, label in samples)
    assert int(result.confusion.sum()) == valid
    assert int(evaluate(_WindowModel(), samples, "original", 12, 4, "cpu").confusion.sum()) > valid


def test_original_sees_each_image_whole_and_once():
    model = _WindowModel()
    samples = _samples(4, ((20, 30), (7, 9)))
    evaluate(model, samples, "original", 12, 4, "cpu")
    assert model.sizes == [tuple(label.shape[1:]) for _, label in samples]


# Test-time augmentation


@pytest.mark.parametrize("mode", ["original", "sliding_window"])
@pytest.mark.parametrize("scales, flip", [((1.0,), True), ((0.5, 1.0, 1.7), False), ((0.75, 1.25), True)])
def test_augmented_scores_are_the_mean_of_all_views(mode, scales, flip):
    model = _WindowModel().eval()
    image = torch.randn(2, 3, 21, 30, generator=torch.manual_seed(1), dtype=torch.float64)
    expected, views = torch.zeros(2, 4, 21, 30, dtype=torch.float64), 0
    with torch.no_grad():
        for scale in scales:
            for mirrored in [False, True] if flip else [False]:
                size = (int(21 * scale + 0.5), int(30 * scale + 0.5))
                view = nn.functional.interpolate(image, size=size, mode="bilinear", align_corners=True)
                view = torch.flip(view, dims=[3]) if mirrored else view
                if mode == "original":
                    scores = nn.functional.interpolate(model(view), size=(21, 30), mode="bilinear", align_corners=True)
                    scores = scores.softmax(dim=1)
                else:
                    scores = sliding_window(model, view, 12)
                    scores = scores / scores.sum(dim=1, keepdim=True)
                    scores = nn.functional.interpolate(scores, size=(21, 30), mode="bilinear", align_corners=True)
                expected += torch.flip(scores, dims=[3]) if mirrored else scores
                views += 1
        found = class_scores(model, image, mode, 12, scales, flip)
    torch.testing.assert_close(found.probabilities(), expected / views, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.classes(), expected.argmax(dim=1))


@pytest.mark.parametrize("mode", MODES)
def test_without_augmentation_the_scores_are_those_of_predict(mode):
    model = _WindowModel().eval()
    image = torch.randn(1, 3, 21, 30, generator=torch.manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        scores = class_scores(model, image, mode, 12)
        assert torch.equal(scores.classes(), predict(model, image, mode, 12))
        sums = scores.probabilities().sum(dim=1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


# The loop


@pytest.mark.parametrize("mode", MODES)
def test_eight_bit_images_and_normalised_floats_give_the_same_result(mode):
    samples = _samples(4, ((20, 30), (17, 9)))
    model = _WindowModel()
    eight_bit = evaluate(model, samples, mode, 12, 4, "cpu")
    floats = evaluate(model, [(normalize(image), label.long()) for image, label in samples], mode, 12, 4, "cpu")
    assert torch.equal(eight_bit.confusion, floats.confusion)
    assert eight_bit.confusion.count_nonzero() > 4  # predictions spread, so that a difference would show


def test_iou_and_miou_follow_from_the_counts_over_the_whole_set():
    samples = _samples(4, ((20, 30), (17, 9)))
    model = _WindowModel()
    result = evaluate(model, samples, "original", 12, 4, "cpu")
    each = [evaluate(model, [sample], "original", 12, 4, "cpu") for sample in samples]
    assert torch.equal(result.confusion, sum(part.confusion for part in each))
    counts = result.confusion.tolist()
    iou = [
        100 * counts[c][c] / (sum(counts[c]) + sum(row[c] for row in counts) - counts[c][c]) for c in range(len(counts))
    ]
    assert result.iou.tolist() == pytest.approx(iou) and result.miou == pytest.approx(sum(iou) / 4)
    assert isinstance(result.miou, float)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_equals_the_naive_one(mode):
    model, samples = _WindowModel().eval(), _samples(4, ((20, 31), (9, 14)))
    expected = naive.evaluate(model, samples, mode, 12, 4)
    assert torch.equal(evaluate(model, samples, mode, 12, 4, "cpu").iou, expected)


@pytest.fixture(scope="module")
def small_model() -> nn.Module:
    return make_model(nclass=4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_mode_weights_and_statistics_as_they_were(small_model, mode, training):
    model = small_model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    result = evaluate(model, _samples(4, ((20, 30),), count=1), mode, 16, 4, "cpu")
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert int(result.confusion.sum()) > 0


def test_the_model_is_in_eval_mode_without_gradients_while_it_is_evaluated():
    seen = []

    class Watched(_WindowModel):
        def forward(self, x):
            logits = super().forward(x)
            seen.append((self.training, self.norm.training, logits.requires_grad))
            return logits

    evaluate(Watched().train(), _samples(4, ((9, 9),)), "original", 12, 4, "cpu")
    assert seen == [(False, False, False)] * 3


def test_a_model_that_has_been_evaluated_can_be_trained_on():
    model = _WindowModel().train()
    evaluate(model, _samples(4, ((9, 9),)), "original", 12, 4, "cpu")
    (model(torch.randn(2, 3, 5, 5)) ** 2).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("mode", MODES)
def test_predicting_reads_no_value_back_from_the_device(mode, device):
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        model = make_model(nclass=4).eval()
        image = normalize(torch.empty(1, 3, 40, 61, dtype=torch.uint8))
        if mode == "center_crop":
            image = center_crop(image, 33)
        classes = predict(model, image, mode, 33)
    assert classes.device.type == device and classes.dtype == torch.int64
    assert classes.shape == (1, *image.shape[2:])
