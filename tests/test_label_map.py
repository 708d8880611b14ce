"""The config's `label_map`: every way in, every wrong one, and every place where a label is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import DataError
from dataset.check import check_samples
from dataset.files import map_label
from dataset.lists import Sample, read_list
from dataset.semi import Key, TrainDataset, ValDataset
from dataset.source import DataSource
from model import build_model
from scripts import evaluate, predict
from tests.helpers import make_dataset, run_here
from util.config import Config, differing_keys, load_config, parse_label_map, to_dict
from util.errors import ConfigError

MAP = {0: 0, 100: 1, 200: 2, 7: 255}


@pytest.fixture
def coded(tmp_path):
    """The same data with the class values 0, 1, 2 stored as 0, 100, 200 and the ignored 255 as 7."""
    data = make_dataset(tmp_path / "coded")
    codes = np.full(256, 50, np.uint8)
    codes[[0, 1, 2, 255]] = [0, 100, 200, 7]
    for path in (data.root / "labels").iterdir():
        Image.fromarray(codes[np.asarray(Image.open(path))]).save(path)
    data.configure(label_map=MAP)
    return data


def test_values_are_replaced_at_once_and_others_stay():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    mapped = np.asarray(map_label(Image.fromarray(values), {0: 1, 1: 0, 255: 3, 9: 255}))
    expected = {**{v: v for v in range(256)}, 0: 1, 1: 0, 255: 3, 9: 255}  # 0 and 1 change places
    assert mapped.dtype == np.uint8
    assert mapped.ravel().tolist() == [expected[v] for v in range(256)]


def test_without_a_map_a_label_is_left_alone():
    label = Image.new("L", (2, 2), 255)
    assert map_label(label, None) is label and map_label(label, {}) is label


# --- the key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{0: 0, 255: 1}", "{255: 1, 0: 0}", "{'0': 0, '255': '1'}"])
def test_file_and_override_give_one_map_whose_config_is_plain(data, tmp_path, text):
    cfg = load_config(data.config, [f"label_map={text}"])
    assert cfg.label_map == {0: 0, 255: 1}
    data.configure(label_map={255: 1, 0: 0})
    assert load_config(data.config) == cfg
    torch.save(to_dict(cfg), tmp_path / "config.pth")
    saved = torch.load(tmp_path / "config.pth", weights_only=True)
    assert saved["label_map"] == {0: 0, 255: 1} and differing_keys(saved, cfg) == []


@pytest.mark.parametrize("text", ["", "{}"])
def test_an_empty_map_is_none(data, text):
    data.configure(label_map={5: 1})
    assert load_config(data.config, [f"label_map={text}"]).label_map is None


def test_a_run_does_not_resume_with_another_map(data):
    before, after = (load_config(data.config, [f"label_map={text}"]) for text in ("", "{255: 1}"))
    assert differing_keys(to_dict(before), after) == ["label_map: None -> {255: 1}"]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{0: 0, 255: 3}", "255: 3: classes are 0..2, and 255"),
        ("{0: 0, 255: 256}", "255: 256: 256 must be at most 255"),
        ("{0: 0, 256: 1}", "256: 1: 256 must be at most 255"),
        ("{-1: 0}", "-1: 0: -1 must be at least 0"),
        ("{5: -1}", "5: -1: -1 must be at least 0"),
        ("{leaf: 1}", "'leaf': 1: expected a whole number, found 'leaf'"),
        ("{5: leaf}", "5: 'leaf': expected a whole number, found 'leaf'"),
        ("{5: 0.5}", "5: 0.5: expected a whole number, found 0.5"),
        ("{5: [1]}", "5: [1]: expected a whole number, found [1]"),
        ("{true: 1}", "True: 1: expected a whole number, found True"),
        ("{0:1}", "write a space after the colon"),
        ("{5: 0, '5': 1}", "'5': 1: the label value 5 is named twice"),
        ("[0, 1]", "expected {label value: class}"),
        ("1", "expected {label value: class}"),
    ],
)
def test_a_wrong_map_is_one_line_with_key_and_value(data, text, fragment):
    with pytest.raises(ConfigError) as caught:
        load_config(data.config, [f"label_map={text}"])
    message = str(caught.value)
    assert message.startswith(f"--set label_map={text}: label_map: ") and fragment in message
    assert len(message.splitlines()) == 1


def test_a_map_on_a_command_line_has_the_same_rules():
    assert parse_label_map("{255: 1, 0: 0}", "--label-map") == {0: 0, 255: 1}
    with pytest.raises(ConfigError, match=r"^--label-map: 256: 1: 256 must be at most 255$"):
        parse_label_map("{256: 1}", "--label-map")


# --- where labels are read --------------------------------------------------------------------------------------------


def test_training_and_validation_see_mapped_labels(data, coded):
    assert isinstance(load_config(coded.config), Config)
    samples = read_list(data.labeled)
    plain, mapped = (
        TrainDataset(samples, None, DataSource(root, label_map), 32, 0)
        for root, label_map in ((data.root, None), (coded.root, MAP))
    )
    seen = set()
    for index in range(2 * len(samples)):
        label = mapped[Key(0, index)][1]
        assert torch.equal(label, plain[Key(0, index)][1])
        seen |= set(label.unique().tolist())
    assert seen == {0, 1, 2, 255}
    for (_, expected), (_, label) in zip(
        ValDataset(samples, DataSource(data.root)), ValDataset(samples, DataSource(coded.root, MAP)), strict=True
    ):
        assert torch.equal(label, expected)


def test_padding_of_a_crop_stays_ignored_where_255_is_a_class(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    Image.new("L", (20, 20), 255).save(tmp_path / "label.png")
    dataset = TrainDataset([Sample("a.png", "label.png")], None, DataSource(tmp_path, {255: 1}), 64, 0)
    label = dataset[Key(0, 0)][1]
    assert set(label.unique().tolist()) == {1, 255}


def test_the_check_before_training_knows_the_map(coded):
    samples = read_list(coded.labeled)
    check_samples(samples, DataSource(coded.root, MAP), 3)
    with pytest.raises(DataError, match=r"values found: 0, 7, 100, 200; allowed are 0\.\.2"):
        check_samples(samples, DataSource(coded.root), 3)
    with pytest.raises(
        DataError, match=r"0, 7, 100, 200; allowed are 0\.\.2, and 255 .*, and those in label_map \(100, 200\)$"
    ):
        check_samples(samples, DataSource(coded.root, {100: 1, 200: 2}), 3)


@pytest.mark.parametrize(("value", "nclass"), [(255, 2), (255, 5), (200, 2)])
def test_a_mask_of_two_values_is_refused_with_the_map_that_mends_it(tmp_path, value, nclass):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.fromarray(np.resize(np.uint8([0, value]), (8, 8))).save(tmp_path / "label.png")
    samples = [Sample("a.png", "label.png")]
    with pytest.raises(DataError) as caught:
        check_samples(samples, DataSource(tmp_path), nclass)
    assert f"label_map: {{0: 0, {value}: 1}}" in str(caught.value)
    check_samples(samples, DataSource(tmp_path, {0: 0, value: 1}), nclass)


def test_evaluation_and_the_truth_panel_use_the_map(data, coded, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(build_model(load_config(data.config)).state_dict(), tmp_path / "model.pth")
    tables, panels = [], []
    for number, each in enumerate((data, coded)):
        common = ["--config", str(each.config), "--checkpoint", str(tmp_path / "model.pth")]
        evaluate.main(common)
        tables.append(capsys.readouterr().out.splitlines()[1:])
        panels.append(tmp_path / f"{number}.png")
        output = ["--output", str(tmp_path / f"out{number}"), "--panel", str(panels[-1])]
        predict.main([*common, "--images", str(each.val), *output])
        capsys.readouterr()
    assert tables[0] == tables[1]
    first, second = (np.asarray(Image.open(path)) for path in panels)
    assert np.array_equal(first, second)


def test_training_on_coded_labels_is_training_on_classes(data, coded, tmp_path):
    weights = []
    for each in (data, coded):
        run = run_here("supervised", *each.arguments(tmp_path / each.root.name))
        assert run.returncode == 0, run.stderr
        weights.append(torch.load(tmp_path / each.root.name / "latest.pth", weights_only=True))
    assert all(torch.equal(weights[0]["model"][name], value) for name, value in weights[1]["model"].items())
    assert weights[1]["config"]["label_map"] == dict(sorted(MAP.items()))
    assert weights[0]["previous_best"] == weights[1]["previous_best"]
