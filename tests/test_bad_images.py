"""Images that turn unreadable in mid-training: the end of the run, or another sample in their place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

import unimatch
from dataset import DataError
from dataset.lists import read_list
from dataset.loader import LoaderOptions, train_loader
from dataset.replacement import TRIES
from dataset.semi import EpochSampler, Key, TrainDataset
from dataset.source import DataSource
from tests.helpers import TinyData, run_script
from util.cli import run_main
from util.log import RunLog
from util.train.bad_images import BadImages

pytestmark = pytest.mark.usefixtures("one_thread")

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2")
UNCHECKED = ("--set", "check_data=false")  # so that the run begins


def _spoil(data: TinyData, name: str) -> Path:
    path = data.root / name
    path.write_bytes(path.read_bytes()[:-30])
    return path


def _loader(data: TinyData, workers: int = 0, supervised: bool = False, partner: str = "same_image"):
    labeled = read_list(data.labeled)
    unlabeled = None if supervised else read_list(data.unlabeled, labels=False)
    dataset = TrainDataset(labeled, unlabeled, DataSource(data.root), 32, seed=3)
    count = None if supervised else len(unlabeled)
    sampler = EpochSampler(len(labeled), count, 2, 3, partner=partner)
    return train_loader(dataset, sampler, LoaderOptions(workers), skip_bad=True)


def _epochs(loader, count: int = 2) -> tuple[list, list[list[str]]]:
    """The batches of `count` epochs, and the faults that came with each."""
    batches, faults = [], []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            batches.append(batch)
            faults.append(loader.faults[:])
            loader.faults.clear()
    return batches, faults


def _flat(batch) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def _by_sample(batch) -> list[torch.Tensor]:
    """The tensors with a leading dimension of all samples."""
    (image, label), views = batch
    return [image, label, views.weak, *views.strong]


def _equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_flat(a), _flat(b), strict=True))


BAD = ["images/labeled1.jpg", "labels/labeled2.png", "images/unlabeled3.jpg"]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("partner", ["same_image", "other_image"])
def test_each_sample_with_the_bad_image_is_replaced_and_no_other(data, name, partner):
    sound, none = _epochs(_loader(data, partner=partner))
    assert not any(none)
    path = _spoil(data, name)
    batches, faults = _epochs(_loader(data, partner=partner))
    assert {message.split(": ")[0] for own in faults for message in own} == {str(path)}
    for batch, before, own in zip(batches, sound, faults, strict=True):
        changed = [
            not all(torch.equal(x[i], y[i]) for x, y in zip(_by_sample(batch), _by_sample(before), strict=True))
            for i in (0, 1)
        ]
        # A draw in its place may meet the bad image again.
        assert sum(changed) <= len(own) and bool(sum(changed)) == bool(own)


@pytest.mark.parametrize("supervised", [False, True])
def test_the_replacement_does_not_depend_on_workers_or_on_what_ran_before(data, supervised):
    _spoil(data, "images/labeled1.jpg")
    batches, faults = _epochs(_loader(data, 0, supervised))
    again, again_faults = _epochs(_loader(data, 2, supervised))
    assert faults == again_faults and any(faults)
    assert all(_equal(a, b) for a, b in zip(batches, again, strict=True))
    loader = _loader(data, 0, supervised)
    loader.sampler.set_epoch(1)
    second = list(loader)
    assert all(_equal(a, b) for a, b in zip(batches[len(second) :], second, strict=True))


def test_replacements_are_other_samples_in_another_epoch(data):
    dataset = _loader(data).dataset
    drawn = [dataset.key_for(Key(epoch, 1, 2, 2), attempt) for epoch in range(20) for attempt in range(1, TRIES)]
    assert len({key[1:] for key in drawn}) > 10
    assert all(key.partner == key.unlabeled and key.labeled < 4 and key.unlabeled < 6 for key in drawn)
    # Where the step pastes from the reversed batch, a sample has no partner, nor has its replacement.
    assert {dataset.key_for(Key(0, 1, 2, -1), attempt).partner for attempt in range(TRIES)} == {-1}


def test_nothing_readable_is_an_error_that_names_a_file(data):
    for path in sorted((data.root / "images").glob("unlabeled*")):
        path.unlink()
    with pytest.raises(DataError, match=rf"unlabeled\d.jpg: no such image .*\({TRIES} samples in a row"):
        next(iter(_loader(data)))


def test_a_label_of_another_size_is_found_in_mid_training_too(data):
    label = data.root / "labels/labeled1.png"
    Image.open(label).crop((0, 0, 20, 16)).save(label)
    assert any("the label is 20 x 16 pixels" in fault for own in _epochs(_loader(data))[1] for fault in own)


def test_each_file_is_named_once_and_the_limit_is_of_files(tmp_path, capsys):
    loader = SimpleNamespace(faults=[])
    with RunLog(tmp_path, active=True) as log:
        images = BadImages(loader, 2, log)
        for faults in (["a.jpg: broken", "b.jpg: gone", "a.jpg: broken"], [], ["b.jpg: gone"] * 5):
            loader.faults += faults
            images.report()
            assert loader.faults == []
        assert capsys.readouterr().out.splitlines() == [
            "skipped: a.jpg: broken",
            "skipped: b.jpg: gone",
            "3 samples replaced so far, 2 unreadable images (bad_image_limit: 2)",
            "8 samples replaced so far, 2 unreadable images (bad_image_limit: 2)",
        ]
        loader.faults.append("c.jpg: gone")
        with pytest.raises(DataError, match=r"^c\.jpg: gone; 3 unreadable images, more than bad_image_limit 2$"):
            images.report()


# --- runs


def _stopped(capsys, arguments) -> str:
    with pytest.raises(SystemExit) as exited:
        run_main(lambda: unimatch.main(arguments))
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", ["images/unlabeled3.jpg", "labels/labeled2.png"])
def test_a_run_stops_naming_the_file_unless_told_otherwise(data, tmp_path, capsys, name):
    path = _spoil(data, name)
    line = _stopped(capsys, [*data.arguments(tmp_path / "run"), *UNCHECKED, "workers=2"])
    assert line.startswith(f"error: {path}: unreadable ")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_may_skip_ends_and_tells_what_it_skipped(data, tmp_path, capsys, workers):
    path = _spoil(data, "images/unlabeled3.jpg")
    arguments = [*data.arguments(tmp_path / "run"), *UNCHECKED, "on_bad_image=skip", f"workers={workers}"]
    unimatch.main(arguments)
    out = capsys.readouterr().out
    assert out.count(f"skipped: {path}: unreadable image") == 1
    assert " so far, 1 unreadable image (bad_image_limit: 10)" in out
    assert (tmp_path / "run/latest.pth").is_file()


def test_validation_images_are_never_skipped(data, tmp_path, capsys):
    path = _spoil(data, "images/val0.jpg")
    line = _stopped(capsys, [*data.arguments(tmp_path / "run"), *UNCHECKED, "on_bad_image=skip"])
    assert line.startswith(f"error: {path}: unreadable image")


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_two_processes_agree(data, tmp_path, skip):
    """One stops at a bad image; told to skip, both stop at once beyond the limit, which counts those of both."""
    bad = [_spoil(data, f"images/unlabeled{i}.jpg") for i in (1, 4)]
    options = ["on_bad_image=skip", "bad_image_limit=1"] if skip else []
    arguments = [*data.arguments(tmp_path / "run"), *UNCHECKED, "batch_size=1", *options]
    ended = run_script(*LAUNCHER, "unimatch.py", *arguments)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode != 0
    assert len(errors) == 1 and any(str(path) in errors[0] for path in bad)
    if skip:
        assert all(ended.stdout.count(f"skipped: {path}: ") == 1 for path in bad)
        assert "2 unreadable images, more than bad_image_limit 1" in errors[0]
