"""scripts/check_data.py: every kind of fault, made for real, is found, told with its file, and counted."""

import errno
import io
import itertools
import os
import re
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from dataset import DataError
from dataset.check import check_samples
from dataset.files import read_image
from dataset.lists import Sample, read_list
from dataset.prepare import audit as inspection
from dataset.prepare.audit import inspect_lists
from dataset.prepare.findings import NOTE, Finding, Findings
from dataset.prepare.jpeg import jpeg_complaint
from dataset.samples import Samples
from dataset.source import DataSource
from scripts import check_data
from tests.faults import (
    ERRORS,
    deep_png,
    image_damaged_inside,
    label_of_another_size,
    label_value_outside_the_classes,
    missing_image,
    missing_label,
    noise,
    oriented,
    overwrite,
    relist,
    replace_image,
    truncated_label,
)
from tests.helpers import make_dataset, run_here
from util.cli import parse_args
from util.errors import ConfigError
from util.plots import share_chart
from util.run import open_run
from util.visualize import percent


@pytest.fixture
def check(data, capsys):
    """Run the script in this process: (exit status, what it prints)."""

    def run(*further, workers=1):
        arguments = ["--config", str(data.config), "--labeled-id-path", str(data.labeled), "--workers", str(workers)]
        capsys.readouterr()
        try:
            check_data.main([*arguments, *map(str, further)])
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        return status, capsys.readouterr().out

    return run


def told(output):
    """{(level, kind): [lines]} of what the script prints."""
    found, lines = {}, None
    for line in output.splitlines():
        if head := re.fullmatch(r"(error|warning|note): (.*?)(?: \(\d+\))?", line):
            lines = found[head[1], head[2]] = []
        elif line.startswith("  ") and lines is not None:
            lines.append(line.strip())
        else:
            lines = None
    return found


# --- errors (tests.faults) ----------------------------


@pytest.mark.parametrize("fault", ERRORS, ids=lambda fault: fault.__name__)
def test_each_error_is_told_with_its_file_and_ends_with_status_1(data, check, fault):
    kind, path, fragment = fault(data)
    status, output = check()
    errors = {key: lines for key, lines in told(output).items() if key[0] == "error"}
    assert status == 1
    assert list(errors) == [("error", kind)]
    assert errors["error", kind][0].startswith(f"{path}: ") and fragment in errors["error", kind][0]
    assert "would stop" in output


def test_errors_are_those_that_stop_training(data, tmp_path):
    """What the check calls an error, training refuses with the same words, damage inside an image excepted."""
    for number, fault in enumerate(ERRORS):
        spoilt = make_dataset(tmp_path / str(number))
        kind, path, _ = fault(spoilt)
        lists = [read_list(spoilt.labeled), read_list(spoilt.unlabeled, labels=False), read_list(spoilt.val)]
        label_map = spoilt.settings().get("label_map")
        result = inspect_lists(*lists, DataSource(spoilt.root, label_map), ["a", "b", "c"], 32)
        found = result.findings.first("error", kind)
        with pytest.raises(DataError) as caught:
            if fault is image_damaged_inside:
                read_image(path)
            for samples in lists:
                check_samples(samples, DataSource(spoilt.root, label_map), 3)
        assert found == [str(caught.value)]


# --- warnings and notes: each returns (level, part of the kind, lines) ------------------------------------------------


def labelled_and_validation_overlap(data):
    data.val.write_text(data.val.read_text() + "./images//labeled2.jpg labels/labeled2.png\n", encoding="utf-8")
    return "warning", "validation images that are among the labelled ones too", ["./images//labeled2.jpg"]


def unlabelled_and_validation_overlap(data):
    data.unlabeled.write_text(data.unlabeled.read_text() + "images/val1.jpg\n", encoding="utf-8")
    return "warning", "validation images that are among the unlabelled ones too", ["images/val1.jpg"]


def image_listed_twice(data):
    data.unlabeled.write_text(data.unlabeled.read_text() + "./images/unlabeled0.jpg\n", encoding="utf-8")
    path = data.root / "images/unlabeled0.jpg"
    return "warning", "images more than once in a list", [f"{path}: 2 times in the unlabelled list"]


def image_listed_with_two_labels(data):
    data.labeled.write_text(data.labeled.read_text() + "images/labeled0.jpg labels/labeled1.png\n", encoding="utf-8")
    path = data.root / "images/labeled0.jpg"
    line = f"{path}: 2 times in the labelled list, with different labels"
    return "warning", "images more than once in a list", [line]


def hidden_image_listed(data):
    (data.root / "images/.ipynb_checkpoints").mkdir()
    Image.fromarray(noise()).save(data.root / "images/.ipynb_checkpoints/new.png")
    relist(data, data.unlabeled, "images/unlabeled0.jpg", "images/.ipynb_checkpoints/new.png")
    line = "images/.ipynb_checkpoints/new.png"
    return "warning", "unlabelled images that are hidden or in a hidden folder", [line]


def copies(data):
    first, second = data.root / "images/unlabeled1.jpg", data.root / "images/unlabeled4.jpg"
    second.write_bytes(first.read_bytes())
    line = f"{first} (unlabelled) = {second} (unlabelled)"
    return "warning", "byte-identical images under different names", [line]


def copy_of_a_validation_image(data):
    first, second = data.root / "images/unlabeled1.jpg", data.root / "images/val0.jpg"
    first.write_bytes(second.read_bytes())
    line = f"{first} (unlabelled) = {second} (validation)"
    return "warning", "training images that are byte-identical to a validation image", [line]


def cmyk(data):
    path = replace_image(data, Image.fromarray(noise(channels=4), "CMYK"), "jpg")
    return "warning", "CMYK images: converted to RGB by a plain formula", [str(path)]


def transparent(data):
    path = replace_image(data, Image.fromarray(noise(channels=4), "RGBA"))
    return "warning", "images with transparent pixels: transparency is dropped", [str(path)]


def transparent_palette(data):
    indexed = Image.fromarray(noise()).convert("P")
    path = replace_image(data, indexed, transparency=indexed.getpixel((3, 3)))
    return "warning", "images with transparent pixels: transparency is dropped", [str(path)]


def sixteen_bit_colour(data):
    path = replace_image(data, Image.fromarray(noise()))
    path.write_bytes(deep_png(np.random.default_rng(0).integers(0, 2**16, (32, 40, 3))))
    return "warning", "images of 16 bits per channel: the upper 8 are used", [str(path)]


def rotated_jpeg(data):
    path = replace_image(data, Image.fromarray(noise()), "jpg", exif=oriented(3))
    return "warning", "images with an EXIF orientation: used as they are stored", [f"{path}: orientation 3"]


def rotated_png(data):
    path = replace_image(data, Image.fromarray(noise()), exif=oriented(6))
    return "warning", "images with an EXIF orientation: used as they are stored", [f"{path}: orientation 6"]


def several_frames(data):
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    path = replace_image(data, frames[0], "tif", save_all=True, append_images=frames[1:])
    return "warning", "files of several pictures: the first is used", [str(path)]


def jpeg_damaged_inside(data):
    path = replace_image(data, Image.fromarray(noise()), "jpg", quality=90)
    overwrite(path, part=0.6, count=200, value=b"\x12")
    read_image(path)  # nothing is raised
    return "warning", "images damaged inside: read without an error, some of their pixels wrong", [f"{path}: Corrupt"]


def jpeg_label(data):
    Image.fromarray(np.full((32, 40), 1, np.uint8)).save(data.root / "labels/val0.jpg")
    relist(data, data.val, "labels/val0.png", "labels/val0.jpg")
    return "warning", "labels in JPEG files", [str(data.root / "labels/val0.jpg")]


def label_without_a_class(data):
    path = data.root / "labels/labeled3.png"
    Image.fromarray(np.full((32, 40), 255, np.uint8)).save(path)
    return "warning", "labels of ignored pixels alone", [str(path)]


def class_absent_from_the_labels(data):
    data.configure(classes=["a", "b", "c", "rare"])
    return "warning", "classes without a pixel in the labelled list: never learnt", ["3 rare"]


def class_absent_from_validation(data):
    for path in (data.root / "labels").glob("val*.png"):
        Image.fromarray(np.minimum(np.array(Image.open(path)), 1)).save(path)
    return "note", "classes without a pixel in the validation list: not part of mIoU", ["2 class 2"]


def grey(data):
    path = replace_image(data, Image.fromarray(noise()).convert("L"))
    return "note", "grey images: read as RGB with three equal channels", [str(path)]


def palette(data):
    path = replace_image(data, Image.fromarray(noise()).convert("P"))
    return "note", "palette images: read as the colours of their palette", [str(path)]


def opaque(data):
    pixels = noise(channels=4)
    pixels[..., 3] = 255
    return (
        "note",
        "images with an alpha channel, opaque everywhere: it is dropped",
        [str(replace_image(data, Image.fromarray(pixels, "RGBA")))],
    )


def turned_tiff(data):
    path = replace_image(data, Image.fromarray(noise(size=(32, 40))), "tif", exif=oriented(6))
    return "note", "images with an orientation tag: turned as it says", [f"{path}: orientation 6"]


def smaller_than_the_crop(data):
    data.configure(crop_size=64)
    return "note", "training images smaller than the crop", ["10 of 10 have a side shorter than 64 pixels"]


OTHERS = [
    labelled_and_validation_overlap,
    unlabelled_and_validation_overlap,
    image_listed_twice,
    image_listed_with_two_labels,
    hidden_image_listed,
    copies,
    copy_of_a_validation_image,
    cmyk,
    transparent,
    transparent_palette,
    sixteen_bit_colour,
    rotated_jpeg,
    rotated_png,
    several_frames,
    jpeg_damaged_inside,
    jpeg_label,
    label_without_a_class,
    class_absent_from_the_labels,
    class_absent_from_validation,
    grey,
    palette,
    opaque,
    turned_tiff,
    smaller_than_the_crop,
]


@pytest.mark.parametrize("fault", OTHERS, ids=lambda fault: fault.__name__)
def test_each_warning_and_note_is_told_and_only_strict_makes_a_warning_count(data, check, fault):
    level, kind, lines = fault(data)
    status, output = check()
    found = told(output)
    matching = [shown for (_, heading), shown in found.items() if heading.startswith(kind)]
    assert [key[0] for key in found if key[1].startswith(kind)] == [level]
    assert len(matching[0]) == len(lines)
    assert all(shown.startswith(line) for shown, line in zip(matching[0], lines, strict=True))
    assert status == 0 and "error" not in {key[0] for key in found}
    strict, output = check("--strict")
    assert strict == ("warning" in {key[0] for key in found}) and ("refused by --strict" in output) == bool(strict)


def test_sound_data_give_nothing_to_report(check):
    status, output = check("--strict")
    assert status == 0 and "nothing to report" in output and told(output) == {}
    assert "0 errors, 0 warnings, 0 notes" in output


# --- what is said about an image is what read_image does --------------------------------------------------------------


def assert_read_as(path, expected):
    assert np.array_equal(np.asarray(read_image(path)), expected)


def test_each_image_is_treated_as_the_report_says(data):
    """The independent side of every `how it is treated`: the pixels that training gets."""
    pixels = noise()
    grey(data)
    values = np.asarray(Image.fromarray(pixels).convert("L"))
    assert_read_as(data.root / "images/labeled0.png", np.stack([values] * 3, -1))
    path = data.root / "a.png"
    indexed = Image.fromarray(pixels).convert("P")
    indexed.save(path)
    table = np.array(indexed.getpalette()).reshape(-1, 3)
    assert_read_as(path, table[np.asarray(indexed)])
    indexed.save(path, transparency=3)
    assert_read_as(path, table[np.asarray(indexed)])
    Image.fromarray(noise(channels=4), "RGBA").save(path)
    assert_read_as(path, noise(channels=4)[..., :3])
    deep = np.random.default_rng(0).integers(0, 2**16, (32, 40, 3))
    path.write_bytes(deep_png(deep))
    assert_read_as(path, (deep // 256).astype(np.uint8))
    inks = noise(channels=4).astype(int)
    Image.fromarray(inks.astype(np.uint8), "CMYK").save(data.root / "a.tif")
    plain = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    assert np.abs(np.asarray(read_image(data.root / "a.tif")) - plain).max() <= 1
    for number in range(2, 9):
        Image.fromarray(pixels).save(path, exif=oriented(number))
        assert_read_as(path, pixels)
        Image.fromarray(pixels).save(data.root / "a.jpg", exif=oriented(number))
        assert read_image(data.root / "a.jpg").size == (40, 32)
    Image.fromarray(pixels).save(data.root / "a.tif", exif=oriented(6))
    assert_read_as(data.root / "a.tif", np.rot90(pixels, -1))
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    frames[0].save(data.root / "a.tif", save_all=True, append_images=frames[1:])
    assert_read_as(data.root / "a.tif", noise(seed=0))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_label_drawn_on_the_turned_image_is_explained_here_and_before_training(data, check, suffix):
    path = replace_image(data, Image.fromarray(noise()), suffix, exif=oriented(8))
    label = data.root / "labels/labeled0.png"
    Image.open(label).transpose(Image.Transpose.ROTATE_90).save(label)
    found = told(check()[1])["error", "labels of another size than their image"]
    with pytest.raises(DataError) as caught:
        check_samples([Sample(f"images/{path.name}", "labels/labeled0.png")], DataSource(data.root), 3)
    assert found == [str(caught.value)]
    assert "its EXIF orientation 8 turns it in a viewer, but not here" in found[0]


def test_a_label_of_another_size_is_not_blamed_on_an_orientation_that_does_not_explain_it(data, check):
    replace_image(data, Image.fromarray(noise()), "jpg", exif=oriented(8))
    Image.new("L", (20, 16)).save(data.root / "labels/labeled0.png")
    assert "EXIF" not in told(check()[1])["error", "labels of another size than their image"][0]


def test_an_orientation_that_does_not_exist_is_none(data, check):
    replace_image(data, Image.fromarray(noise()), "jpg", exif=oriented(0))
    assert told(check("--strict")[1]) == {}


def test_broken_exif_data_are_no_fault(data, check):
    replace_image(data, Image.fromarray(noise()), "jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"x" * 40)
    status, output = check("--strict")
    assert status == 0 and told(output) == {}


# --- damage that decoders pass over -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchvision")
def test_damage_inside_jpegs_is_mostly_found_and_whole_ones_never_accused():
    found = 0
    for seed in range(20):
        buffer = io.BytesIO()
        rough = Image.fromarray(noise((10, 8), seed=seed)).resize((160, 120), Image.Resampling.BICUBIC)
        rough.save(buffer, "JPEG", quality=90, progressive=seed % 2)
        content = bytearray(buffer.getvalue())
        assert jpeg_complaint(bytes(content)) is None
        content[len(content) // 2 : len(content) // 2 + 256] = bytes(256)
        found += jpeg_complaint(bytes(content)) is not None
    assert found >= 12


def test_without_a_decoder_that_complains_damage_inside_is_passed_over(data, check, monkeypatch):
    jpeg_damaged_inside(data)
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert told(check("--strict")[1]) == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchvision")
def test_catching_the_complaint_leaves_standard_error_in_place(capfd):
    os.write(2, b"before ")
    buffer = io.BytesIO()
    Image.fromarray(noise()).save(buffer, "JPEG")
    assert jpeg_complaint(buffer.getvalue()[:-200] + b"\xff\xd9") is not None
    assert jpeg_complaint(b"\xff\xd8 no picture") is None
    assert jpeg_complaint(b"no JPEG at all") is None
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"


# --- the whole report -------------------------------------------------------------------------------------------------


def test_all_faults_are_listed_not_only_the_first(data, check, tmp_path):
    missing = [data.root / f"images/unlabeled{i}.jpg" for i in range(6)]
    for path in missing:
        path.unlink()
    kinds = {"missing images"}
    for fault in (label_of_another_size, label_value_outside_the_classes, truncated_label):
        kinds.add(fault(make_dataset(data.root / "other"))[0])
    for fault in (label_value_outside_the_classes, image_damaged_inside, missing_label):
        kinds.add(fault(data)[0])
    relist(data, data.labeled, "labels/labeled1.png", "other/labels/labeled1.png")
    status, output = check("--show", 2, "--output", tmp_path / "out/deep")
    shown = {kind: lines for (level, kind), lines in told(output).items() if level == "error"}
    assert status == 1
    assert shown["missing images"][:2] == [
        f"{path}: no such image (listed paths are relative to data_root)" for path in missing[:2]
    ]
    assert shown["missing images"][2:] == ["... and 4 more"]
    assert set(shown) == kinds - {"labels of another size than their image"}
    report = (tmp_path / "out/deep/report.txt").read_text(encoding="utf-8")
    assert all(f"{path}: no such image" in report for path in missing)
    assert report.index("tiny: ") < report.index("error: missing images (6)") < report.index("share of pixels")
    assert report.endswith("training would stop at the first error\n")
    assert "error: missing images (6)" in output


def test_a_report_is_replaced_as_a_whole_and_leaves_nothing_else(data, check, tmp_path):
    out = tmp_path / "out"
    for fault in (None, missing_image):
        if fault:
            fault(data)
        check("--output", out)
        assert sorted(path.name for path in out.iterdir()) == ["classes.png", "report.txt"]
        assert ("missing images" in (out / "report.txt").read_text(encoding="utf-8")) == bool(fault)
    assert Image.open(out / "classes.png").format == "PNG"


def test_neither_an_image_nor_a_list_nor_a_strangers_file_becomes_a_report(data, check, tmp_path):
    (data.root / "images/val0.jpg").rename(data.root / "images/classes.png")
    relist(data, data.val, "images/val0.jpg", "images/classes.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/report.txt").write_text("a year's work")
    before = (data.root / "images/classes.png").read_bytes()
    with pytest.raises(ConfigError, match=r"classes\.png: is the input \S*classes\.png, which would be overwritten"):
        check("--output", data.root / "images")
    with pytest.raises(ConfigError, match=r"report\.txt: exists, and these tools did not write it"):
        check("--output", tmp_path / "mine")
    assert (data.root / "images/classes.png").read_bytes() == before
    assert (tmp_path / "mine/report.txt").read_text() == "a year's work"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_file_name_that_is_no_text_is_told_all_the_same(data, check, tmp_path):
    folder = data.root / "pool"
    folder.mkdir()
    (folder / os.fsdecode(b"b\xe4r.jpg")).write_bytes(b"no picture")
    status, output = check("--unlabeled-id-path", "pool", "--output", tmp_path / "out")
    assert status == 1 and "b\\udce4r.jpg: unreadable image" in output
    assert "b\\udce4r.jpg: unreadable image" in (tmp_path / "out/report.txt").read_text(encoding="utf-8")


def test_processes_find_what_one_finds(data, check):
    for fault in (missing_image, label_of_another_size, cmyk, image_listed_twice, jpeg_label):
        fault(data)
    assert check(workers=1) == check(workers=2)


def test_only_validation_images_are_checked_without_other_lists(data, capsys):
    data.configure(unlabeled_id_path=None)
    missing_image(data)
    check_data.main(["--config", str(data.config), "--workers", "1"])
    output = capsys.readouterr().out
    assert output.startswith("tiny: 0 labelled, 0 unlabelled and 2 validation images")
    assert "labelled   images" not in output


def test_the_check_keeps_few_bytes_of_each_sample(tmp_path, monkeypatch):
    numbers = itertools.count(1)

    def look(*_, **__):
        return inspection.Look([], next(numbers).to_bytes(16, "little"), (40, 32), np.ones(256, np.int64))

    monkeypatch.setattr(inspection, "inspect_sample", look)
    samples = Samples.of(Sample(f"{k}.jpg", f"{k}.png") for k in range(5000))
    tracemalloc.start()
    found = inspect_lists([], [], samples, DataSource(tmp_path), ["a"], 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * len(samples)
    assert found.pixels["validation"].tolist() == [5000] * 256


def test_very_many_findings_take_a_few_bytes_each_and_a_report_has_all_of_them_once(tmp_path, monkeypatch):
    def look(sample, **_):
        return inspection.Look([Finding(NOTE, "grey", f"{tmp_path}/images/{sample.image}")], None, None, None)

    monkeypatch.setattr(inspection, "inspect_sample", look)
    samples = Samples.of(Sample(f"{k}\udce4.jpg", None) for k in range(2000))
    for findings in (Findings(2), Findings(2, tmp_path)):
        tracemalloc.start()
        inspect_lists([], samples, samples, DataSource(tmp_path), ["a"], 32, findings=findings)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 280 * 4000  # with an object for each it is over 400
        assert findings.count(NOTE, "grey") == 2000
        assert findings.first(NOTE, "grey") == [f"{tmp_path}/images/{k}\udce4.jpg" for k in range(2)]
    assert list(findings.messages(NOTE, "grey")) == [f"{tmp_path}/images/{k}\udce4.jpg" for k in range(2000)]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_too_full_for_the_findings_is_named(monkeypatch, tmp_path):
    def refuse(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(DataError, match=f"^{tmp_path}: findings cannot be written to this folder: No space left"):
        Findings(2, tmp_path).add([Finding(NOTE, "grey", "a.jpg")])


def test_what_is_left_out_of_a_folder_of_unlabelled_images_is_counted(data, check):
    (data.root / "images/notes.txt").write_text("mine")
    output = check("--unlabeled-id-path", "images")[1]
    assert "\nnote: other files in images were left out: 1, such as images/notes.txt\n" in output


def test_progress_is_shown_of_all_that_may_take_long(data, check, monkeypatch):
    shown = []

    def progress(what, unit, items, total):
        shown.append((what, unit, total))
        return items

    monkeypatch.setattr(check_data, "show_progress", progress)
    check("--unlabeled-id-path", "images", "--channel-statistics")
    assert shown == [
        (f"reading {data.labeled}", "blocks", 1),
        (f"reading {data.val}", "blocks", 1),
        (f"searching {data.root / 'images'}", "images", None),
        ("checking data", "samples", 14),
        ("channel statistics", "images", 12),
    ]


def die(*_, **__):
    os._exit(9)


def test_a_killed_process_is_one_error(data, check, monkeypatch):
    monkeypatch.setattr(inspection, "inspect_sample", die)
    with pytest.raises(DataError, match="a checking process was killed"):
        check(workers=2)


def test_processes_that_cannot_be_started_and_a_missing_temporary_folder_are_one_error(data, check, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.ProcessPoolExecutor.__init__", refuse)
        with pytest.raises(
            DataError, match=r"^checking processes: they cannot be started: .*Read-only.*; --workers 1 n"
        ):
            check(workers=2)
        assert check(workers=1)[0] == 0
    monkeypatch.setattr("tempfile.gettempdir", refuse)
    with pytest.raises(DataError, match=r"^no folder for temporary files can be written to: set TMPDIR to one"):
        check()


# --- class frequencies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_map", [None, {0: 2, 1: 0, 2: 0, 255: 1}, {1: 255}])
def test_the_table_is_what_counting_each_pixel_gives(tmp_path, capsys, label_map):
    data = make_dataset(tmp_path / "data", labeled=3, val=2, nclass=4)
    data.configure(label_map=label_map, classes=["a", "b", "c", "d", "none"])
    first = data.root / "labels/labeled0.png"
    label = np.array(Image.open(first))
    label[label == 3] = 2
    label[4, 7] = 1
    Image.fromarray(label).save(first)
    check_data.main(["--config", str(data.config), "--labeled-id-path", str(data.labeled), "--workers", "1"])
    rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == 5}
    expected = {}
    for path in (data.labeled, data.val):
        pixels, images = [0] * 256, [0] * 256
        for _, name in read_list(path):
            values = [(label_map or {}).get(v, v) for v in Image.open(data.root / name).get_flattened_data()]
            for value in values:
                pixels[value] += 1
            for value in set(values):
                images[value] += 1
        valid = sum(pixels[:5])
        for index, name in enumerate(["a", "b", "c", "d", "none"]):
            cells = [f"{100 * pixels[index] / valid:.2f} %" if pixels[index] else "absent", str(images[index])]
            expected[f"{index} {name}"] = expected.get(f"{index} {name}", []) + cells
        share = f"{100 * pixels[255] / sum(pixels):.2f} %" if pixels[255] else "absent"
        expected["ignored (of all)"] = expected.get("ignored (of all)", []) + [share, str(images[255])]
    assert {key: table[key] for key in expected} == expected


def test_a_rare_class_does_not_look_absent():
    assert [percent(share) for share in (0, 1e-9, 0.00004, 0.00006, 0.5, 1)] == [
        "absent", "< 0.01 %", "< 0.01 %", "0.01 %", "50.00 %", "100.00 %"
    ]  # fmt: skip


def test_a_bar_is_as_long_as_the_logarithm_of_its_share():
    chart = np.asarray(share_chart(["a", "b", "Grün 木", "d"], {"labelled": [1, 0.01, 0, 1e-7]}))
    blue = (chart == (0, 114, 178)).all(-1)[40:].sum(1)  # below the legend
    lengths = sorted({int(length) for length in blue if length})
    assert len(lengths) == 2 and lengths[0] / lengths[1] == pytest.approx(3 / 5, abs=0.01)  # of five decades


def test_without_matplotlib_the_report_is_written_and_the_chart_told_of(data, tmp_path, check, monkeypatch):
    monkeypatch.setattr(check_data, "has_matplotlib", lambda: False)
    status, out = check("--output", tmp_path / "out")
    assert status == 0 and "classes.png is not drawn: it needs matplotlib: pip install" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.txt"]


# --- as a command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "further", "status"),
    [
        (None, [], 0),
        (missing_label, ["--workers", "2"], 1),
        (None, ["--set", "val_id_path=no/such.txt"], 2),
    ],
    ids=["sound", "fault", "usage"],
)
def test_the_exit_status_is_for_scripts(data, tmp_path, fault, further, status):
    if fault:
        fault(data)
    arguments = ["--config", data.config, "--labeled-id-path", data.labeled, "--output", tmp_path / "out"]
    ended = run_here("scripts.check_data", *arguments, *further)
    assert ended.returncode == status
    if status == 2:
        assert ended.stderr == "error: no/such.txt: no such list file\n" and ended.stdout == ""
    else:
        assert ended.stderr == "" and "3 classes" in ended.stdout
        assert (tmp_path / "out/report.txt").is_file()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--show", "-1"], "--show -1: must be at least 0"),
        (["--output", "{root}/config.yaml"], "config.yaml is no folder"),
    ],
)
def test_wrong_arguments_are_one_line(data, arguments, fragment):
    arguments = [argument.format(root=data.root) for argument in arguments]
    with pytest.raises(ConfigError, match=re.escape(fragment)):
        check_data.main(["--config", str(data.config), *arguments])


# --- the cheap part, before training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["true", "false"])
def test_training_warns_of_validation_images_among_its_own(data, tmp_path, switch):
    labelled_and_validation_overlap(data)
    unlabelled_and_validation_overlap(data)
    arguments = [*data.arguments(tmp_path / "run"), "--set", f"check_data={switch}"]
    with open_run("unimatch", parse_args("unimatch", arguments)):
        pass
    log = (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert log.count("warning: ") == (2 if switch == "true" else 0)
    if switch == "true":
        assert "1 of 3 validation images are also among the labelled ones, such as ./images//labeled2.jpg" in log
        assert "1 of 3 validation images are also among the unlabelled ones, such as images/val1.jpg" in log


def test_training_on_lists_apart_warns_of_nothing(data, tmp_path):
    with open_run("unimatch", parse_args("unimatch", data.arguments(tmp_path / "run"))):
        pass
    assert "warning: " not in (tmp_path / "run/train.log").read_text(encoding="utf-8")
