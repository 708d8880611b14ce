"""scripts/make_splits.py: from two folders to lists that train."""

from __future__ import annotations

import re

import numpy as np
import pytest
import yaml
from PIL import Image

from dataset import DataError
from dataset.check import check_samples
from dataset.lists import find_unlabeled, read_list
from dataset.source import DataSource
from scripts import make_splits
from scripts.make_splits import config_snippet, draw, list_line, parse_share
from tests.helpers import refusal, run_here
from util.config import load_config
from util.errors import ConfigError

SIZE = (24, 20)


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, "green").save(path)


def save_label(path, *values):
    """A label that holds exactly `values`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(values, np.uint8), SIZE[::-1])).save(path)


@pytest.fixture
def root(tmp_path):
    """20 images with labels in two sub-folders, 6 without; class 2 is in three images, class 3 in two."""
    root = tmp_path / "leaves"
    for i in range(26):
        name = f"{'ab'[i % 2]}/{i:02d}"
        save_image(root / f"images/{name}.jpg")
        if i < 20:
            rare = {4: [2], 9: [2, 3], 13: [2], 17: [3]}.get(i, [])
            save_label(root / f"labels/{name}.png", 0, 1, 255, *rare)
    return root


def arguments(root, output="lists", **options):
    """The command line for the folders under `root`; an option of None is a flag."""
    values = {"images": root / "images", "labels": root / "labels", "output": root / output, **options}
    words = []
    for key, value in values.items():
        words += [f"--{key.replace('_', '-')}"] + ([] if value is None else [str(value)])
    return words


def make(root, **options):
    """Make the lists; returns them as samples: (train, labelled, validation)."""
    make_splits.main(arguments(root, **options))
    folder = root / options.get("output", "lists")
    return tuple(read_list(folder / f"{name}.txt", labels=name != "train") for name in ("train", "labeled", "val"))


def complaint(capsys, words):
    """The one line with which a command line is refused."""
    return refusal(capsys, lambda: make_splits.main(words))


def test_every_image_is_listed_once_beside_its_own_label(root):
    train, labeled, val = make(root, val="0.2", labeled="1/4")
    assert (len(train), len(labeled), len(val)) == (22, 4, 4)
    everything = {path.relative_to(root).as_posix() for path in root.rglob("*.jpg")}
    assert {s.image for s in train} | {s.image for s in val} == everything
    assert not {s.image for s in train} & {s.image for s in val}
    assert {s.image for s in labeled} < {s.image for s in train}
    assert all(sample.label is None for sample in train)
    for sample in labeled + val:
        assert sample.label == sample.image.replace("images/", "labels/").replace(".jpg", ".png")
    check_samples(labeled + val, DataSource(root), 4)
    assert len(find_unlabeled(root / "lists/train.txt", root, labeled)) == 18


def test_labelled_and_validation_images_have_every_class(root):
    for seed in range(10):
        _, labeled, val = make(root, output=f"lists{seed}", val="3", labeled="3", seed=seed)
        for samples in (labeled, val):
            values = {v for s in samples for v in np.unique(np.asarray(Image.open(root / s.label))).tolist()}
            assert values == {0, 1, 2, 3, 255}


def test_a_class_in_a_single_image_goes_to_the_labelled_ones():
    present = np.zeros((30, 2), bool)
    present[:, 0] = True
    present[11, 1] = True
    for seed in range(20):
        labeled, val = draw(present, 2, 5, seed)
        assert 11 in labeled and len(labeled) == 2 and len(val) == 5 and not set(labeled) & set(val)


def test_the_last_image_of_a_class_is_left_to_validation_where_another_one_does():
    # The labelled cover takes image 0 or 1 for class 0; for class 1 it must not take the other one of these two.
    present = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 1], [0, 0, 1]], bool)
    for seed in range(20):
        for part in draw(present, 3, 3, seed):
            assert present[part].any(0).all()


def test_the_same_seed_gives_the_same_lists_and_another_one_others(root):
    first, again, other = (make(root, output=f"o{i}", seed=seed) for i, seed in enumerate((5, 5, 6)))
    assert first == again
    assert first[1:] != other[1:]


def test_images_beyond_those_that_classes_need_are_drawn_evenly():
    present = np.ones((10, 1), bool)
    counts = sum(np.bincount(draw(present, 3, 2, seed)[0], minlength=10) for seed in range(400))
    assert counts.sum() == 1200 and counts.min() > 70 and counts.max() < 170


def test_existing_lists_are_replaced_only_by_force(root, capsys):
    (root / "lists").mkdir()
    (root / "lists/val.txt").write_text("mine")
    assert complaint(capsys, arguments(root)).startswith(f"{root}/lists/val.txt: exists already; --force")
    assert [path.name for path in (root / "lists").iterdir()] == ["val.txt"]
    assert (root / "lists/val.txt").read_text() == "mine"
    make(root, force=None)
    assert sorted(path.name for path in (root / "lists").iterdir()) == ["labeled.txt", "train.txt", "val.txt"]


def test_a_list_that_cannot_be_written_leaves_the_others_alone(root, capsys):
    (root / "lists/val.txt").mkdir(parents=True)
    message = complaint(capsys, arguments(root, force=None))
    assert message.startswith(f"{root}/lists/") and "cannot be written" in message
    assert not list((root / "lists").glob(".*"))
    (root / "file").write_text("")
    assert complaint(capsys, arguments(root, output="file")).startswith(f"{root}/file: cannot be written")


def test_the_report_says_what_occurs_where_and_what_the_config_needs(root, capsys):
    make(root, val="3", labeled="2")
    out = capsys.readouterr().out
    assert "2 labelled, 21 unlabelled and 3 validation images" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if re.match(r" +\d ", line)}
    assert {index: row[2] for index, row in rows.items()} == {"0": "20", "1": "20", "2": "3", "3": "2"}
    assert sum(float(row[0]) for row in rows.values()) == pytest.approx(100, abs=0.02)  # 255 is left out
    snippet = yaml.safe_load(out.split("other keys):")[1].split("and on the command line")[0])
    assert (snippet["dataset"], snippet["data_root"]) == ("leaves", str(root))
    assert snippet["classes"] == [f"class {i}" for i in range(4)]
    assert snippet["val_id_path"] == str(root / "lists/val.txt")
    assert snippet["unlabeled_id_path"] == str(root / "lists/train.txt")


def test_classes_that_do_not_fit_into_a_list_are_said(root, capsys):
    save_label(root / "labels/a/00.png", 0, 1, 6)
    make(root, val="1", labeled="1")
    out = capsys.readouterr().out
    assert re.search(r"note: no validation image has class .*6: too few images", out)
    assert "2 of the values 0..6 never occur" in out


def test_two_and_254_classes_make_a_config(tmp_path):
    rest = {"crop_size": 32, "epochs": 1, "batch_size": 2, "lr": 0.001, "backbone": "resnet18"}
    for count in (2, 254):
        snippet = yaml.safe_load(config_snippet("a b", "data/a b", tmp_path, count, {200: 1, 255: 0}))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**snippet, **rest}))
        cfg = load_config(tmp_path / "config.yaml")
        assert (cfg.dataset, cfg.data_root, cfg.nclass) == ("a_b", "data/a b", count)
        assert cfg.label_map == {200: 1, 255: 0}


# --- names and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "label", "line"),
    [
        ("a.jpg", None, "a.jpg"),
        ("a.jpg", "a.png", "a.jpg a.png"),
        ("my photo.jpg", None, "my photo.jpg\t"),
        ("my photo.jpg", "my photo.png", "my photo.jpg\tmy photo.png"),
        ("no\u00a0break.jpg", "b.png", "no\u00a0break.jpg\tb.png"),
        ("#1.jpg", "#1.png", "./#1.jpg #1.png"),
        ("# 1.jpg", None, "./# 1.jpg\t"),
    ],
)
def test_a_line_reads_back_as_the_names_that_it_was_written_from(tmp_path, image, label, line):
    assert list_line(image, label) == line
    (tmp_path / "list.txt").write_text(f"{line}\n# comment\n  \t \nz.jpg z.png\n", encoding="utf-8")
    first, second = read_list(tmp_path / "list.txt", labels=False)
    assert (first.image.removeprefix("./"), first.label) == (image, label)
    assert second == ("z.jpg", "z.png")


@pytest.mark.parametrize("name", ["a\tb.jpg", "a\nb.jpg", "a\u2028b.jpg", " a.jpg", "a\udce4.jpg"])
def test_a_name_that_no_list_can_hold_is_refused(name):
    with pytest.raises(DataError, match="cannot hold this name"):
        list_line(name)


def test_a_labelled_line_that_ends_in_a_tab_is_refused_with_the_reason(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg b.png\t\n")
    with pytest.raises(DataError, match=r":1: a\.jpg b\.png has no label beside it.*a tab, also at the line's end"):
        read_list(tmp_path / "list.txt")


def test_names_with_spaces_go_through_lists_and_checks(tmp_path):
    for i in range(4):
        save_image(tmp_path / f"images/my photo {i}.jpg")
        save_label(tmp_path / f"labels/my photo {i}.png", 0, 1)
    train, labeled, val = make(tmp_path, val="1", labeled="1")
    assert len(train) == 3
    check_samples(labeled + val, DataSource(tmp_path), 2)
    check_samples(find_unlabeled(tmp_path / "lists/train.txt", tmp_path, labeled), DataSource(tmp_path), 2)


@pytest.mark.parametrize(("images", "labels"), [("", ""), ("", "labels"), ("images", "")])
def test_one_folder_may_hold_the_other_or_be_both(tmp_path, images, labels):
    root = tmp_path / "data"
    for i in range(4):
        save_image(root / images / f"{i}.jpg")
        save_label(root / labels / f"{i}.png", 0, 1)
    train, labeled, val = make(tmp_path, images=root / images, labels=root / labels, val="1", labeled="1")
    assert len(train) == 3
    check_samples(labeled + val, DataSource(root), 2)


def test_another_data_root_must_hold_both_folders(root, capsys):
    _, labeled, _ = make(root, data_root=root.parent)
    assert labeled[0].image.startswith("leaves/images/")
    message = complaint(capsys, arguments(root, data_root=root / "images", output="other"))
    assert message == f"--data-root {root}/images: does not hold --labels {root}/labels"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "total", "count"),
    [("1/8", 80, 10), ("0.125", 80, 10), (".5", 3, 2), ("1/1", 7, 7), ("1.0", 7, 7), ("1", 7, 1), ("1/100", 7, 1)],
)
def test_a_share_or_a_number_of_images(text, total, count):
    assert parse_share(text, "--val", total) == count


@pytest.mark.parametrize("text", ["0", "-1", "0.0", "1.5", "-1/8", "9/8", "1/0", "many", "", "nan", "1e-1", "1/8/2"])
def test_a_share_out_of_range_is_refused(text):
    with pytest.raises(ConfigError, match=f"^--val {re.escape(text)}: "):
        parse_share(text, "--val", 10)


def spoil(root, what):
    """Spoil the folders; returns options and the beginning of the message."""
    if what == "no images":
        (root / "none").mkdir()
        return {"images": root / "none"}, f"{root}/none: no image in this folder"
    if what == "no labels":
        (root / "none").mkdir()
        return {"labels": root / "none"}, f"{root}/none: no "
    if what == "labels that are no PNG":
        return {"labels": root / "images"}, f"{root}/images: no label in this folder (labels are .png files)"
    if what == "no folder":
        return {"labels": root / "none"}, f"--labels {root}/none: no such folder"
    if what == "other names":
        for i in range(3):
            save_label(root / f"other/{i}_mask.png", 0, 1)
        return {"labels": root / "other"}, f"{root}/other: no label has the name of an image: images/a/00.jpg is an"
    if what == "one stem twice":
        save_image(root / "images/a/00.png")
        return {}, f"{root}: images/a/00.jpg and images/a/00.png have one name"
    if what == "too few":
        return {
            "labeled": "19"
        }, f"{root}/labels: 20 images have a label, but --val 0.1 and --labeled 19 ask for 2 + 19"
    if what == "nothing left":
        return {"val": "1/1"}, f"{root}/labels: 20 images have a label, but --val 1/1 and --labeled 1/8 ask for 20 + 1"
    if what == "unreadable label":
        (root / "labels/a/00.png").write_bytes(b"no PNG")
        return {}, f"{root}/labels/a/00.png: unreadable label"
    if what == "seed":
        return {"seed": -1}, "--seed -1: must be at least 0"
    if what == "map":
        return {"label_map": "{300: 1}"}, "--label-map {300: 1}: 300: 1: 300 must be at most 255"
    for path in (root / "labels").rglob("*.png"):
        save_label(path, 0, 255)
    return {}, f"{root}/labels: no class but 0 occurs in the 20 labels; it looks like a 0/255 mask: set label_map: {{0"


SPOILT = ["no images", "no labels", "labels that are no PNG", "no folder", "other names", "one stem twice", "too few",
          "nothing left", "unreadable label", "seed", "map", "0/255 masks"]  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_cannot_be_split_is_one_line_and_nothing_is_written(root, capsys, what):
    options, expected = spoil(root, what)
    assert complaint(capsys, arguments(root, **options)).startswith(expected)
    assert not (root / "lists").exists()


def test_labels_without_an_image_are_left_out_and_said(root, capsys):
    save_label(root / "labels/a/99.png", 0, 5)
    make(root)
    out = capsys.readouterr().out
    assert "note: 1 labels have no image and were left out, such as labels/a/99.png" in out
    assert "class 5" not in out


# --- the whole --------------------------------------------------------------------------------------------------------


def test_a_folder_of_0_255_masks_trains_and_is_evaluated_by_config_alone(tmp_path):
    """Grey images, smaller and far larger than the crop, some without a mask."""
    rng = np.random.default_rng(0)
    root = tmp_path / "cells"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(12):
        size = (20, 90)[i % 2]
        mask = np.zeros((size, size), bool)
        mask[size // 4 : size // 2] = True
        grey = np.where(mask, 200, 50) + rng.integers(0, 30, mask.shape)
        Image.fromarray(grey.astype(np.uint8)).save(root / f"images/cell {i}.png")
        if i < 10:
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / f"masks/cell {i}.png")
    words = arguments(root, labels=root / "masks", output="lists", val="0.2", labeled="1/2")
    run = run_here("scripts.make_splits", *words, "--label-map", "{0: 0, 255: 1}")
    assert run.returncode == 0, run.stderr
    snippet = yaml.safe_load(run.stdout.split("other keys):")[1].split("and on the command line")[0])
    assert snippet["label_map"] == {0: 0, 255: 1} and len(snippet["classes"]) == 2
    rest = {"crop_size": 32, "epochs": 1, "batch_size": 2, "lr": 0.001, "backbone": "resnet10", "pretrained": False}
    config = tmp_path / "cells.yaml"
    config.write_text(yaml.safe_dump({**snippet, **rest, "device": "cpu", "workers": 0}), encoding="utf-8")
    assert load_config(config).label_map == {0: 0, 255: 1}
    lists = ["--labeled-id-path", root / "lists/labeled.txt", "--save-path", tmp_path / "run"]
    run = run_here("supervised", "--config", config, *lists)
    assert run.returncode == 0, run.stderr
    run = run_here("scripts.evaluate", "--config", config, "--checkpoint", tmp_path / "run/latest.pth")
    assert run.returncode == 0, run.stderr
    scores = {name.strip(): float(score) for name, score in (x.rsplit(maxsplit=1) for x in run.stdout.splitlines()[1:])}
    assert {"class 0", "class 1"} <= set(scores) and all(0 <= score <= 100 for score in scores.values())
    run = run_here("scripts.evaluate", "--config", config, "--checkpoint", tmp_path / "run/latest.pth",
                     "--set", "label_map=")  # fmt: skip
    assert run.returncode == 2 and "label_map: {0: 0, 255: 1}" in run.stderr
