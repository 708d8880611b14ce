"""The toy set: the same every time, what it promises about classes and colours, and whole or absent on disk."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import deque

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dataset import DataError
from dataset.check import check_samples
from dataset.files import read_image, read_label
from dataset.lists import read_list
from dataset.prepare import toy
from dataset.prepare.toy import CLASSES, NUM_LABELED, NUM_UNLABELED, NUM_VAL, PALETTE, make_toy, scene
from dataset.source import DataSource
from scripts import make_toy as make_toy_script
from tests.helpers import PROJECT_ROOT
from util.cli import run_main
from util.errors import ConfigError

N = len(CLASSES)
BLUR = ImageFilter.GaussianBlur(2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The whole set; tests must not change it."""
    root = tmp_path_factory.mktemp("whole") / "toy"
    make_toy(root)
    return root


@pytest.fixture
def small(monkeypatch):
    """Sets of ten training and three validation images, for tests that make several."""
    monkeypatch.setattr(toy, "SUBSETS", {"train": 10, "val": 3})


def _contents(root):
    """Every file's bytes by its relative path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _load(root, name):
    """Images and labels of a list."""
    samples = read_list(root / f"{name}.txt")
    images = [np.asarray(read_image(root / sample.image)) for sample in samples]
    return images, [np.asarray(read_label(root / sample.label)) for sample in samples]


def _shares(labels):
    """Share of each class among the pixels that are not ignored."""
    counts = sum(np.bincount(label.ravel(), minlength=256)[:N] for label in labels)
    return counts / counts.sum()


@pytest.mark.slow
def test_two_makes_are_identical_byte_for_byte(root, tmp_path):
    make_toy(tmp_path / "again")
    assert _contents(tmp_path / "again") == _contents(root)


def test_the_scenes_are_those_that_the_documented_figures_were_measured_on():
    # Of pixels, not of files: zlib may compress differently elsewhere. A change of scenes needs a new VERSION.
    digest = hashlib.sha256()
    for subset, index in (("train", 0), ("train", 7), ("train", 303), ("val", 0), ("val", 127)):
        for array in scene(0, subset, index):
            digest.update(str(array.shape).encode() + array.tobytes())
    assert (toy.VERSION, digest.hexdigest()[:16]) == (2, "a3c4b3a40ae0d62c")


def test_a_scene_depends_on_seed_subset_and_index_alone():
    first = scene(0, "train", 5)
    scene(0, "train", 6)
    assert all(np.array_equal(a, b) for a, b in zip(first, scene(0, "train", 5), strict=True))
    others = [scene(1, "train", 5), scene(0, "val", 5), scene(0, "train", 6)]
    pixels = [first[0].tobytes(), *(image.tobytes() for image, _ in others)]
    assert len(set(pixels)) == 4


def test_files_on_disk_hold_the_scenes(root):
    for name, subset, index in (("labeled", "train", 3), ("val", "val", 17)):
        sample = read_list(root / f"{name}.txt")[index]
        image, label = scene(0, subset, index)
        assert np.array_equal(np.asarray(read_image(root / sample.image)), image)
        assert np.array_equal(np.asarray(read_label(root / sample.label)), label)


def test_the_lists_have_the_promised_lengths_and_share_no_image(root):
    lists = {name: read_list(root / f"{name}.txt", labels=False) for name in ("labeled", "unlabeled", "val")}
    assert [len(samples) for samples in lists.values()] == [NUM_LABELED, NUM_UNLABELED, NUM_VAL] == [8, 296, 128]
    images = [sample.image for samples in lists.values() for sample in samples]
    assert len(set(images)) == len(images)
    assert {image for image in images} == {f"images/{p.parent.name}/{p.name}" for p in root.glob("images/*/*")}


def test_labels_exist_only_for_labelled_and_validation_images(root):
    listed = {s.label for name in ("labeled", "val") for s in read_list(root / f"{name}.txt")}
    on_disk = {path.relative_to(root).as_posix() for path in root.glob("labels/**/*.png")}
    assert on_disk == listed and len(listed) == NUM_LABELED + NUM_VAL
    assert all(sample.label is None for sample in read_list(root / "unlabeled.txt", labels=False))


def test_the_set_passes_the_checks_before_training(root):
    for name in ("labeled", "val"):
        check_samples(read_list(root / f"{name}.txt"), DataSource(root), N)
    check_samples(read_list(root / "unlabeled.txt", labels=False), DataSource(root), N)


def test_labels_show_their_palette_and_hold_classes_or_255(root):
    found = set()
    for name in ("labeled", "val"):
        for sample in read_list(root / f"{name}.txt"):
            with Image.open(root / sample.label) as label:
                assert label.mode == "P"
                assert tuple(label.getpalette()[: 3 * N]) == sum(PALETTE, ())
                found |= set(np.unique(np.asarray(label)))
    assert found == {*range(N), 255}


def test_image_sizes_vary_in_both_directions(root):
    images, labels = _load(root, "val")
    assert all(image.shape == (*label.shape, 3) for image, label in zip(images, labels, strict=True))
    shapes = np.array([label.shape for label in labels])
    assert shapes.min() >= 60 and shapes.max() <= 80
    assert (shapes[:, 0] > shapes[:, 1]).any() and (shapes[:, 0] < shapes[:, 1]).any()


def test_every_class_occurs_in_every_eight_images_in_a_row():
    labels = [scene(3, "train", index)[1] for index in range(40)]
    for start in range(33):
        assert (_shares(labels[start : start + 8]) > 0.01).all()


def test_background_is_the_largest_class_and_checks_and_dots_are_rarer_objects(root):
    unlabeled = [scene(0, "train", index)[1] for index in range(NUM_LABELED, NUM_LABELED + NUM_UNLABELED)]
    for labels in (unlabeled, _load(root, "val")[1]):
        shares = dict(zip(CLASSES, _shares(labels), strict=True))
        assert 0.3 < shares["background"] < 0.6
        assert shares["checks"] + shares["dots"] < 0.8 * (shares["bars"] + shares["bands"])
        assert min(shares.values()) > 0.04


def test_colour_alone_does_not_tell_the_class(root):
    """Neither the nearest of the classes' mean colours nor the likeliest class of a colour in 304 labelled images."""
    truth, pixels = _pixels(*_load(root, "val"))
    means = np.stack([pixels[truth == c].mean(0) for c in range(N)])
    nearest = ((pixels[:, None] - means) ** 2).sum(-1).argmin(1)
    assert _ious(truth, nearest)[1:].max() < 25 and _ious(truth, nearest).mean() < 17

    scenes = [scene(0, "train", index) for index in range(NUM_LABELED + NUM_UNLABELED)]
    seen_truth, seen = _pixels(*zip(*scenes, strict=True))
    counts = np.stack([np.bincount(_colour_bin(seen[seen_truth == c]), minlength=512) for c in range(N)])
    likeliest = (counts / counts.sum(1, keepdims=True)).argmax(0)[_colour_bin(pixels)]
    assert _ious(truth, likeliest)[1:].max() < 16 and _ious(truth, likeliest).mean() < 27


def _pixels(images, labels):
    """Classes and colours, (P,) and (P, 3), of all pixels that are not ignored."""
    truth = np.concatenate([label.ravel() for label in labels])
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    return truth[truth != 255], pixels[truth != 255]


def _colour_bin(pixels):
    """Each colour's cell of 32 levels a channel: 0 to 511."""
    return (pixels // 32).astype(int) @ (64, 8, 1)


def _ious(truth, predicted):
    """Of each class, in percent."""
    ious = [((truth == c) & (predicted == c)).sum() / ((truth == c) | (predicted == c)).sum() for c in range(N)]
    return 100 * np.array(ious)


def test_objects_overlap_and_outlines_are_ignored():
    """Where two objects touch, an ignored band lies between them, which a flood of the rest does not cross."""
    touching = 0
    for index in range(20):
        label = scene(0, "train", index)[1]
        parts = _regions(label)
        band = np.argwhere(label == 255)
        assert 0.03 < len(band) / label.size < 0.2
        for y, x in band:
            near = parts[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            nearby = label[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            if len(np.unique(near[(near > 0) & (nearby > 0)])) > 1:
                touching += 1
                break
    assert touching >= 15


def _regions(label):
    """Number, from 1, of the connected region of each pixel that is not ignored."""
    regions = np.where(label == 255, -1, 0)
    number = 0
    for start in np.argwhere(label != 255):
        if regions[tuple(start)]:
            continue
        number += 1
        queue = deque([tuple(start)])
        regions[tuple(start)] = number
        while queue:
            y, x = queue.popleft()
            for spot in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= spot[0] < label.shape[0] and 0 <= spot[1] < label.shape[1]
                if inside and not regions[spot]:
                    assert label[spot] == label[y, x], "two classes touch without a band between them"
                    regions[spot] = number
                    queue.append(spot)
    return regions


@pytest.mark.parametrize("name", CLASSES[1:])
def test_patterns_survive_without_colour_at_half_size_and_blurred(name):
    """The directions in which grey levels change tell the patterns apart, as they do for an eye."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:96, 0:96] - 48.0
    for _ in range(20):
        grey = 255 * (1 - toy.class_pattern(name, x, y, rng))
        picture = Image.fromarray(grey.astype(np.uint8))
        for seen in (picture.resize((48, 48), Image.Resampling.BILINEAR), picture.filter(BLUR)):
            pixels = np.asarray(seen, np.float64)[8:-8, 8:-8]
            assert _describe(pixels) == name


def _describe(pixels):
    """The pattern by the strongest wave of its spectrum, and whether another as strong runs at right angles to it."""
    size = len(pixels)
    window = np.hanning(size)[:, None] * np.hanning(size)
    power = abs(np.fft.fft2((pixels - pixels.mean()) * window, (256, 256))) ** 2
    v, u = np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256), indexing="ij")
    angle = np.degrees(np.arctan2(v, u)) % 180
    strongest = angle.flat[power.argmax()]
    across = power[abs((angle - strongest) % 180 - 90) < 10].max()
    if across < 0.2 * power.max():
        return "bands" if 45 < strongest < 135 else "bars"
    return "checks" if 22.5 < strongest % 90 < 67.5 else "dots"


def test_a_complete_set_is_left_alone_and_any_other_is_made_anew(tmp_path, small, monkeypatch):
    root = tmp_path / "toy"
    make_toy(root)
    whole = _contents(root)

    def refuse(*_):
        raise AssertionError("drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(toy, "scene", refuse)
        make_toy(root)
    for harm in (
        lambda: (root / "images/train/0003.png").unlink(),
        lambda: (root / toy.MANIFEST).write_text(json.dumps({**json.loads(whole[toy.MANIFEST]), "version": 0})),
    ):
        harm()
        assert _contents(root) != whole
        make_toy(root)
        assert _contents(root) == whole
    make_toy(root, seed=1)
    assert _contents(root).keys() == whole.keys() and _contents(root) != whole
    monkeypatch.setattr(toy, "scene", refuse)
    with pytest.raises(AssertionError, match="drawn again"):
        make_toy(root, seed=1, force=True)


@pytest.mark.parametrize("also_missing", [False, True])
def test_a_file_that_was_changed_is_replaced_by_force_only(tmp_path, small, capsys, also_missing):
    root = tmp_path / "toy"
    make_toy(root)
    whole = _contents(root)
    (root / "labels/val/0001.png").write_bytes(b"edited")
    if also_missing:
        (root / "images/train/0003.png").unlink()
    before = _contents(root)
    with pytest.raises(SystemExit):
        run_main(lambda: make_toy_script.main(["--root", str(root)]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {root}: 1 files were changed since the set was made, such as labels/val/0001.png")
    assert f"python -m scripts.make_toy --root {root} --force" in line and _contents(root) == before
    make_toy_script.main(["--root", str(root), "--force"])
    assert _contents(root) == whole


def test_what_the_finder_leaves_in_a_folder_spoils_no_set(tmp_path, small, monkeypatch):
    make_toy(tmp_path)
    (tmp_path / "images/.DS_Store").write_bytes(b"view")
    with monkeypatch.context() as patch:
        patch.setattr(toy, "scene", None)  # nothing is drawn again
        make_toy(tmp_path)
    make_toy(tmp_path, seed=1)
    assert toy.is_complete(tmp_path, seed=1)


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, small, monkeypatch):
    def fail_at_the_seventh(seed, subset, index):
        if index == 7:
            raise KeyboardInterrupt
        return scene(seed, subset, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy, "scene", fail_at_the_seventh)
        make_toy(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []

    make_toy(tmp_path / "toy")
    before = _contents(tmp_path / "toy")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy, "scene", fail_at_the_seventh)
        make_toy(tmp_path / "toy", seed=1)
    assert _contents(tmp_path / "toy") == before


def test_a_killed_run_leaves_no_set_and_the_next_one_makes_it(tmp_path, small):
    root = tmp_path / "toy"
    process = subprocess.Popen([sys.executable, "-m", "scripts.make_toy", "--root", str(root)], cwd=PROJECT_ROOT)
    try:
        while not list(tmp_path.glob(".toy.*/**/*.png")):
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not root.exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    make_toy(root)
    assert toy.is_complete(root, seed=0)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path, small, force):
    root = tmp_path / "data"
    make_toy(root)
    (root / "notes.txt").write_text("mine")
    (root / "images/train/0000.png").unlink()
    before = _contents(root)
    with pytest.raises(DataError, match=r"data: holds notes\.txt, which is no part of a toy set"):
        make_toy(root, force=force)
    assert _contents(root) == before


def test_an_empty_folder_is_filled(tmp_path, small):
    make_toy(tmp_path)
    assert toy.is_complete(tmp_path, seed=0)


def test_the_script_writes_a_preview_in_the_palette_s_colours(root, tmp_path, capsys):
    make_toy_script.main(["--root", str(root), "--preview", str(tmp_path / "new/toy.png")])
    assert "8 labelled, 296 unlabelled and 128 validation images" in capsys.readouterr().out
    with Image.open(tmp_path / "new/toy.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(maxcolors=1 << 24)}
        assert sheet.width > 8 * 2 * 60
    assert set(PALETTE) <= colours


def test_a_preview_replaces_no_picture_but_an_earlier_preview(root, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (3, 3)).save(photo)
    for path in (photo, root / "images/train/0000.png", root / "new.png"):
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(ConfigError, match=f"{path.name}: (exists, and these|lies in the set's own folder)"):
            make_toy_script.main(["--root", str(root), "--preview", str(path)])
        assert (path.read_bytes() if path.exists() else None) == before
    for _ in range(2):
        make_toy_script.main(["--root", str(root), "--preview", str(tmp_path / "preview.png")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "{tmp}/file"], "{tmp}/file: a file is where the toy set should go"),
        (["--root", "{tmp}/file/toy"], "{tmp}/file/toy: cannot write the toy set: "),
        (["--root", "{tmp}/toy", "--seed", "-1"], "seed -1: the toy set's seed must be 0 or more"),
        (
            ["--root", "{root}", "--preview", "{tmp}/toy.nothing"],
            "--preview {tmp}/toy.nothing: the suffix must be one of",
        ),
    ],
)
def test_bad_input_to_the_script_is_one_line(root, tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("mine")
    arguments = [argument.format(tmp=tmp_path, root=root) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: make_toy_script.main(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: " + message.format(tmp=tmp_path))
    assert (tmp_path / "file").read_text() == "mine"
