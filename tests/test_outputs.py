"""util/outputs.py: nothing is written over a file that is only read, or that no tool wrote."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from dataset import DataError
from util.errors import ConfigError
from util.outputs import MARK, check_suffix, check_targets, comment, is_own, read_mark, save_picture, writing


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photos" / "a.png"
    path.parent.mkdir()
    Image.new("RGB", (4, 3), "red").save(path)
    return path


@pytest.mark.parametrize("way", ["same", "spelled", "symlink", "hard link", "folder link"])
def test_no_output_is_an_input_however_its_path_is_written(photo, tmp_path, way):
    target = {
        "same": photo,
        "spelled": photo.parent / ".." / "photos" / "a.png",
        "symlink": tmp_path / "link.png",
        "hard link": tmp_path / "hard.png",
        "folder link": tmp_path / "other" / "a.png",
    }[way]
    if way == "symlink":
        target.symlink_to(photo)
    elif way == "hard link":
        os.link(photo, target)
    elif way == "folder link":
        target.parent.symlink_to(photo.parent)
    with pytest.raises(ConfigError, match=r"is the image .*a\.png, which would be overwritten"):
        check_targets([target], [("image", photo)])


def test_a_file_that_no_tool_wrote_is_never_replaced(photo, tmp_path):
    with pytest.raises(ConfigError, match="these tools did not write it"):
        check_targets([photo], [])
    with pytest.raises(ConfigError, match="is a folder"):
        check_targets([photo.parent], [])
    with pytest.raises(ConfigError, match="is no folder"):
        check_targets([photo / "deeper" / "b.png"], [])
    check_targets([tmp_path / "new" / "b.png"], [("image", photo)])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_tools_own_picture_is_recognised_and_may_be_replaced(tmp_path, suffix):
    path = tmp_path / f"deep/er/a{suffix}"
    save_picture(Image.new("RGB", (5, 4)), path, "made of this")
    assert is_own(path) and read_mark(path) == "made of this"
    check_targets([path], [])
    Image.fromarray(np.asarray(Image.open(path))).save(path)  # edited, say, and saved by another program
    assert not is_own(path)


def test_marks_of_other_kinds_of_files(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    assert not is_own(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.comment = comment("of that")
    assert read_mark(tmp_path / "a.npz") == "of that"
    (tmp_path / "a.json").write_text("{}")
    assert not is_own(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(f'{{"tool": "{MARK}"}}')
    assert is_own(tmp_path / "a.json")
    assert not is_own(tmp_path / "missing.png")


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), writing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    with writing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_suffix_that_cannot_be_written_is_refused():
    check_suffix("--panel", "a.PNG", (".png", ".jpg"))
    with pytest.raises(ConfigError, match=r"--panel a\.gif: the suffix must be one of \.png, \.jpg"):
        check_suffix("--panel", "a.gif", (".png", ".jpg"))


def test_suffixes_are_read_in_any_case(tmp_path):
    for name in ("a.JSON", "b.CSV"):
        (tmp_path / name).write_text(f'{{"tool": "{MARK}"}}')
        assert is_own(tmp_path / name)
    save_picture(Image.new("RGB", (5, 4)), tmp_path / "c.PNG", "of this")
    assert read_mark(tmp_path / "c.PNG") == "of this"


def test_a_temporary_file_that_was_a_link_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("a year's work")
    (tmp_path / ".a.bin.part").symlink_to("mine")
    with writing(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert (tmp_path / "mine").read_text() == "a year's work"
    assert (tmp_path / "a.bin").read_bytes() == b"new" and not (tmp_path / "a.bin").is_symlink()


def test_a_name_may_be_as_long_as_file_systems_have_it_and_a_longer_one_is_a_fault_of_this_file_alone(tmp_path):
    path = tmp_path / f"{'ü' * 125}x.png"
    with writing(path) as file:
        file.write(b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(DataError, match="cannot be written: File name too long"), writing(tmp_path / ("x" * 256)):
        pass
