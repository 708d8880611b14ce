"""Broken inputs: each fault spoils a tiny data set of `tests.helpers` and says how it must be reported."""

import struct
import zlib

import numpy as np
from PIL import Image

from dataset.check import check_samples
from dataset.lists import Sample
from dataset.source import DataSource


def noise(size=(40, 32), channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def relist(data, path, old, new):
    """Let a list name another file."""
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def replace_image(data, image, suffix="png", **options):
    """Put a picture in the place of the first labelled one, under a suffix that fits; returns its path."""
    path = data.root / f"images/labeled0.{suffix}"
    image.save(path, **options)
    relist(data, data.labeled, "images/labeled0.jpg", f"images/{path.name}")
    return path


def deep_png(pixels):
    """A PNG file of 16 bits per channel, which Pillow cannot write, of (H, W, 3) values."""
    height, width, _ = pixels.shape
    return _png(width, height, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))


def grey_png(values, bits):
    """A grey PNG file of 1, 2, 4 or 8 bits, which Pillow cannot write, of (H, W) values as they are to be stored."""
    per_byte = 8 // bits
    height, width = values.shape
    padded = np.pad(values, ((0, 0), (0, -width % per_byte))).reshape(height, -1, per_byte)
    packed = sum(padded[..., i].astype(int) << (8 - bits * (i + 1)) for i in range(per_byte)).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    return _png(width, height, bits, 0, rows)


def _png(width, height, bits, colour_type, rows):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def oriented(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def overwrite(path, part=0.5, count=64, value=b"\0"):
    """Damage a file inside, its length unchanged."""
    content = bytearray(path.read_bytes())
    start = int(len(content) * part)
    content[start : start + count] = (value * count)[:count]
    path.write_bytes(content)


# --- faults of data: each takes a TinyData, spoils something and returns (kind, file at fault, fragment) -------------


def missing_image(data):
    path = data.root / "images/unlabeled3.jpg"
    path.unlink()
    return "missing images", path, "no such image"


def missing_label(data):
    path = data.root / "labels/val1.png"
    path.unlink()
    return "missing labels", path, "no such label"


def image_that_is_none(data):
    path = data.root / "images/val0.jpg"
    path.write_text("<html>not found</html>", encoding="utf-8")
    return "unreadable images", path, "unreadable image"


def truncated_image(data):
    path = data.root / "images/unlabeled5.jpg"
    path.write_bytes(path.read_bytes()[:-30])
    return "unreadable images", path, "truncated or damaged"


def image_damaged_inside(data):
    path = replace_image(data, Image.fromarray(noise()))
    overwrite(path)
    check_samples([Sample("images/labeled0.png", None)], DataSource(data.root), 3)  # the quick check sees its ends only
    return "unreadable images", path, "truncated or damaged"


def label_damaged_inside(data):
    path = data.root / "labels/labeled1.png"
    overwrite(path, count=8, value=b"\x55")
    return "unreadable labels", path, "truncated or damaged"


def truncated_label(data):
    path = data.root / "labels/labeled1.png"
    path.write_bytes(path.read_bytes()[:-30])
    return "unreadable labels", path, "truncated or damaged"


def label_of_another_size(data):
    path = data.root / "labels/labeled1.png"
    Image.open(path).resize((20, 16), Image.Resampling.NEAREST).save(path)
    return "labels of another size than their image", path, "is 20 x 16 pixels"


def label_value_outside_the_classes(data):
    path = data.root / "labels/val0.png"
    label = np.array(Image.open(path))
    label[5, 5] = 3
    Image.fromarray(label).save(path)
    return "label values outside the classes", path, "values found: 0, 1, 2, 3, 255; allowed are 0..2"


def label_value_outside_the_map(data):
    data.configure(label_map={0: 0, 1: 1})
    path = data.root / "labels/val0.png"
    label = np.array(Image.open(path))
    label[5, 5] = 9
    Image.fromarray(label).save(path)
    return "label values outside the classes", path, "and those in label_map (0, 1)"


def masks_of_another_white(data):
    path = data.root / "labels/val0.png"
    Image.fromarray(np.resize(np.uint8([0, 200]), (32, 40))).save(path)
    return "label values outside the classes", path, "set label_map: {0: 0, 200: 1}"


def masks(data):
    for path in (data.root / "labels").glob("labeled*.png"):
        Image.fromarray(np.where(np.array(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    return "lists of labels without a class", data.root / "labels/labeled0.png", "set label_map: {0: 0, 255: 1}"


def label_with_colours(data):
    path = data.root / "labels/labeled2.png"
    Image.open(path).convert("RGB").save(path)
    return "labels that are not one channel of class indices", path, "RGB image"


def label_of_16_bits(data):
    path = data.root / "labels/labeled2.png"
    Image.fromarray(np.array(Image.open(path)) * np.uint16(2)).save(path)
    return "label values outside 0 to 255", path, "has the value 510"


def label_of_scaled_values(data):
    path = data.root / "labels/labeled2.pgm"
    label = np.array(Image.open(path.with_suffix(".png")))
    path.write_bytes(b"P5 40 32 2\n" + (label % 3).tobytes())
    relist(data, data.labeled, "labeled2.png", "labeled2.pgm")
    return "labels whose values are scaled", path, "greatest value is not 255"


def label_of_one_bit(data):
    """Class 0 and ignored pixels, as a program that makes files smaller without loss stores them."""
    path = data.root / "labels/labeled2.png"
    path.write_bytes(grey_png(np.resize(np.uint8([0, 1]), (32, 40)), 1))
    return "labels that can be read two ways", path, "1-bit"


def label_of_black_and_white(data):
    path = data.root / "labels/labeled2.png"
    label = Image.fromarray(np.resize(np.uint8([0, 1]), (32, 40)), "P")
    label.putpalette([0, 0, 0, 255, 255, 255])
    label.save(path)
    return "labels that can be read two ways", path, "1-bit"


def grey_image_of_16_bits(data):
    path = replace_image(data, Image.fromarray(np.full((32, 40), 999, np.uint16)))
    return "images of more than 8 bits", path, "mode I;16"


ERRORS = [
    missing_image,
    missing_label,
    image_that_is_none,
    truncated_image,
    image_damaged_inside,
    label_damaged_inside,
    truncated_label,
    label_of_another_size,
    label_value_outside_the_classes,
    label_value_outside_the_map,
    masks_of_another_white,
    masks,
    label_with_colours,
    label_of_16_bits,
    label_of_scaled_values,
    label_of_one_bit,
    label_of_black_and_white,
    grey_image_of_16_bits,
]
