"""dataset/atomic.py: a file is replaced whole or not at all, and what a kill left is removed."""

from __future__ import annotations

import pytest

from dataset.atomic import remove_leftovers, replacing


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_the_old_one_until_the_block_ends(tmp_path, durable):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ValueError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_check_right_before_the_replacing_may_refuse_it(tmp_path):
    path, seen = tmp_path / "file", []

    def refuse() -> None:
        seen.append(next(tmp_path.iterdir()).read_text())
        raise PermissionError

    with pytest.raises(PermissionError), replacing(path, check=refuse) as temporary:
        temporary.write_text("written")
    assert seen == ["written"] and list(tmp_path.iterdir()) == []


def test_a_fixed_temporary_path_is_overwritten_by_the_next_write(tmp_path):
    path, fixed = tmp_path / "file", tmp_path / "file.tmp"
    fixed.write_text("of a killed process")
    with replacing(path, temporary=fixed) as temporary:
        assert temporary == fixed
        temporary.write_text("new")
    assert path.read_text() == "new" and not fixed.exists()


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    kept = {".hidden", "mine.tmp", ".notes.tmp", "file", ".file.xyz.tmp"}
    for name in (*kept, ".file.0a1b2c3d.tmp"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_leftovers(tmp_path / "missing")
