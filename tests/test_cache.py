"""dataset/cache.py: the pixels of the files as they are now, shared, bounded, and whole after any kill."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

import dataset.cache
from dataset.cache import ImageCache, open_cache, remove_unused
from dataset.errors import DataError
from dataset.files import read_label, read_pixels
from dataset.lists import Sample
from dataset.loader import LoaderOptions, train_loader
from dataset.semi import EpochSampler, TrainDataset, ValDataset
from dataset.source import DataSource
from tests.helpers import PROJECT_ROOT

COUNT, WIDTH, HEIGHT = 6, 50, 40
NEEDED = 48 + WIDTH * HEIGHT * 3  # bytes of one cached image: its header is at most this long


@pytest.fixture
def root(tmp_path) -> Path:
    """Images 0.jpg to 5.jpg and their labels."""
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(tmp_path / f"{index}.jpg")
        Image.fromarray(rng.integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    return tmp_path


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*"))


def _opened(monkeypatch) -> list[str]:
    """Names of the images that the cache decodes from now on."""
    opened = []
    read = dataset.cache.read_pixels
    monkeypatch.setattr(dataset.cache, "read_pixels", lambda path: opened.append(Path(path).name) or read(path))
    return opened


def test_pixels_are_those_of_the_files_and_decoded_once(root, tmp_path, monkeypatch):
    opened, cache = _opened(monkeypatch), ImageCache(tmp_path / "cache", 10**6)
    for _ in range(2):
        for index in range(COUNT):
            assert np.array_equal(cache.image(root / f"{index}.jpg"), read_pixels(root / f"{index}.jpg"))
            assert np.array_equal(cache.label(root / f"{index}.png"), np.asarray(read_label(root / f"{index}.png")))
    assert opened == [f"{index}.jpg" for index in range(COUNT)]
    again = ImageCache(tmp_path / "cache", 10**6)
    assert np.array_equal(again.image(root / "0.jpg"), read_pixels(root / "0.jpg")) and len(opened) == COUNT


def test_a_file_read_as_image_and_as_label_is_two_entries(root, tmp_path):
    cache = ImageCache(tmp_path / "cache", 10**6)
    assert cache.image(root / "0.png").shape == (HEIGHT, WIDTH, 3) and cache.label(root / "0.png").ndim == 2
    assert cache.image(root / "0.png").shape == (HEIGHT, WIDTH, 3)


def test_cached_pixels_cannot_be_changed_by_mistake(root, tmp_path):
    cache = ImageCache(tmp_path / "cache", 10**6)
    cache.image(root / "0.jpg")
    with pytest.raises(ValueError, match="read-only"):
        cache.image(root / "0.jpg")[0] = 0


def test_a_source_file_that_changes_is_decoded_anew(root, tmp_path):
    cache = ImageCache(tmp_path / "cache", 10**6)
    before = cache.image(root / "0.jpg")
    shutil.copy(root / "1.jpg", root / "0.jpg")
    os.utime(root / "0.jpg", ns=(0, 10**18))  # whatever the resolution of the file system's clock
    assert np.array_equal(cache.image(root / "0.jpg"), read_pixels(root / "1.jpg"))
    assert not np.array_equal(before, cache.image(root / "0.jpg"))
    assert len(_entries(tmp_path / "cache")) == 1
    (root / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"0\.jpg: no such image"):
        cache.image(root / "0.jpg")


@pytest.mark.parametrize("reopened", [False, True])
def test_a_source_file_changed_in_place_with_its_size_kept_is_decoded_anew(root, tmp_path, reopened):
    """Its time of change alone tells, whether the picture is mapped already or found on the disk by a later run."""
    path = root / "changed.bmp"  # all files of this format and shape have one size
    Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0)).save(path)
    size = path.stat().st_size
    cache = ImageCache(tmp_path / "cache", 10**6)
    assert (cache.image(path) == (255, 0, 0)).all() and (cache.image(path) == (255, 0, 0)).all()
    changed = path.stat().st_mtime_ns + 1000
    Image.new("RGB", (WIDTH, HEIGHT), (0, 255, 0)).save(path)
    os.utime(path, ns=(changed, changed))
    assert path.stat().st_size == size
    if reopened:
        cache = ImageCache(tmp_path / "cache", 10**6)
    assert (cache.image(path) == (0, 255, 0)).all()


def test_maps_are_kept_without_file_descriptors_and_only_so_many(root, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset.cache, "MAX_MAPS", 4)
    cache = ImageCache(tmp_path / "cache", 10**6)
    for index in range(COUNT):
        cache.image(root / f"{index}.jpg")
    descriptors = len(os.listdir("/proc/self/fd"))
    again = [cache.image(root / f"{index}.jpg") for index in (2, 3, 4, 5, 2)]
    assert again[0] is again[4] and len(os.listdir("/proc/self/fd")) == descriptors
    cache.image(root / "0.jpg")  # takes the place of 3.jpg, the longest unused one
    assert cache.image(root / "2.jpg") is again[0]
    assert cache.image(root / "3.jpg") is not again[1]
    assert pickle.loads(pickle.dumps(cache)).image(root / "2.jpg") is not again[0]


def test_a_map_outlives_its_file_and_a_new_one_is_taken_once_the_source_changes(root, tmp_path):
    cache = ImageCache(tmp_path / "cache", 10**6)
    cache.image(root / "0.jpg")
    mapped, before = cache.image(root / "0.jpg"), read_pixels(root / "0.jpg")
    shutil.copy(root / "1.jpg", root / "0.jpg")
    os.utime(root / "0.jpg", ns=(0, 10**18))
    other = ImageCache(tmp_path / "cache", 10**6)
    other.image(root / "0.jpg")  # another process replaces the entry
    assert np.array_equal(mapped, before)
    assert np.array_equal(cache.image(root / "0.jpg"), read_pixels(root / "1.jpg"))


def test_the_limit_is_kept_and_what_is_beyond_it_is_decoded_each_time(root, tmp_path, monkeypatch):
    opened, cache = _opened(monkeypatch), ImageCache(tmp_path / "cache", 3 * NEEDED)
    for _ in range(2):
        for index in range(COUNT):
            assert np.array_equal(cache.image(root / f"{index}.jpg"), read_pixels(root / f"{index}.jpg"))
    assert len(_entries(tmp_path / "cache")) == 3 and len(opened) == COUNT + 3
    assert sum(path.stat().st_size for path in _entries(tmp_path / "cache")) <= 3 * NEEDED


def test_replaced_entries_do_not_use_up_the_limit(root, tmp_path):
    cache = ImageCache(tmp_path / "cache", 3 * NEEDED)
    for time_ns in range(10**18, 10**18 + 20 * 10**9, 10**9):
        os.utime(root / "0.jpg", ns=(0, time_ns))
        cache.image(root / "0.jpg")
    for index in (1, 2):
        cache.image(root / f"{index}.jpg")
    assert len(_entries(tmp_path / "cache")) == 3


def test_a_disk_that_is_nearly_full_is_left_alone(root, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset.cache, "SPARE", 2**62)
    cache = ImageCache(tmp_path / "cache", 10**6)
    assert np.array_equal(cache.image(root / "0.jpg"), read_pixels(root / "0.jpg"))
    assert not _entries(tmp_path / "cache")
    with (
        pytest.raises(DataError, match=r"cache_dir .*other: the disk has .* GB free.*set cache: none"),
        open_cache("disk", 1, tmp_path / "other"),
    ):
        pass


@pytest.mark.parametrize("fault", ["truncated", "emptied", "another file", "unwritable"])
def test_a_damaged_cache_costs_time_and_nothing_else(root, tmp_path, fault):
    cache = ImageCache(tmp_path / "cache", 10**6)
    expected = cache.image(root / "0.jpg").copy()
    (entry,) = _entries(tmp_path / "cache")
    if fault == "truncated":
        os.truncate(entry, 1000)
    elif fault == "emptied":
        os.truncate(entry, 0)
    elif fault == "another file":
        entry.write_bytes(os.urandom(entry.stat().st_size))
    else:
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").write_text("in the way")
    for _ in range(2):
        assert np.array_equal(cache.image(root / "0.jpg"), expected)


def test_a_folder_that_cannot_be_made_is_an_error_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cache_dir .*file/cache: cannot be used: Not a directory"):
        ImageCache(tmp_path / "file" / "cache", 10**6)


def _read_all(root: Path, folder: Path, rounds: int) -> bool:
    cache = ImageCache(folder, 10**6)
    for _ in range(rounds):
        for index in np.random.default_rng().permutation(COUNT):
            if not np.array_equal(cache.image(root / f"{index}.jpg"), read_pixels(root / f"{index}.jpg")):
                return False
            for entry in _entries(folder)[:2]:  # so that there is always something to write
                entry.unlink(missing_ok=True)
    return True


def test_processes_that_write_at_the_same_time_all_read_whole_pictures(root, tmp_path):
    with get_context("fork").Pool(4) as pool:
        assert all(pool.starmap(_read_all, [(root, tmp_path / "cache", 15)] * 4))


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_only_whole_pictures_and_a_right_count(root, tmp_path):
    code = "import sys; from tests.test_cache import _read_all; from pathlib import Path; print('go', flush=True); "
    code += "_read_all(Path(sys.argv[1]), Path(sys.argv[2]), 10**6)"
    folder = tmp_path / "cache"
    for delay in (0.0, 0.01, 0.02, 0.03, 0.05, 0.08):
        command = [sys.executable, "-c", code, str(root), str(folder)]
        process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "go\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cache = ImageCache(folder, 10**6)
        assert int.from_bytes((folder / "used").read_bytes(), "little") == sum(
            path.stat().st_size for path in _entries(folder)
        )
        for index in range(COUNT):
            assert np.array_equal(cache.image(root / f"{index}.jpg"), read_pixels(root / f"{index}.jpg"))


def _in_memory() -> set[Path]:
    return set(dataset.cache.SHARED_MEMORY.glob(f"unimatch-cache-{os.getuid()}-*"))


needs_shared_memory = pytest.mark.skipif(
    not dataset.cache.SHARED_MEMORY.is_dir() or shutil.disk_usage(dataset.cache.SHARED_MEMORY).free < 3 * 2**30,
    reason="needs 3 GB free in shared memory",
)


@needs_shared_memory
def test_a_cache_in_memory_is_shared_by_name_and_goes_with_its_last_user(root, monkeypatch):
    opened = _opened(monkeypatch)
    with open_cache("ram", 1, name="one") as first:
        with open_cache("ram", 1, name="one") as second:
            first.image(root / "0.jpg")
            assert np.array_equal(second.image(root / "0.jpg"), read_pixels(root / "0.jpg"))
            assert opened == ["0.jpg"] and first.folder == second.folder
        assert first.folder in _in_memory()
    assert first.folder not in _in_memory()


@pytest.mark.slow
@needs_shared_memory
def test_what_a_killed_run_left_in_memory_is_removed_and_a_living_one_s_is_not(root):
    code = "import sys, time; from dataset.cache import open_cache; from pathlib import Path\n"
    code += "with open_cache('ram', 1, name=sys.argv[1]) as cache:\n"
    code += "    cache.image(sys.argv[2]); print(cache.folder, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.Popen([*command, name, str(root / "0.jpg")], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
        for name in ("killed", "living")
    ]
    killed, living = (Path(run.stdout.readline().strip()) for run in runs)
    remove_unused()
    assert {killed, living} <= _in_memory()
    runs[0].kill()
    runs[0].wait()
    remove_unused()
    assert killed not in _in_memory() and living in _in_memory()
    runs[1].kill()
    runs[1].wait()
    remove_unused()
    assert living not in _in_memory()
    for run in runs:
        run.stdout.close()


def test_memory_that_this_system_lacks_is_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset.cache, "SHARED_MEMORY", tmp_path / "none")
    with pytest.raises(DataError, match=r"cache: ram needs .*; use cache: disk"):
        open_cache("ram", 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_validation_samples_are_bit_identical_with_a_cache(root, tmp_path, workers):
    samples = [Sample(f"{index}.jpg", f"{index}.png") for index in range(COUNT)]

    def everything(cache: ImageCache | None) -> list:
        data = TrainDataset(samples[:2], samples[2:], DataSource(root, {2: 1}, cache), 24, 0)
        loader = train_loader(data, EpochSampler(2, COUNT - 2, 2, 0), LoaderOptions(workers))
        batches = []
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            batches += list(loader)
        validation = ValDataset(samples, DataSource(root, {2: 1}, cache))
        return [*batches, *(validation[index] for index in range(COUNT))]

    expected, found = (tree_leaves(everything(cache)) for cache in (None, ImageCache(tmp_path / "cache", 10**6)))
    assert len(expected) == len(found) > 6 + COUNT
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(expected, found, strict=True)
    )
    assert len(_entries(tmp_path / "cache")) == 2 * COUNT
