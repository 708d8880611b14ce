"""Decoding one image or one label, with errors that name the file."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import EpsImagePlugin, ExifTags, Image, UnidentifiedImageError

from dataset.colors import UnknownColour, color_indices
from dataset.errors import DataError, one_line
from dataset.resize import picture_size

IGNORE_INDEX = 255
LabelColors = Mapping[tuple[int, int, int], int]  # label values of labels that are drawn in colours
LARGE = 2**19  # pixels of a PNG from which on leaving out rows saves more than it costs
# Whatever its name, a file with PostScript in it would be run by Ghostscript.
EpsImagePlugin.gs_binary = False


def limit_image_pixels(pixels: int) -> None:
    """Refuse, in this process and from now on, images and labels of more pixels than that, before decoding them.

    A file of some kB can hold billions of pixels. This sets Pillow's own limit, which is one for the whole process.
    """
    Image.MAX_IMAGE_PIXELS = pixels / 2  # Pillow refuses twice as many; above this number it only warns
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def image_pixel_limit() -> int:
    """The number of pixels from which on images are refused in this process."""
    return int(2 * Image.MAX_IMAGE_PIXELS)


def read_image(path: str | Path) -> Image.Image:
    """Decode an image as 8-bit RGB. Raises DataError naming the file."""
    with open_image(path) as image:
        return image.convert("RGB")


def read_pixels(path: str | Path) -> np.ndarray:
    """The values of `read_image`, uint8 (H, W, 3); faster for JPEG files. Raises DataError naming the file."""
    with open_image(path) as image:
        return np.asarray(decode_image(image))


def read_label(path: str | Path, colors: LabelColors | None = None) -> Image.Image:
    """Decode a label as a Pillow image of mode L whose values are class indices. Raises DataError naming the file.

    With `colors`, labels are drawn in colours: `{(red, green, blue): value}`.

    Where a viewer shows other values, `info["shown"]` of the image has the shown value of each stored one.
    """
    with open_label(path, colors) as label:
        shown = None if colors else _shown_values(label)
        image = Image.fromarray(_indices(label, colors))
    image.info["shown"] = shown
    return image


def read_indices(path: str | Path, colors: LabelColors | None = None) -> np.ndarray:
    """Decode a label as class indices, uint8 (H, W). Raises DataError naming the file.

    Indices are the values as stored: of a palette's entries, and of grey pixels of 1, 2, 4, 8 or 16 bits. With
    `colors`, they are those of the colours that are seen.
    """
    with open_label(path, colors) as label:
        return decode_label(label, colors=colors)


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image of which Pillow has read the header only. An error while it is open is a DataError naming the file."""
    with errors_named(path, "image"), Image.open(path) as image:
        check_depth(path, image)
        yield image


@contextlib.contextmanager
def open_label(path: str | Path, colors: LabelColors | None = None) -> Iterator[Image.Image]:
    """A label of which Pillow has read the header only. An error while it is open is a DataError naming the file."""
    with errors_named(path, "label"), Image.open(path) as label:
        if colors:
            yield label
            return
        if label.mode not in ("L", "P", "1") and label.mode[0] != "I":
            hint = "; set label_colors if classes are drawn in colours" if label.mode in ("RGB", "RGBA") else ""
            raise DataError(
                f"{path}: the label is a {label.mode} image; expected one channel of class indices{hint}",
                "labels that are not one channel of class indices",
            )
        if label.tile and re.search(r"^[1L];\d?IR?\b", _decoder_mode(label)):
            raise DataError(
                f"{path}: a {label.format} file whose value 0 is white, so that its values are read inverted: store it "
                "with 0 as black (PhotometricInterpretation 1), or as PNG",
                "labels whose values are inverted",
            )
        if label.tile and label.tile[0][0].startswith("ppm") and label.mode == "L":
            raise DataError(
                f"{path}: a PGM file whose greatest value is not 255, so that its values are scaled: store it as PNG",
                "labels whose values are scaled",
            )
        yield label


def decoded_size(opened: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height) of the pixels of an opened image, which may also be an array of them."""
    if isinstance(opened, Image.Image) and opened.format not in ("JPEG", "PNG"):
        with errors_named(opened.filename, "image"):
            opened.load()  # decoding may turn the picture (TIFF) or choose one of another size (ICO)
    return picture_size(opened)


def decode_image(opened: Image.Image | np.ndarray, rows: int | None = None) -> Image.Image | np.ndarray:
    """The 8-bit RGB pixels of an opened image: a Pillow image or uint8 (H, W, 3), as its decoder leaves them.

    With `rows`, a large PNG is decoded down to this row only; it is black, and its faults unnoticed, below. An array is
    decoded already and comes back as it is. Raises DataError naming the file.
    """
    if isinstance(opened, np.ndarray):
        return opened
    with errors_named(opened.filename, "image"):
        # PNG stays with Pillow: torchvision's decoder takes the whole process down at a damaged file.
        decode = jpeg_decoder() if opened.format == "JPEG" and opened.mode == "RGB" else None
        if decode is not None:
            with contextlib.suppress(RuntimeError):  # a damaged file: Pillow's message says what is wrong with it
                return decode(np.fromfile(opened.filename, np.uint8))
        _leave_out_rows(opened, rows)
        opened.load()
        return opened if opened.mode == "RGB" else opened.convert("RGB")


def decode_label(
    opened: Image.Image | np.ndarray, rows: int | None = None, colors: LabelColors | None = None
) -> np.ndarray:
    """The class indices of an opened label, uint8 (H, W); below `rows` they are 0 unless it has `colors`."""
    if isinstance(opened, np.ndarray):
        return opened
    with errors_named(opened.filename, "label"):
        if not colors:  # black, as which rows are left out, may be none of them
            _leave_out_rows(opened, rows)
        return _indices(opened, colors)


def _indices(label: Image.Image, colors: LabelColors | None) -> np.ndarray:
    """The values of an open label as its file stores them, or of its `colors`, uint8 (H, W)."""
    if colors:
        return _color_indices(label, colors)
    bits = _grey_bits(label)
    values = np.asarray(label)
    if bits in (2, 4):
        return values // (255 // (2**bits - 1))  # Pillow scales them up to 255
    if values.dtype.itemsize > 1 and values.size and not 0 <= values.min() <= values.max() <= 255:
        odd = int(values.max() if values.max() > 255 else values.min())
        raise DataError(
            f"{label.filename}: the label has the value {odd}; class indices, and 255 for ignored pixels, are 0 to 255",
            "label values outside 0 to 255",
        )
    return values.astype(np.uint8, copy=False)


def _color_indices(label: Image.Image, colors: LabelColors) -> np.ndarray:
    """The values of an open label that is drawn in these colours; transparency is dropped."""
    kind = "labels with colours outside label_colors"
    if label.mode not in ("RGB", "RGBA", "P", "L", "1"):
        fault = f"{label.filename}: the label is a {label.mode} image; label_colors needs RGB with 8 bits per channel"
        raise DataError(fault, kind)
    try:
        return color_indices(np.asarray(label.convert("RGB")), colors)
    except UnknownColour as error:
        hint = ": JPEG changes colours, use PNG" if label.format == "JPEG" else ""
        raise DataError(f"{label.filename}: the label has {error}{hint}", kind) from None


def _grey_bits(label: Image.Image) -> int:
    """Bits per pixel of an open grey label, 8 for one with a palette; known before decoding only."""
    if label.mode == "1":
        return 1
    depth = re.match(r"L;([24])", _decoder_mode(label))
    return int(depth[1]) if depth else 8


def _decoder_mode(opened: Image.Image) -> str:
    """How an open image's values are stored, such as L;4; known before decoding only."""
    arguments = opened.tile[0][3] if opened.tile else ""  # the decoder's, alone or first of several
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _shown_values(label: Image.Image) -> tuple[int, ...] | None:
    """The grey values as which few bits, or a palette of black and white, are shown; None for other open labels."""
    if (bits := _grey_bits(label)) < 8:
        return tuple(value * 255 // (2**bits - 1) for value in range(2**bits))
    colours = bytes(label.getpalette() or ()) if label.mode == "P" else b""
    entries = [colours[i : i + 3] for i in range(0, len(colours), 3)]
    black, white = b"\0\0\0", b"\xff\xff\xff"
    return tuple(entry[0] for entry in entries) if set(entries) == {black, white} else None


def _leave_out_rows(opened: Image.Image, rows: int | None) -> None:
    """Have a large PNG decoded from the top down to row `rows` only.

    Pillow's `tile` says what is decoded into which part of the image. An interlaced PNG is decoded as a whole.
    """
    width, height = opened.size
    if rows is None or opened.format != "PNG" or opened.info.get("interlace") or width * height < LARGE:
        return
    if len(opened.tile) == 1 and opened.tile[0][1] == (0, 0, width, height):
        decoder, _, offset, arguments = opened.tile[0]
        opened.tile = [(decoder, (0, 0, width, min(rows, height)), offset, arguments)]


def map_label(label: Image.Image, label_map: Mapping[int, int] | None) -> Image.Image:
    """A label (mode L) with its values replaced as `label_map` says; values that it does not name stay as they are."""
    return label.point([label_map.get(value, value) for value in range(256)]) if label_map else label


@functools.cache
def jpeg_decoder() -> Callable[[np.ndarray], np.ndarray] | None:
    """torchvision's JPEG decoder, from a file's bytes to (H, W, 3); None where its values are not Pillow's.

    Each brings its own libjpeg, and these may differ. Some builds of torchvision have none, as all later ones will.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None

    def decode(data: np.ndarray) -> np.ndarray:
        return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB).permute(1, 2, 0).numpy()

    pixels = np.random.default_rng(0).integers(0, 256, (17, 21, 3), dtype=np.uint8)  # below any limit of sizes
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
def errors_named(path: str | Path, kind: str) -> Iterator[None]:
    """What opening or decoding the `kind` at `path` raises becomes a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        hint = "; separate folders by /, not by backslashes" if "\\" in str(path) else ""
        if re.search(r"""(^|/)["']|["',;]$""", str(path)):
            hint = "; a list has no quotation marks, commas or semicolons around names"
        raise DataError(
            f"{path}: no such {kind} (listed paths are relative to data_root{hint})", f"missing {kind}s"
        ) from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise too_many_pixels(path, kind, pixels[0] if pixels else "too many") from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them meet
        detail = "no known image format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        message = f"{path}: unreadable {kind}, truncated or damaged: {detail}"
        raise DataError(message, f"unreadable {kind}s") from None


def too_many_pixels(path: str | Path, kind: str, pixels: int | str, more: str = "") -> DataError:
    """The fault of a `kind`, image or label, beyond the limit of sizes; `more` is said besides."""
    return DataError(
        f"{path}: the {kind} has {pixels} pixels, max_image_pixels is {image_pixel_limit()}: raise it if the {kind} is "
        f"meant to be so large{more and f'; {more}'}",
        f"{kind}s of more than max_image_pixels",
    )


def check_pixels(path: str | Path, width: int, height: int, more: str = "") -> None:
    """Raise the fault of an image that is too large to be decoded whole."""
    if width * height > image_pixel_limit():
        raise too_many_pixels(path, "image", width * height, more)


def check_depth(path: str | Path, image: Image.Image) -> None:
    """Refuse grey images of more than 8 bits: Pillow's conversion would cut their values off at 255, nearly white."""
    if image.mode[0] in "IF":
        raise DataError(
            f"{path}: the image has more than 8 bits per pixel (mode {image.mode}); convert it to 8 bits",
            "images of more than 8 bits",
        )


def gives_upper_bits(image: Image.Image) -> bool:
    """Whether Pillow gives the upper 8 of the 16 bits per channel of an opened image; known before decoding only."""
    return image.mode[0] != "I" and any(";16" in str(tile[3]) for tile in image.tile)  # the decoder's arguments


def upper_bits_notes(found: Iterable[str | Path | None]) -> list[str]:
    """A note for the user on the first of these images, of which `gives_upper_bits`, if there is any."""
    rule = "the upper 8 are used (value_range: [low, high] uses all)"
    return [f"note: images of 16 bits per channel, such as {path}: {rule}" for path in found if path][:1]


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
    try:
        with open_image(path) as image:
            if image.size[::-1] != label_size:
                return ""
            image.load()
            number = orientation(image)
    except DataError:  # of many channels
        return ""
    if number not in (5, 6, 7, 8):
        return ""
    return (
        f": its EXIF orientation {number} turns it in a viewer, but not here; turn the image's pixels as it says and "
        "remove it, or turn the label to fit the stored pixels"
    )


def size_fault(image: Path, label: Path, image_size: tuple[int, int], label_size: tuple[int, int]) -> DataError | None:
    """The fault of a label that has another (width, height) than its image."""
    if label_size == image_size:
        return None
    return DataError(
        f"{label}: the label is {label_size[0]} x {label_size[1]} pixels, its image "
        f"{image} is {image_size[0]} x {image_size[1]}"
        f"{_orientation_hint(image, label_size)}",
        "labels of another size than their image",
    )
