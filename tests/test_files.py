"""dataset/files.py and dataset/check.py: every fault of images and labels, found before training and named."""

import functools
import io

import numpy as np
import pytest
from PIL import Image

from dataset.check import check_samples
from dataset.files import decode_label, open_label, read_image, read_indices, read_label
from dataset.lists import Sample
from dataset.source import DataSource
from tests.faults import grey_png
from tests.helpers import complaint, photo, save

WIDTH, HEIGHT = 24, 20


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


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_labels_of_few_bits_hold_the_stored_values(tmp_path, bits):
    values = np.resize(np.arange(2**bits, dtype=np.uint8), (16, 23))
    (tmp_path / "label.png").write_bytes(grey_png(values, bits))
    assert np.array_equal(read_indices(tmp_path / "label.png"), values)
    assert read_indices(tmp_path / "label.png").dtype == np.uint8


@pytest.mark.parametrize("rows", [1, 300, 999])
def test_a_large_grey_label_of_few_bits_is_read_as_far_as_needed(tmp_path, rows):
    values = np.resize(np.arange(16, dtype=np.uint8), (1000, 525))
    (tmp_path / "label.png").write_bytes(grey_png(values, 4))
    with open_label(tmp_path / "label.png") as label:
        assert np.array_equal(decode_label(label, rows)[:rows], values[:rows])


def two_bits(path, values):
    path.write_bytes(grey_png(values, 2))


def palette_of(*colours):
    def write(path, values):
        label = Image.fromarray(values, "P")
        label.putpalette(sum(colours, ()))
        label.save(path)

    return write


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize(
    ("write", "values", "nclass", "label_map", "refused"),
    [
        (two_bits, [0, 3], 21, None, True),  # 8 bits: 0 and 255
        (two_bits, [3], 21, None, True),
        (two_bits, [0, 3], 4, None, False),  # as many classes as values
        (two_bits, [0, 1, 2], 21, None, False),
        (two_bits, [0, 1, 3], 21, None, False),  # 8 bits: 85, no class, and 255
        (two_bits, [0, 1, 3], 150, None, True),
        (two_bits, [0, 3], 21, {255: 1, 3: 1}, False),  # either way class 1
        (two_bits, [0, 3], 21, {255: 1}, True),
        (palette_of(BLACK, WHITE), [0, 1], 21, None, True),
        (palette_of(WHITE, BLACK), [0, 1], 21, None, True),
        (palette_of(BLACK, WHITE), [0, 1], 2, None, False),
        (palette_of(BLACK, RED), [0, 1], 21, None, False),
        (palette_of(BLACK, WHITE, RED), [0, 1], 21, None, False),
    ],
)
def test_a_label_is_refused_where_white_may_be_a_class_or_ignored(
    tmp_path, three, write, values, nclass, label_map, refused
):
    write(tmp_path / three[1].label, np.resize(np.uint8(values), (HEIGHT, WIDTH)))
    check = functools.partial(check_samples, three[1:2], DataSource(tmp_path, label_map), nclass)
    if refused:
        assert "may mean a class or 255 (ignored): store 8 bits per pixel" in complaint(check)
    else:
        check()


def test_one_bit_labels_of_two_classes_are_refused_beside_labels_that_have_255(tmp_path, three):
    (tmp_path / three[2].label).write_bytes(grey_png(classes(0, 1), 1))
    for label, values in ((three[0].label, (0, 1)), (three[1].label, (0, 1))):
        Image.fromarray(classes(*values)).save(tmp_path / label)
    check_samples(three, DataSource(tmp_path), 2)
    Image.fromarray(classes(0, 1, 255)).save(tmp_path / three[0].label)
    message = complaint(check_samples, three, DataSource(tmp_path), 2)
    assert message.startswith(f"{tmp_path / three[2].label}: ") and "store 8 bits" in message


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_labels_of_16_bits_are_read_where_their_values_fit(tmp_path, suffix):
    path = tmp_path / f"label.{suffix}"
    Image.fromarray(classes(0, 1, 254, 255).astype(np.uint16)).save(path)
    assert np.array_equal(read_indices(path), classes(0, 1, 254, 255))
    Image.fromarray(np.full((HEIGHT, WIDTH), 256, np.uint16)).save(path)
    assert complaint(read_indices, path).startswith(f"{path}: the label has the value 256;")


@pytest.mark.parametrize("kind", ["1 bit", "8 bits", "8 bits, compressed"])
def test_a_tiff_label_whose_0_is_white_is_refused_since_it_would_be_read_inverted(tmp_path, kind):
    path, options = tmp_path / "label.tif", {"compression": "tiff_lzw"} if "compressed" in kind else {}
    image = Image.fromarray(classes(0, 1))
    image = image.point(lambda value: 255 * value).convert("1") if kind == "1 bit" else image
    image.save(path, **options)
    assert np.array_equal(read_indices(path), classes(0, 1))
    image.save(path, tiffinfo={262: 0}, **options)
    with Image.open(path) as label:
        assert label.tag_v2[262] == 0
    for function in (read_label, read_indices):
        line = complaint(function, path)
        assert line.startswith(f"{path}: a TIFF file whose value 0 is white") and "PhotometricInterpretation 1" in line


@pytest.mark.parametrize(("pixels", "mode"), [(photo(3), "RGB"), (photo(4), "RGBA"), (photo(2), "LA")])
def test_a_label_with_channels_is_refused(tmp_path, pixels, mode):
    path = tmp_path / "label.png"
    save(path, pixels)
    assert complaint(read_label, path).startswith(
        f"{path}: the label is a {mode} image; expected one channel of class indices"
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
    for message in (
        complaint(read_image, path),
        complaint(check_samples, [Sample(name, None)], DataSource(tmp_path), 3),
    ):
        assert message.startswith(f"{path}: the image has more than 8 bits per pixel")


# --- the check of a whole list ----------------------------------------------------------------------------------------


def test_sound_samples_pass_the_check(tmp_path, three):
    check_samples(three, DataSource(tmp_path), 3)
    check_samples([Sample(sample.image, None) for sample in three], DataSource(tmp_path), 3)


def test_a_missing_data_root_is_named(tmp_path, three):
    message = complaint(check_samples, three, DataSource(tmp_path / "nowhere"), 3)
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
    assert complaint(check_samples, three, DataSource(tmp_path), 3).startswith(f"{path}: {fault}")


def test_an_image_and_a_label_of_different_size_are_both_named(tmp_path, three):
    save(tmp_path / "1.png", classes(0, 1)[:-1])
    assert complaint(check_samples, three, DataSource(tmp_path), 3) == (
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
    message = complaint(check_samples, three, DataSource(tmp_path), nclass)
    assert message.startswith(
        f"{tmp_path}/1.png: label values found: {found}; allowed are 0..{nclass - 1}, and 255 for ignored pixels"
    )
    assert (MASK in message) == hint


@pytest.mark.parametrize("nclass", [2, 3, 21])
def test_labels_of_0_and_255_only_are_taken_for_masks_if_the_whole_list_is_so(tmp_path, three, nclass):
    for i in range(3):
        save(tmp_path / f"{i}.png", classes(0, 255))
    message = complaint(check_samples, three, DataSource(tmp_path), nclass)
    assert message.startswith(f"{tmp_path}/0.png: values found over all 3 labels of the list: 0, 255")
    assert MASK in message and "store class indices" in message
    for i in range(3):  # one label with another class, anywhere in the list, says that 255 is meant
        save(tmp_path / f"{i}.png", classes(0, 1))
        check_samples(three, DataSource(tmp_path), nclass)
        save(tmp_path / f"{i}.png", classes(0, 255))


def test_labels_of_255_only_are_refused_and_of_0_only_pass(tmp_path, three):
    for i in range(3):
        save(tmp_path / f"{i}.png", classes(255))
    assert "255" in complaint(check_samples, three, DataSource(tmp_path), 2)
    for i in range(3):
        save(tmp_path / f"{i}.png", classes(0))
    check_samples(three, DataSource(tmp_path), 2)


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
        assert complaint(check_samples, order, DataSource(tmp_path), 3).startswith(f"{tmp_path}/{name}: ")


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
    check_samples([Sample(path.name, None)], DataSource(tmp_path), 3)
    # A PNG's last 20 bytes hold no pixel.
    for length in [0, 1, 10, *range(20, len(data) - 20, 47), len(data) - (21 if kind == "PNG" else 1)]:
        path.write_bytes(data[:length])
        message = complaint(check_samples, [Sample(path.name, None)], DataSource(tmp_path), 3)
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
        message = complaint(check_samples, three, DataSource(tmp_path), 3)
        assert message.startswith(f"{path}: unreadable label, truncated or damaged")


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("png", "PNG")])
def test_whole_images_are_not_decoded(tmp_path, monkeypatch, suffix, kind):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(photo()).save(path, kind, quality=100)
    whole = path.read_bytes()

    def decode(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr("dataset.check.read_image", decode)
    check_samples([Sample(path.name, None)], DataSource(tmp_path), 3)
    path.write_bytes(whole + b"\0" * 30)
    check_samples([Sample(path.name, None)], DataSource(tmp_path), 3)
    path.write_bytes(whole[:-40])
    with pytest.raises(AssertionError, match="was decoded"):
        check_samples([Sample(path.name, None)], DataSource(tmp_path), 3)


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("png", "PNG")])
def test_a_whole_image_with_data_behind_its_end_passes(tmp_path, suffix, kind):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(photo()).save(path, kind)
    path.write_bytes(path.read_bytes() + b"camera data " * 500)
    check_samples([Sample(path.name, None)], DataSource(tmp_path), 3)


def test_reading_a_truncated_file_without_the_check_is_a_data_error_too(tmp_path, three):
    for name in ("0.jpg", "0.png"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-40])
    assert complaint(read_image, tmp_path / "0.jpg").startswith(f"{tmp_path}/0.jpg: unreadable image")
    assert complaint(read_label, tmp_path / "0.png").startswith(f"{tmp_path}/0.png: unreadable label")
    assert complaint(read_image, tmp_path / "no.jpg").startswith(f"{tmp_path}/no.jpg: no such image")
    assert complaint(read_label, tmp_path / "no.png").startswith(f"{tmp_path}/no.png: no such label")
