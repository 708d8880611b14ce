"""util/train/monitor.py: statistics of pseudo-labels against counting by hand, and what the pictures show."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.lists import read_list
from dataset.semi import Key, TrainDataset, ValDataset
from dataset.source import DataSource
from dataset.transform import normalize
from util.config import load_config
from util.lists import Lists, spread
from util.train.monitor import Monitor, PseudoLabelCounts


class Log:
    """Keeps what it is told."""

    def __init__(self, has_loggers: bool = True) -> None:
        self.has_loggers, self.told = has_loggers, {}

    def scalars(self, values, step):
        self.told |= {(name, step): value for name, value in values.items()}

    pictures = scalars


class Brightness(torch.nn.Module):
    """Three classes by brightness, surer where the image is brighter."""

    autocast_dtype, size_multiple = None, 1

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.conv.weight[:] = torch.tensor([-2.0, 0.1, 2.0])[:, None, None, None]
            self.conv.bias[:] = 0

    def forward(self, x):
        return self.conv(x)


def make_run(data, unlabeled: bool = True, **changes):
    """A run on the tiny data set, as far as a monitor needs one."""
    cfg = load_config(data.config, {"cutmix_partner": "same_image", "conf_thresh": 0.8, **changes})
    lists = Lists(
        read_list(data.labeled), read_list(data.unlabeled, labels=False) if unlabeled else None, read_list(data.val)
    )
    return SimpleNamespace(cfg=cfg, lists=lists, device=torch.device("cpu"), log=Log())


def make_monitor(run, data, strong_views: int = 2) -> Monitor:
    source = DataSource(data.root)
    train = TrainDataset(run.lists.labeled, run.lists.unlabeled, source, 32, 0, strong_views)
    return Monitor(run, train, ValDataset(run.lists.val, source))


def test_shares_are_those_of_counting_by_hand():
    rng = np.random.default_rng(0)
    counts, expected = PseudoLabelCounts(4, 0.6, torch.device("cpu")), {}
    numbers = {"predicted": {}, "confident": {}, "sure": {}, "right": {}}
    for labeled in (True, False, True):
        label, truth = rng.integers(0, 3, (2, 2, 5, 5))  # the fourth class is never predicted
        conf, padding = rng.random((2, 5, 5)), 255 * (rng.random((2, 5, 5)) < 0.2)
        truth[0, 0] = 255
        tensors = [torch.from_numpy(array) for array in (label, conf, padding)]
        counts.add(*tensors, torch.from_numpy(truth) if labeled else None)
        for place in np.ndindex(label.shape):
            if padding[place] == 255 or (labeled and truth[place] == 255):
                continue
            sure, name = conf[place] >= 0.6, label[place]
            chosen = {"sure": sure, "right": sure and truth[place] == name} if labeled else {}
            chosen = chosen or {"predicted": True, "confident": sure}
            for kind, counted in chosen.items():
                numbers[kind][name] = numbers[kind].get(name, 0) + counted
    total = sum(numbers["predicted"].values())
    expected["pseudo/confident_share"] = sum(numbers["confident"].values()) / total
    expected["pseudo/confident_right"] = sum(numbers["right"].values()) / sum(numbers["sure"].values())
    expected["predicted_share/d"] = 0
    for index, name in enumerate("abc"):
        expected[f"predicted_share/{name}"] = numbers["predicted"][index] / total
        expected[f"confident_share/{name}"] = numbers["confident"][index] / numbers["predicted"][index]
        expected[f"confident_right/{name}"] = numbers["right"][index] / numbers["sure"][index]
    assert counts.shares("abcd") == pytest.approx(expected)


def test_without_unlabelled_images_shares_are_those_of_the_labelled_ones():
    counts = PseudoLabelCounts(2, 0.5, torch.device("cpu"))
    label, conf = torch.tensor([[[0, 1, 1, 1]]]), torch.tensor([[[0.9, 0.9, 0.4, 0.9]]])
    counts.add(label, conf, torch.zeros(1, 1, 4), torch.tensor([[[0, 1, 1, 0]]]))
    shares = counts.shares(("a", "b"))
    assert shares["predicted_share/b"] == 0.75 and shares["confident_share/b"] == pytest.approx(2 / 3)
    assert shares["pseudo/confident_right"] == pytest.approx(2 / 3) and shares["confident_right/b"] == 0.5


@pytest.mark.parametrize(("partner", "strong_views"), [("same_image", 2), ("other_image", 1), ("reversed_batch", 2)])
def test_a_report_has_statistics_and_both_panels(data, partner, strong_views):
    run = make_run(data, cutmix_partner=partner)
    make_monitor(run, data, strong_views).report(model := Brightness(), model, 7)
    told = run.log.told
    assert {step for _, step in told} == {7}
    assert sum(value for (name, _), value in told.items() if name.startswith("predicted_share/")) == pytest.approx(1)
    sheet = told["views/train", 7]
    assert sheet.height == 16 + 4 + 6 * 36, "three unlabelled and three labelled images"
    assert told["views/validation", 7].height == 16 + 4 + 2 * 36
    assert np.asarray(sheet).std() > 20
    again = Log()
    run.log = again
    monitor = make_monitor(run, data, strong_views)
    monitor.report(model, model, 7)
    assert {k: v for k, v in again.told.items() if isinstance(v, float)} == {
        k: v for k, v in told.items() if isinstance(v, float)
    }
    assert np.array_equal(np.asarray(again.told["views/train", 7]), np.asarray(sheet))


def test_the_ignore_mask_has_a_picture_of_its_own(data, monkeypatch):
    shown = []
    monkeypatch.setattr("util.train.monitor.panel", lambda rows, titles: shown.append((rows, titles)))
    run = make_run(data)
    make_monitor(run, data).report(model := Brightness(), model, 0)
    rows, titles = shown[0]
    assert titles[-2:] == ["ignore mask", "truth"] and all(len(row) == len(titles) for row in rows)
    (batch, *_) = [views for views in make_monitor(run, data).load_views() if views.labels is None]
    assert np.array_equal(np.asarray(rows[0][-2])[..., 0], batch.on(run.device).ignore_mask[0].numpy())


def test_the_supervised_baseline_shows_no_strong_views(data):
    run = make_run(data, unlabeled=False)
    make_monitor(run, data).report(model := Brightness(), model, 0)
    assert run.log.told["views/train", 0].height == 16 + 4 + 3 * 36
    assert "pseudo/confident_right" in {name for name, _ in run.log.told}


def test_nothing_is_loaded_where_nobody_looks(data, monkeypatch):
    run = make_run(data)
    run.log = Log(has_loggers=False)
    monkeypatch.setattr(TrainDataset, "__getitem__", None)
    make_monitor(run, data).report(None, None, 0)
    assert run.log.told == {}


def test_an_unreadable_image_is_left_out(data):
    (data.root / "images/unlabeled0.jpg").write_bytes(b"")
    run = make_run(data)
    make_monitor(run, data).report(model := Brightness(), model, 0)
    assert run.log.told["views/train", 0].height == 16 + 4 + 6 * 36


def test_strong_views_are_mixed_from_the_reversed_batch_too(data):
    run = make_run(data, cutmix_partner="reversed_batch", batch_size=6)
    batch = next(views for views in make_monitor(run, data).load_views() if views.labels is None)
    bare, mixed = batch.batch[1].strong[0], batch.on(run.device)
    assert mixed.box1.any()
    inside = mixed.box1.bool()
    plain = torch.stack([normalize(picture.numpy()) for picture in bare])
    assert torch.equal(mixed.strong1.permute(0, 2, 3, 1)[inside], plain.flip(0).permute(0, 2, 3, 1)[inside])
    assert torch.equal(mixed.strong1.permute(0, 2, 3, 1)[~inside], plain.permute(0, 2, 3, 1)[~inside])


def test_the_label_of_a_weak_view_is_cropped_as_the_view_is(data):
    """The label is a picture of its own here, so its view must be the weak view of that picture, up to resampling."""
    for path in (data.root / "images/labeled0.png", data.root / "labels/labeled0.png"):
        pixels = np.zeros((32, 40), np.uint8)
        pixels[10:20, 8:30] = 2
        Image.fromarray(pixels * (100 if path.parent.name == "images" else 1)).save(path)
    sample = read_list(data.labeled)[0]._replace(image="images/labeled0.png")
    dataset = TrainDataset([sample], [sample._replace(label=None)], DataSource(data.root), 32, 0)
    for epoch in range(5):
        key = Key(epoch, 0, 0, 0)
        weak = dataset[key][1].weak.numpy()[..., 0]
        label = dataset.label_of_weak_view(key, sample).numpy()
        valid = label != 255
        assert valid.any() and ((weak > 100)[valid] == (label == 2)[valid]).mean() > 0.97


def test_the_chosen_images_are_spread_over_the_list():
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread(range(3), 8) == [0, 1, 2]
