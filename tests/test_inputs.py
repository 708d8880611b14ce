"""dataset/inputs.py: which pictures an argument names, and where their predictions go."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset import DataError
from dataset.inputs import find_pictures


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.GIF", "in/c.jfif", "in/d.jpe", "notes.txt", ".hidden/e.jpg", "in/._c.jpg", "in/f.heic"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return Path("photos")


def _places(found) -> list[str]:
    return [picture.place.as_posix() for picture in found.pictures]


def test_a_folder_gives_its_pictures_in_depth_and_names_what_is_none(folder):
    found = find_pictures([folder], ".")
    assert _places(found) == ["a.jpg", "b.GIF", "in/c.jfif", "in/d.jpe"]
    assert [path.as_posix() for path in found.left_out] == ["photos/in/f.heic", "photos/notes.txt"]


def test_a_glob_keeps_the_folders_after_its_part_without_wildcards(folder):
    assert _places(find_pictures(["photos/**/*.j*"], ".")) == ["a.jpg", "in/c.jfif", "in/d.jpe"]
    assert _places(find_pictures(["photos/in/*.jfif", "photos/a.jpg"], ".")) == ["c.jfif", "a.jpg"]


def test_a_list_names_its_pictures_in_the_data_root_and_their_labels(folder):
    Path("list.txt").write_text("photos/a.jpg labels/a.png\n../far/b.jpg\n")
    found = find_pictures(["list.txt"], ".", allow_outside=True)
    assert _places(found) == ["photos/a.jpg", "b.jpg"]
    assert [picture.label and picture.label.as_posix() for picture in found.pictures] == ["labels/a.png", None]


def test_links_that_lead_back_end(folder):
    (folder / "in" / "again").symlink_to(Path("..").resolve() / folder.resolve())
    expected = ["a.jpg", "b.GIF", "in/c.jfif", "in/d.jpe"]
    assert _places(find_pictures([folder], ".")) == expected
    assert _places(find_pictures(["photos/**/*.*"], ".")) == expected


def test_folders_of_the_system_are_left_out_and_links_to_other_folders_followed(folder, tmp_path):
    for place in (folder / "__MACOSX/g.jpg", tmp_path / "far/h.jpg"):
        place.parent.mkdir()
        place.write_bytes(b"")
    (folder / "linked").symlink_to(tmp_path / "far")
    assert _places(find_pictures([folder], ".")) == ["a.jpg", "b.GIF", "in/c.jfif", "in/d.jpe", "linked/h.jpg"]


def test_predictions_of_an_earlier_run_are_no_pictures_of_a_folder(folder):
    found = find_pictures([folder, "photos/*.jpg"], ".", is_prediction=lambda path: path.suffix == ".jpe")
    assert _places(found) == ["a.jpg", "b.GIF", "in/c.jfif", "a.jpg"]
    assert [path.name for path in found.predictions] == ["d.jpe"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("missing", "no such image, folder or list file"),
        ("photos/*.tif", "no image in this glob"),
        ("photos/.hidden2", "no such"),
        ("photos/in/f.heic", "its suffix is none of an image"),
    ],
)
def test_what_is_no_input_is_named(folder, source, expected):
    with pytest.raises(DataError, match=expected):
        find_pictures([source], ".")
