"""dataset/lists.py: list files and folders of images, what they find, and what they refuse by name."""

import errno
import itertools
import os
import random

import numpy as np
import pytest

from dataset import check, lists
from dataset.check import check_samples
from dataset.lists import Sample, find_unlabeled, images_in, is_hidden, list_digest, read_list, walk
from dataset.source import DataSource
from tests.faults import deep_png
from tests.helpers import complaint, photo, save
from util.config import load_config
from util.lists import check_listed

# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg a.png\nb.jpg b.png\n", [("a.jpg", "a.png"), ("b.jpg", "b.png")]),
        ("a.jpg a.png", [("a.jpg", "a.png")]),
        ("\n# images\n\n  a.jpg   a.png  \n\n   # more\n\nb.jpg\tb.png\n\n", [("a.jpg", "a.png"), ("b.jpg", "b.png")]),
        ("a.jpg a.png\r\nb.jpg b.png\r\n", [("a.jpg", "a.png"), ("b.jpg", "b.png")]),
        ("\ufeffa.jpg a.png\n", [("a.jpg", "a.png")]),
        ("my photo.jpg\tmy label.png\n", [("my photo.jpg", "my label.png")]),
        ("my photo.jpg \t\t my label.png\t\n", [("my photo.jpg", "my label.png")]),
        ("a#1.jpg a#1.png\n", [("a#1.jpg", "a#1.png")]),
        ("straße/ü.jpg straße/ü.png\n", [("straße/ü.jpg", "straße/ü.png")]),
    ],
)
def test_a_list_has_a_line_per_image_and_may_have_comments_and_blank_lines(tmp_path, text, expected):
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode("utf-8"))
    assert read_list(path) == expected


def test_an_unlabelled_list_may_have_one_column_or_two(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a.jpg\nb.jpg b.png\n", encoding="utf-8")
    assert read_list(path, labels=False) == [("a.jpg", None), ("b.jpg", "b.png")]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, ": no such list file"),
        (b"", ": the list is empty"),
        (b"\n# only\n\n# comments\n", ": the list is empty"),
        (b"a.jpg a.png\n# b\nc.jpg\n", ":3: c.jpg has no label beside it; a labelled line is `image label`"),
        (b"a.jpg a.png\nmy photo.jpg my label.png\n", ":2: expected `image label`, found 4 columns (put a tab"),
        ("a.jpg a.png\n".encode("utf-16"), ": not a readable list file"),
        ("ü.jpg ü.png\n".encode("latin-1"), ": not a readable list file"),
    ],
)
def test_a_missing_empty_or_malformed_list_is_refused_with_its_line(tmp_path, content, fragment):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    assert complaint(read_list, path).startswith(f"{path}{fragment}")


LINES = ["a.jpg", "b.jpg b.png", "# no", "", "c  d", "my photo.jpg\t", "ü.jpg", "e#1.jpg e", "f\rg", "h.jpg h.png "]


@pytest.mark.parametrize("labels", ["kept", "dropped"])
@pytest.mark.parametrize("size", [1, 16, 50])
def test_blocks_of_plain_lines_are_read_as_others_are(tmp_path, monkeypatch, size, labels):
    plain = [f"{k}.jpg" for k in range(9)] + [f"{k}.jpg {k}.png" for k in range(9)]
    random.Random(size).shuffle(mixed := [*plain, *LINES])
    path = tmp_path / "list.txt"
    for lines in (plain, [line.split()[0] for line in plain], mixed):
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
        for name in ("FIRST_BLOCK", "BLOCK"):
            monkeypatch.setattr(lists, name, 2**20)
        expected = lists.read_entries(path, labels, tmp_path, lists.no_progress)
        monkeypatch.setattr(lists, "FIRST_BLOCK", 1)
        monkeypatch.setattr(lists, "BLOCK", size)
        assert lists.read_entries(path, labels, tmp_path, lists.no_progress) == list(expected)
        assert {sample.label for sample in expected} == {None} or labels == "kept"


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("x.jpg", ":5: x.jpg has no label beside it"),
        ("a b c", ":5: expected `image label`"),
        ("../x.jpg x.png", ":5: ../x.jpg lies outside data_root"),
        ("x.jpg /x.png", ":5: /x.png lies outside data_root"),
        ("\udce4.jpg x.png", ": not a readable list file: no UTF-8 text"),
    ],
)
def test_a_fault_in_a_later_block_is_told_with_its_line(tmp_path, monkeypatch, line, fragment):
    for name in ("FIRST_BLOCK", "BLOCK"):
        monkeypatch.setattr(lists, name, 1)
    path = tmp_path / "list.txt"
    path.write_bytes(f"# c\na.jpg a.png\nb.jpg b.png\nc.jpg c.png\n{line}\n".encode("utf-8", "surrogateescape"))
    assert complaint(read_list, path, inside=tmp_path).startswith(f"{path}{fragment}")


def test_a_folder_in_place_of_a_list_is_refused(tmp_path):
    assert complaint(read_list, tmp_path).startswith(f"{tmp_path}: not a readable list file")


def test_the_fingerprint_of_a_list_follows_its_content_only(tmp_path):
    a, b = Sample("a.jpg", "a.png"), Sample("b.jpg", "b.png")
    assert list_digest([a, b]) == list_digest([Sample(*a), Sample(*b)])
    others = ([b, a], [a], [a, b, b], [a, Sample("b.jpg", None)], [a, Sample("b.jpg", "c.png")], [])
    assert len({list_digest(samples) for samples in ([a, b], *others)}) == len(others) + 1


# --- unlabelled images ------------------------------------------------------------------------------------------------


def test_a_folder_as_source_is_searched_in_depth_and_in_order(tmp_path):
    for name in ("pool/b.JPG", "pool/deep/er/c.png", "pool/a.jpeg", "pool/deep/a.webp", "elsewhere/x.jpg"):
        save(tmp_path / name, photo())
    (tmp_path / "pool/notes.txt").write_text("no image", encoding="utf-8")
    found = find_unlabeled("pool", tmp_path, [])
    assert [sample.image for sample in found] == ["pool/a.jpeg", "pool/b.JPG", "pool/deep/a.webp", "pool/deep/er/c.png"]
    assert {sample.label for sample in found} == {None}
    assert [sample.image for sample in find_unlabeled(tmp_path / "elsewhere", tmp_path, [])] == ["elsewhere/x.jpg"]
    assert "x.jpg" in [sample.image for sample in find_unlabeled(".", tmp_path / "elsewhere", [])]


def test_a_list_as_source_keeps_its_order_and_loses_its_labels(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("c.jpg c.png\na.jpg\nb.jpg no/such/label.png\n", encoding="utf-8")
    assert find_unlabeled(path, tmp_path, []) == [("c.jpg", None), ("a.jpg", None), ("b.jpg", None)]


@pytest.mark.parametrize(
    "written", ["pool/a.jpg", "./pool/a.jpg", "pool//a.jpg", "pool/deep/../a.jpg", "{root}/pool/a.jpg"]
)
@pytest.mark.parametrize("source", ["pool", "list"])
def test_labelled_images_are_left_out_however_they_are_written(tmp_path, written, source):
    for name in ("a", "b"):
        save(tmp_path / f"pool/{name}.jpg", photo())
    path = tmp_path / "list.txt"
    path.write_text("pool/./a.jpg\npool/b.jpg\n", encoding="utf-8")
    labeled = [Sample(written.format(root=tmp_path), "a.png")]
    found = find_unlabeled(path if source == "list" else "pool", tmp_path, labeled)
    assert found == [("pool/b.jpg", None)]


def test_an_image_of_the_same_name_in_another_folder_is_not_left_out(tmp_path):
    save(tmp_path / "pool/a.jpg", photo())
    assert find_unlabeled("pool", tmp_path, [Sample("few/a.jpg", "a.png")]) == [("pool/a.jpg", None)]


def test_a_source_without_unlabelled_images_is_refused(tmp_path):
    save(tmp_path / "pool/a.jpg", photo())
    (tmp_path / "empty").mkdir()
    assert complaint(find_unlabeled, "nowhere", tmp_path, []).startswith("nowhere: neither a list file nor a folder")
    assert complaint(find_unlabeled, "empty", tmp_path, []).startswith(f"{tmp_path}/empty: no image in this folder")
    labeled = [Sample("pool/a.jpg", "a.png")]
    assert complaint(find_unlabeled, "pool", tmp_path, labeled).startswith("pool: no unlabelled image in it (1 images")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_list_of_wide_characters_is_refused_with_the_way_out(tmp_path, encoding):
    path = tmp_path / "list.txt"
    path.write_bytes("a.jpg a.png\n".encode(encoding))
    assert complaint(read_list, path) == f"{path}: not a readable list file: UTF-16 text; save it as UTF-8"
    path.write_bytes("b\u00e4ume.jpg".encode("latin-1"))
    assert complaint(read_list, path) == f"{path}: not a readable list file: no UTF-8 text; save it as UTF-8"


@pytest.mark.parametrize(
    "heading", ["image label", "Image\tMask", "filename", '"image_path","label_path"', "id;gt", "img_path,mask_path"]
)
def test_a_heading_is_named(tmp_path, heading):
    path = tmp_path / "list.txt"
    path.write_text(f"# made by hand\n{heading}\na.jpg a.png\n", encoding="utf-8")
    assert complaint(read_list, path, labels=False) == f"{path}:2: '{heading}' is a heading, no image: remove the line"


def test_backslashes_are_blamed_where_no_file_has_such_a_name(tmp_path):
    (tmp_path / "list.txt").write_text("images\\a.jpg\n", encoding="utf-8")
    samples = read_list(tmp_path / "list.txt", labels=False)
    assert "separate folders by /, not by backslashes" in complaint(check_samples, samples, DataSource(tmp_path), 3)
    save(tmp_path / "images\\a.jpg", photo())
    check_samples(samples, DataSource(tmp_path), 3)


def folder_with_all_kinds(root):
    """Two images, and what a walk must not take for an image; returns what it leaves out."""
    (root / "real/deep").mkdir(parents=True)
    for name in ("a.jpg", "real/b.PNG", "real/deep/._b.png", "real/.hidden.jpg", "real/notes.txt", "real/a.jpg.part"):
        (root / name).write_bytes(b"")
    for hidden in (".ipynb_checkpoints", "real/.cache/deep", "__MACOSX", "real/@eaDir/b.PNG"):
        (root / hidden).mkdir(parents=True)
        (root / hidden / "copy.jpg").write_bytes(b"")
    os.mkfifo(root / "pipe.jpg")  # opening it would wait for ever
    for link, target in (("real/up", ".."), ("real/deep/self", "."), ("real/deep/far", "../..")):
        (root / link).symlink_to(target)
    left_out = {"pipe.jpg", ".ipynb_checkpoints/", "__MACOSX/", "real/.cache/", "real/@eaDir/", "real/notes.txt"}
    left_out |= {"real/deep/._b.png", "real/.hidden.jpg", "real/a.jpg.part", "real/up/", "real/deep/self/"}
    return left_out | {"real/deep/far/"}


def test_a_walk_finds_images_and_nothing_hidden_nor_twice(tmp_path):
    expected, left_out = folder_with_all_kinds(tmp_path / "images"), []
    assert list(images_in(tmp_path / "images", tmp_path / "images", left_out)) == ["a.jpg", "real/b.PNG"]
    assert set(left_out) == expected and len(left_out) == len(expected)


def test_links_to_other_folders_are_followed(tmp_path):
    (tmp_path / "elsewhere/part").mkdir(parents=True)
    (tmp_path / "elsewhere/part/b.jpg").write_bytes(b"")
    (tmp_path / ".hidden/images").mkdir(parents=True)  # the folder itself may lie in a hidden one
    root = tmp_path / ".hidden/images"
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "a.jpg").symlink_to(tmp_path / "elsewhere/part/b.jpg")
    assert list(images_in(root, root)) == ["a.jpg", "link/part/b.jpg"]


def test_images_of_nested_folders_come_one_by_one_in_the_order_of_their_paths(tmp_path):
    names = ["b/z.jpg", "b.jpg", "b-c/a.jpg", "b/a/c.jpg", "b/a.jpg", "b/a0.jpg", "B.jpg", "ü/a.jpg", "b0.jpg", "a.jpg"]
    for name in names:
        (tmp_path / "pool" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pool" / name).write_bytes(b"")
    images = images_in(tmp_path / "pool", tmp_path)
    assert next(images) == "pool/B.jpg"  # no list of all
    assert ["pool/B.jpg", *images] == sorted(f"pool/{name}" for name in names)


def test_a_search_counts_the_images_that_it_finds_before_it_gives_the_first(tmp_path):
    told = []

    def progress(what, unit, items, total):
        told.append((what, unit, total))
        for count, item in enumerate(items, 1):
            told.append(count)
            yield item

    for name in ("pool/a.jpg", "pool/b.jpg", "pool/c/d.jpg", "pool/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images = images_in(tmp_path / "pool", tmp_path, progress=progress)
    assert next(images) == "pool/a.jpg"
    assert told == [(f"searching {tmp_path / 'pool'}", "images", None), 1, 2]
    assert len(find_unlabeled("pool", tmp_path, [], progress=progress)) == 3 and told[-1] == 3


def test_a_folder_that_cannot_be_read_is_named_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "images/locked").mkdir(parents=True)
    (tmp_path / "images/a.jpg").write_bytes(b"")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = complaint(lambda: list(images_in(tmp_path / "images", tmp_path)))
    assert message == f"{tmp_path}/images/locked: this folder cannot be read: Permission denied"
    assert complaint(list, walk(tmp_path / "images")) == message


def test_predictions_are_no_images_of_a_folder_and_only_files_that_may_be_one_are_asked(tmp_path):
    asked, left_out = [], []
    for name in ("a.jpg", "b.png", "out/b.png", "out/c.tif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def is_prediction(path):
        asked.append(path.name)
        return path.parent.name == "out"

    found = find_unlabeled(".", tmp_path, [], is_prediction=is_prediction, left_out=left_out)
    assert [sample.image for sample in found] == ["a.jpg", "b.png"]
    assert sorted(left_out) == ["notes.txt", "out/b.png", "out/c.tif"] and sorted(asked) == ["b.png", "b.png", "c.tif"]


@pytest.mark.parametrize("line", ['"images/a.jpg"', "images/a.jpg,", "images/a.jpg;", "'images/a.jpg'"])
def test_quotation_marks_and_commas_are_blamed_where_no_file_has_such_a_name(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"{line}\n", encoding="utf-8")
    samples = read_list(tmp_path / "list.txt", labels=False)
    assert "a list has no quotation marks, commas or semicolons" in complaint(
        check_samples, samples, DataSource(tmp_path), 3
    )


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("a/.b/c.jpg", True),
        ("a/._c.jpg", True),
        (".a/c.jpg", True),
        ("a/@eaDir/c.jpg", True),
        ("./a/../c.jpg", False),
        ("../c.jpg", False),
        ("/home/.me/c.jpg", False),
        ("/home/.c.jpg", True),
        ("a.b/c.jpg", False),
    ],
)
def test_a_path_is_hidden_where_a_part_of_it_is(path, hidden):
    assert is_hidden(path) is hidden


def test_the_quick_check_keeps_few_results_and_tells_of_its_progress(monkeypatch, tmp_path):
    """A result that was asked for takes memory until it is read."""
    begun = itertools.count(1)
    monkeypatch.setattr(check, "check_sample", lambda *_: (next(begun), (set(), None, False))[1])
    totals = []

    def progress(what, unit, checked, total):
        totals.append(total)
        yield next(checked)
        assert next(begun) <= 1100  # of 5000
        yield from checked

    check_samples([Sample(f"{i}.png", None) for i in range(5000)], DataSource(tmp_path), 3, progress=progress)
    assert totals == [5000] and next(begun) == 5002


@pytest.mark.parametrize("checked", [True, False])
def test_a_note_tells_once_that_images_of_16_bits_lose_their_lower_ones(data, checked):
    cfg = load_config(data.config, {"check_data": checked})
    samples = read_list(data.labeled)
    assert check_listed(cfg, [samples, samples]) == []
    (data.root / "images/deep.png").write_bytes(deep_png(np.full((32, 40, 3), 300)))
    deep = [sample._replace(image="images/deep.png") for sample in samples]
    (note,) = check_listed(cfg, [samples, deep, [], deep])
    assert note.startswith("note: images of 16 bits per channel, such as ") and "deep.png: the upper 8 are us" in note
