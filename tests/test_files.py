"""dataset/files.py: lists, folders, and every fault of images and labels, found before training and named."""

import io

import numpy as np
import pytest
from PIL import Image

from dataset import DataError
from dataset.check import check_samples
from dataset.files import read_image, read_label
from dataset.lists import Sample, find_unlabeled, list_digest, read_list

WIDTH, HEIGHT = 24, 20


def save(path, pixels, **options):
    """Save an array as an image, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def photo(channels=3, seed=0):
    """Noise, so that files are long enough to be cut anywhere."""
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)


def classes(*values):
    """A label that holds exactly `values`."""
    return np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))


@pytest.fixture
def three(tmp_path):
    """Three sound samples on disk."""
    for i in range(3):
        save(tmp_path / f"{i}.jpg", photo(seed=i))
        save(tmp_path / f"{i}.png", classes(0, 1, 2, 255))
    return [Sample(f"{i}.jpg", f"{i}.png") for i in range(3)]


def complaint(function, *args, **options):
    """The message of the DataError that a call raises: always one line."""
    with pytest.raises(DataError) as caught:
        function(*args, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


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


# --- labels and images ------------------------------------------------------------------------------------------------


def test_palette_labels_keep_their_indices(tmp_path):
    indices = classes(0, 3, 1, 255)
    label = Image.frombytes("P", (WIDTH, HEIGHT), indices.tobytes())
    label.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
    label.save(tmp_path / "label.png")
    decoded = read_label(tmp_path / "label.png")
    assert decoded.mode == "L"
    assert np.array_equal(np.asarray(decoded), indices)


def test_one_bit_labels_hold_0_and_1(tmp_path):
    indices = classes(0, 1, 1)
    Image.fromarray(indices.astype(bool)).save(tmp_path / "label.png")
    assert np.array_equal(np.asarray(read_label(tmp_path / "label.png")), indices)


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (photo(3), "RGB"),
        (photo(4), "RGBA"),
        (photo(2), "LA"),
        (classes(0, 1).astype(np.uint16), "I;16"),
    ],
)
def test_a_label_with_channels_or_16_bits_is_refused(tmp_path, pixels, mode):
    path = tmp_path / "label.png"
    save(path, pixels)
    assert complaint(read_label, path) == (
        f"{path}: the label is a {mode} image; expected one 8-bit channel of class indices"
    )


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_grey_and_transparent_images_are_read_as_rgb(tmp_path, channels):
    pixels = photo(channels)
    save(tmp_path / "image.png", pixels.squeeze())
    decoded = np.asarray(read_image(tmp_path / "image.png"))
    assert decoded.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(decoded, pixels[..., :3] if channels == 4 else np.repeat(pixels[..., :1], 3, axis=-1))


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", np.uint16), ("a.tif", np.uint16), ("a.tif", np.int32), ("a.tif", np.float32)]
)
def test_an_image_of_more_than_8_bits_is_refused_instead_of_turning_white(tmp_path, name, dtype):
    path = tmp_path / name
    save(path, np.full((HEIGHT, WIDTH), 999, dtype))
    for message in (complaint(read_image, path), complaint(check_samples, [Sample(name, None)], tmp_path, 3)):
        assert message.startswith(f"{path}: the image has more than 8 bits per pixel")


# --- the check of a whole list ----------------------------------------------------------------------------------------


def test_sound_samples_pass_the_check(tmp_path, three):
    check_samples(three, tmp_path, 3)
    check_samples([Sample(sample.image, None) for sample in three], tmp_path, 3)


def test_a_missing_data_root_is_named(tmp_path, three):
    message = complaint(check_samples, three, tmp_path / "nowhere", 3)
    assert message.startswith(f"{tmp_path}/nowhere: no such folder; data_root")


@pytest.mark.parametrize("name", ["1.jpg", "1.png"])
@pytest.mark.parametrize("content", [None, b"", b"no picture at all, but some bytes of text"])
def test_missing_and_unreadable_files_are_named(tmp_path, three, name, content):
    path = tmp_path / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    kind = "image" if name.endswith("jpg") else "label"
    fault = f"no such {kind} (listed paths are relative to data_root)" if content is None else f"unreadable {kind}"
    assert complaint(check_samples, three, tmp_path, 3).startswith(f"{path}: {fault}")


def test_an_image_and_a_label_of_different_size_are_both_named(tmp_path, three):
    save(tmp_path / "1.png", classes(0, 1)[:-1])
    assert complaint(check_samples, three, tmp_path, 3) == (
        f"{tmp_path}/1.png: the label is 24 x 19 pixels, its image {tmp_path}/1.jpg is 24 x 20"
    )


MASK = "it looks like a 0/255 mask"


@pytest.mark.parametrize(
    ("values", "nclass", "found", "hint"),
    [
        ((0, 1, 3, 255), 3, "0, 1, 3, 255", False),
        ((7,), 3, "7", False),
        ((0, 7), 3, "0, 7", False),  # a class too few is likelier than a mask
        ((0, 128), 2, "0, 128", True),
        ((0, 254), 2, "0, 254", True),
        (tuple(range(30)), 3, "0, 1, 2, 3, 4, 5, 6, 7, ... (30 values)", False),
    ],
)
def test_values_outside_the_classes_are_shown_with_those_allowed(tmp_path, three, values, nclass, found, hint):
    save(tmp_path / "1.png", classes(*values))
    for name in ("0.png", "2.png"):
        save(tmp_path / name, classes(0, 1))
    message = complaint(check_samples, three, tmp_path, nclass)
    assert message.startswith(
        f"{tmp_path}/1.png: label values found: {found}; allowed are 0..{nclass - 1}, and 255 for ignored pixels"
    )
    assert (MASK in message) == hint


@pytest.mark.parametrize("nclass", [2, 3, 21])
def test_labels_of_0_and_255_only_are_taken_for_masks_if_the_whole_list_is_so(tmp_path, three, nclass):
    for i in range(3):
        save(tmp_path / f"{i}.png", classes(0, 255))
    message = complaint(check_samples, three, tmp_path, nclass)
    assert message.startswith(f"{tmp_path}/0.png: values found over all 3 labels of the list: 0, 255")
    assert MASK in message and "store class indices" in message
    for i in range(3):  # one label with another class, anywhere in the list, says that 255 is meant
        save(tmp_path / f"{i}.png", classes(0, 1))
        check_samples(three, tmp_path, nclass)
        save(tmp_path / f"{i}.png", classes(0, 255))


def test_labels_of_255_only_are_refused_and_of_0_only_pass(tmp_path, three):
    for i in range(3):
        save(tmp_path / f"{i}.png", classes(255))
    assert "255" in complaint(check_samples, three, tmp_path, 2)
    for i in range(3):
        save(tmp_path / f"{i}.png", classes(0))
    check_samples(three, tmp_path, 2)


def test_the_first_fault_in_the_order_of_the_list_is_reported(tmp_path):
    samples = [Sample(f"{i}.jpg", f"{i}.png") for i in range(40)]
    for sample in samples:
        save(tmp_path / sample.image, photo())
        save(tmp_path / sample.label, classes(0, 1))
    for i in (11, 23, 37):
        save(tmp_path / f"{i}.png", classes(0, 9))
    (tmp_path / "39.jpg").unlink()
    for order in (samples, samples[::-1], samples[20:]):
        bad = next(s for s in order if s.image in {"11.jpg", "23.jpg", "37.jpg", "39.jpg"})
        name = bad.image if bad.image == "39.jpg" else bad.label
        assert complaint(check_samples, order, tmp_path, 3).startswith(f"{tmp_path}/{name}: ")


# --- truncated files --------------------------------------------------------------------------------------------------

FORMATS = [
    ("jpg", "JPEG", {}),
    ("jpg", "JPEG", {"progressive": True}),
    ("png", "PNG", {}),
    ("bmp", "BMP", {}),
    ("webp", "WEBP", {"lossless": True}),
    ("tif", "TIFF", {"compression": "tiff_lzw"}),
    ("ppm", "PPM", {}),
]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("suffix", "kind", "options"), FORMATS)
def test_an_image_cut_off_anywhere_is_refused(tmp_path, suffix, kind, options):
    buffer = io.BytesIO()
    Image.fromarray(photo()).save(buffer, kind, **options)
    data = buffer.getvalue()
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(data)
    check_samples([Sample(path.name, None)], tmp_path, 3)
    # A PNG's last 20 bytes hold no pixel.
    for length in [0, 1, 10, *range(20, len(data) - 20, 47), len(data) - (21 if kind == "PNG" else 1)]:
        path.write_bytes(data[:length])
        message = complaint(check_samples, [Sample(path.name, None)], tmp_path, 3)
        assert message.startswith(f"{path}: unreadable image, truncated or damaged")


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_a_label_cut_off_anywhere_is_refused(tmp_path, three, mode):
    pixels = np.random.default_rng(0).integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    data = buffer.getvalue()
    path = tmp_path / "1.png"
    for length in [0, 10, *range(20, len(data) - 24, 13), len(data) - 24]:
        path.write_bytes(data[:length])
        message = complaint(check_samples, three, tmp_path, 3)
        assert message.startswith(f"{path}: unreadable label, truncated or damaged")


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("png", "PNG")])
def test_whole_images_are_not_decoded(tmp_path, monkeypatch, suffix, kind):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(photo()).save(path, kind, quality=100)
    whole = path.read_bytes()

    def decode(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr("dataset.check.read_image", decode)
    check_samples([Sample(path.name, None)], tmp_path, 3)
    path.write_bytes(whole + b"\0" * 30)
    check_samples([Sample(path.name, None)], tmp_path, 3)
    path.write_bytes(whole[:-40])
    with pytest.raises(AssertionError, match="was decoded"):
        check_samples([Sample(path.name, None)], tmp_path, 3)


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("png", "PNG")])
def test_a_whole_image_with_data_behind_its_end_passes(tmp_path, suffix, kind):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(photo()).save(path, kind)
    path.write_bytes(path.read_bytes() + b"camera data " * 500)
    check_samples([Sample(path.name, None)], tmp_path, 3)


def test_reading_a_truncated_file_without_the_check_is_a_data_error_too(tmp_path, three):
    for name in ("0.jpg", "0.png"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-40])
    assert complaint(read_image, tmp_path / "0.jpg").startswith(f"{tmp_path}/0.jpg: unreadable image")
    assert complaint(read_label, tmp_path / "0.png").startswith(f"{tmp_path}/0.png: unreadable label")
    assert complaint(read_image, tmp_path / "no.jpg").startswith(f"{tmp_path}/no.jpg: no such image")
    assert complaint(read_label, tmp_path / "no.png").startswith(f"{tmp_path}/no.png: no such label")
