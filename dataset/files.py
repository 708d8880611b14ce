"""List files, images and labels on disk, and the checks that find what is wrong with them before training does."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import posixpath
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import EpsImagePlugin, ExifTags, Image, UnidentifiedImageError

from dataset.errors import DataError

IGNORE_INDEX = 255
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
_ALLOW_OUTSIDE = "allow_outside_root: true permits that"
LARGE = 2**19  # pixels of a PNG from which on leaving out rows saves more than it costs
# (width, height) of a picture -> its rows, from the top, whose pixels are wanted
RowsNeeded = Callable[[int, int], int]
# The last bytes of a whole file. A file without them may still be whole (some cameras append data): then it is decoded.
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# Whatever its name, a file with PostScript in it would be run by Ghostscript.
EpsImagePlugin.gs_binary = False


class Sample(NamedTuple):
    """One line of a list: paths relative to the data root; an unlabelled line may have no label."""

    image: str
    label: str | None


def limit_image_pixels(pixels: int) -> None:
    """Refuse, in this process and from now on, images and labels of more pixels than that, before decoding them.

    A file of some kB can hold billions of pixels. This sets Pillow's own limit, which is one for the whole process.
    """
    Image.MAX_IMAGE_PIXELS = pixels / 2  # Pillow refuses twice as many; above this number it only warns
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def image_pixel_limit() -> int:
    """The number of pixels from which on images are refused in this process."""
    return int(2 * Image.MAX_IMAGE_PIXELS)


def read_list(path: str | Path, labels: bool = True, inside: str | Path | None = None) -> list[Sample]:
    """Read a list file: `image label` or just `image` a line, blank lines and `#` comments allowed.

    Columns are separated by white space. A line with a tab in it, were it the line's last character, is split at tabs
    only, so that names may contain spaces. With `labels`, every line must have a label. With `inside`, the data root,
    no path may leave that folder. Raises DataError for a missing, empty or malformed list.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some Windows programs begin a file with a mark
    except FileNotFoundError:
        raise DataError(f"{path}: no such list file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable list file: {error}") from None
    samples = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.lstrip()
        if not line or line.startswith("#"):
            continue
        columns = [column.strip() for column in re.split(r"\t+", line.rstrip())] if "\t" in line else line.split()
        if len(columns) > 2:
            raise DataError(
                f"{path}:{number}: expected `image label`, found {len(columns)} columns "
                "(put a tab between the columns where names contain spaces)"
            )
        if labels and len(columns) < 2:
            hint = " (a tab, also at the line's end, makes tabs its only separators)" if "\t" in line else ""
            raise DataError(
                f"{path}:{number}: {columns[0]} has no label beside it; a labelled line is `image label`{hint}"
            )
        for column in columns:
            if inside is not None and not is_inside(column, inside):
                raise DataError(f"{path}:{number}: {column} lies outside data_root ({inside}); {_ALLOW_OUTSIDE}")
        samples.append(Sample(columns[0], columns[1] if len(columns) == 2 else None))
    if not samples:
        raise DataError(f"{path}: the list is empty")
    return samples


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether `path`, taken from `folder`, is in it, to go by the text: links are not followed, they may lead out."""
    folder = os.path.abspath(folder)
    return os.path.join(location(folder, path), "").startswith(os.path.join(folder, ""))


def find_unlabeled(
    source: str | Path, data_root: str | Path, labeled: Sequence[Sample], allow_outside: bool = False
) -> list[Sample]:
    """Unlabelled images: those of a list file, or of a folder under `data_root`, without the labelled ones.

    Their labels, listed or not, are dropped here: nothing after this could open one. Unless `allow_outside`, no path
    may leave `data_root`. Raises DataError.
    """
    folder = Path(data_root) / source
    if Path(source).is_file():
        listed = read_list(source, labels=False, inside=None if allow_outside else data_root)
        images = [sample.image for sample in listed]
    elif not allow_outside and not is_inside(source, data_root):
        raise DataError(f"{source}: neither a list file nor a folder under {data_root}; {_ALLOW_OUTSIDE}")
    elif folder.is_dir():
        images = images_in(folder, Path(data_root))
    else:
        raise DataError(f"{source}: neither a list file nor a folder under {data_root}")
    taken = {location(data_root, sample.image) for sample in labeled}
    samples = [Sample(image, None) for image in images if location(data_root, image) not in taken]
    if not samples:
        raise DataError(f"{source}: no unlabelled image in it ({len(images)} images, all of them labelled)")
    return samples


def list_digest(samples: Sequence[Sample]) -> str:
    """A short fingerprint of a list's content, to notice that a resumed run was given other images."""
    text = "\n".join(f"{sample.image}\t{sample.label or ''}" for sample in samples)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_image(path: str | Path) -> Image.Image:
    """Decode an image as 8-bit RGB. Raises DataError naming the file."""
    with open_image(path) as image:
        return image.convert("RGB")


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image as Pillow opens it, before decoding. What it raises while in use becomes a DataError naming the file."""
    with _faults_named(path, "image"), Image.open(path) as image:
        _check_depth(path, image)
        yield image


def read_pixels(path: str | Path) -> np.ndarray:
    """What `read_image` decodes, as uint8 (H, W, 3): the same values, from JPEG files sooner. Raises DataError."""
    return np.asarray(decode_image(path))


def decode_image(path: str | Path, rows_needed: RowsNeeded | None = None) -> Image.Image | np.ndarray:
    """An image as 8-bit RGB, as its decoder leaves it: a Pillow image or uint8 (H, W, 3). Raises DataError.

    Below the rows that are needed a large PNG may be left black, and its faults unnoticed.
    """
    with open_image(path) as image:
        # PNG stays with Pillow: torchvision's decoder takes the whole process down at a damaged file.
        decode = _jpeg_decoder() if image.format == "JPEG" and image.mode == "RGB" else None
        if decode is not None:
            with contextlib.suppress(RuntimeError):  # of a damaged file; Pillow tells what is wrong with it
                return decode(np.fromfile(path, np.uint8))
        _leave_out_rows(image, rows_needed)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def read_label(path: str | Path) -> Image.Image:
    """Decode a label as a Pillow image of mode L whose values are class indices. Raises DataError naming the file."""
    return Image.fromarray(read_indices(path))


def read_indices(path: str | Path, rows_needed: RowsNeeded | None = None) -> np.ndarray:
    """Decode a label as class indices, uint8 (H, W), 0 below the rows that are needed. Raises DataError naming it."""
    with _faults_named(path, "label"), Image.open(path) as label:
        if label.mode not in ("L", "P", "1"):
            raise DataError(
                f"{path}: the label is a {label.mode} image; expected one 8-bit channel of class indices",
                "labels that are not one 8-bit channel",
            )
        _leave_out_rows(label, rows_needed)
        return np.asarray(label).astype(np.uint8, copy=False)  # palette indices stay indices


def _leave_out_rows(image: Image.Image, rows_needed: RowsNeeded | None) -> None:
    """Have a large PNG decoded no further than needed; decoding goes from the top to the bottom.

    What Pillow is to decode, and into which part of the image, stands in `tile`. An interlaced PNG comes as a whole.
    """
    width, height = image.size
    if rows_needed is None or image.format != "PNG" or image.info.get("interlace") or width * height < LARGE:
        return
    if len(image.tile) == 1 and image.tile[0][1] == (0, 0, width, height):
        decoder, _, offset, arguments = image.tile[0]
        image.tile = [(decoder, (0, 0, width, min(rows_needed(width, height), height)), offset, arguments)]


def map_label(label: Image.Image, label_map: Mapping[int, int] | None) -> Image.Image:
    """A label (mode L) with its values replaced as `label_map` says; values that it does not name stay as they are."""
    return label.point([label_map.get(value, value) for value in range(256)]) if label_map else label


@functools.cache
def _jpeg_decoder() -> Callable[[np.ndarray], np.ndarray] | None:
    """torchvision's JPEG decoder, from a file's bytes to (H, W, 3), if it gives Pillow's values here, else None.

    Each carries a libjpeg of its own, which may differ; torchvision may come without one, and is to lose it.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None

    def decode(data: np.ndarray) -> np.ndarray:
        return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB).permute(1, 2, 0).numpy()

    pixels = np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8)
    for subsampling in (0, 1, 2):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=80, subsampling=subsampling)
        try:
            decoded = decode(np.frombuffer(file.getvalue(), np.uint8).copy())
        except RuntimeError:
            return None
        if not np.array_equal(decoded, np.asarray(Image.open(file))):
            return None
    return decode


@contextlib.contextmanager
def _faults_named(path: str | Path, kind: str) -> Iterator[None]:
    """What opening or decoding the `kind` at `path` raises becomes a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such {kind} (listed paths are relative to data_root)", f"missing {kind}s"
        ) from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise DataError(
            f"{path}: the {kind} has {pixels[0] if pixels else 'too many'} pixels, max_image_pixels is "
            f"{image_pixel_limit()}: raise it if the {kind} is meant to be so large",
            f"{kind}s of more than max_image_pixels",
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them meet
        detail = "no known image format" if isinstance(error, UnidentifiedImageError) else _one_line(error)
        message = f"{path}: unreadable {kind}, truncated or damaged: {detail}"
        raise DataError(message, f"unreadable {kind}s") from None


def _check_depth(path: str | Path, image: Image.Image) -> None:
    """Refuse grey images of more than 8 bits: Pillow's conversion would cut their values off at 255, nearly white."""
    if image.mode[0] in "IF":
        raise DataError(
            f"{path}: the image has more than 8 bits per pixel (mode {image.mode}); convert it to 8 bits",
            "images of more than 8 bits",
        )


def check_samples(
    samples: Sequence[Sample],
    data_root: str | Path,
    nclass: int,
    threads: int = 8,
    label_map: Mapping[int, int] | None = None,
) -> None:
    """Check every file of a list; the first fault in list order is raised as DataError.

    Images: present, a readable header, not truncated. Labels: present, of the image's size, values after `label_map`
    below `nclass` or 255. Images are decoded only where their last bytes look cut off; labels always.
    """
    root = Path(data_root)
    check_root(root)
    found: set[int] = set()
    with ThreadPoolExecutor(threads) as pool:  # reading and Pillow's decoders release the interpreter lock
        for values in pool.map(lambda sample: _check_sample(sample, root, nclass, label_map or {}), samples):
            found |= values
    labels = [sample.label for sample in samples if sample.label]
    if labels and (fault := mask_fault(root / labels[0], len(labels), found, label_map)):
        raise fault


def check_root(root: Path) -> None:
    """Raise DataError unless `root`, the config's data_root, is a folder."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; data_root must hold the images that the lists name")


def mask_fault(first: Path, count: int, found: Set[int], label_map: Mapping[int, int] | None) -> DataError | None:
    """The fault of a list in whose `count` labels, the `first` among them, there are just 255 and perhaps 0."""
    if label_map or IGNORE_INDEX not in found or not found <= {0, IGNORE_INDEX}:
        return None
    return DataError(
        f"{first}: values found over all {count} labels of the list: {_few(sorted(found))}, so no class but 0 occurs; "
        f"{mask_hint()}",
        "lists of labels without a class",
    )


def mask_hint(value: int = 255) -> str:
    """What to do about labels in which 0 and `value` mean background and object."""
    return (
        f"it looks like a 0/255 mask: set label_map: {{0: 0, {value}: 1}}, "
        "or store class indices, 0 for background and 1 for the object"
    )


def _check_sample(sample: Sample, root: Path, nclass: int, label_map: Mapping[int, int]) -> set[int]:
    """The values found in the sample's label (none without one)."""
    size = _check_image(root / sample.image)
    if sample.label is None:
        return set()
    label = read_label(root / sample.label)
    found = np.flatnonzero(label.histogram()).tolist()
    for fault in label_faults(sample, root, size, label.size, found, nclass, label_map):
        raise fault
    return set(found)


def label_faults(
    sample: Sample,
    root: Path,
    image_size: tuple[int, int] | None,
    label_size: tuple[int, int],
    found: Sequence[int],
    nclass: int,
    label_map: Mapping[int, int] | None,
) -> Iterator[DataError]:
    """What is wrong with a readable label that holds the values `found`: its size, its values. Sizes: (width, height).

    An unreadable image's size is None and fits every label.
    """
    path, label_map = root / sample.label, label_map or {}
    if fault := size_fault(sample, root, image_size or label_size, label_size):
        yield fault
    if any(nclass <= label_map.get(value, value) != IGNORE_INDEX for value in found):
        mask = not label_map and len(found) == 2 and found[0] == 0 and found[1] >= 128
        named = f", and those in label_map ({_few(sorted(label_map))})" if label_map else ""
        yield DataError(
            f"{path}: label values found: {_few(found)}; allowed are 0..{nclass - 1}, and 255 for ignored pixels"
            f"{named}{f'; {mask_hint(found[1])}' if mask else ''}",
            "label values outside the classes",
        )


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8, that the pixels of a decoded image have still to be turned by.

    Pillow turns TIFFs by itself while it decodes them; other formats keep their pixels as they are stored.
    """
    try:
        number = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF data raise many things; the pixels are good all the same
        return 1
    return number if number in range(1, 9) else 1


def _orientation_hint(path: Path, label_size: tuple[int, int]) -> str:
    with open_image(path) as image:
        if image.size[::-1] != label_size:
            return ""
        image.load()
        number = orientation(image)
    if number not in (5, 6, 7, 8):
        return ""
    return (
        f": its EXIF orientation {number} turns it in a viewer, but not here; turn the image's pixels as it says and "
        "remove it, or turn the label to fit the stored pixels"
    )


def size_fault(
    sample: Sample, root: Path, image_size: tuple[int, int], label_size: tuple[int, int]
) -> DataError | None:
    """The fault of a label that has another (width, height) than its image."""
    if label_size == image_size:
        return None
    return DataError(
        f"{root / sample.label}: the label is {label_size[0]} x {label_size[1]} pixels, its image "
        f"{root / sample.image} is {image_size[0]} x {image_size[1]}"
        f"{_orientation_hint(root / sample.image, label_size)}",
        "labels of another size than their image",
    )


def _check_image(path: Path) -> tuple[int, int]:
    """The (width, height) of an image that seems whole."""
    with _faults_named(path, "image"), open(path, "rb") as file, Image.open(file) as image:
        _check_depth(path, image)
        size, mark = image.size, _END_MARKS.get(image.format)
        file.seek(0, os.SEEK_END)
        file.seek(-min(64, file.tell()), os.SEEK_END)
        whole = mark is not None and mark in file.read()
    if not whole:
        read_image(path)
    return size


def images_in(folder: Path, root: Path) -> list[str]:
    """The images in `folder` and the folders in it, sorted, as paths relative to `root`. Raises DataError for none."""
    found = []
    for directory, _, names in os.walk(folder, followlinks=True):
        relative = Path(os.path.relpath(directory, root)).as_posix()
        found += [
            posixpath.normpath(f"{relative}/{name}")
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    if not found:
        raise DataError(f"{folder}: no image in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(found)


def shared_images(samples: Sequence[Sample], others: Sequence[Sample], data_root: str | Path) -> list[str]:
    """The images of `samples` that are also among `others`, however either list writes their paths."""
    taken = {location(data_root, sample.image) for sample in others}
    return [sample.image for sample in samples if location(data_root, sample.image) in taken]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def location(data_root: str | Path, image: str | Path) -> str:
    """The same text for the same path, however a list writes it."""
    return os.path.abspath(os.path.join(data_root, image))


def _few(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return f"{shown}, ... ({len(values)} values)" if len(values) > 8 else shown
