"""List files and folders of images: which images and labels a run uses."""

from __future__ import annotations

import codecs
import itertools
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from dataset.errors import DataError
from dataset.samples import Sample, Samples, SamplesWriter

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
BAND_SUFFIXES = IMAGE_SUFFIXES | {".npy"}  # where images may have other channels than RGB
PREDICTION_SUFFIXES = (".png", ".tif")  # of what predict writes of a picture
ALLOW_OUTSIDE = "allow_outside_root: true permits that"
# Folders that systems put among a user's files; others of that kind are hidden, their names begin with a dot.
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"})
# A first line of these words alone is the heading of a table.
HEADINGS = frozenset(
    ("image", "images", "img", "file", "filename", "file_name", "path", "image_path", "image_name", "image_id", "id")
    + ("img_path", "img_name", "img_id", "label_name", "mask_name")
    + ("label", "labels", "label_path", "mask", "masks", "mask_path", "annotation", "annotations", "gt", "target")
)
# Wraps an iterator; gets what is being done, the unit, and the iterator's length (None: unknown).
Progress = Callable[[str, str, Iterator[Any], int | None], Iterable[Any]]
FIRST_BLOCK, BLOCK = 2**16, 2**22  # bytes of a list that are read at once
# By byte: whether it needs a closer look. White space but for a space and a line feed, what begins a comment, no ASCII.
_UNUSUAL = np.array([chr(code) not in " \n" and (chr(code) == "#" or not 33 <= code <= 126) for code in range(256)])


def no_progress(what: str, unit: str, items: Iterator[Any], total: int | None) -> Iterator[Any]:
    """The Progress that shows none."""
    return items


def read_list(
    path: str | Path,
    labels: bool = True,
    inside: str | Path | None = None,
    progress: Progress = no_progress,
) -> Samples:
    """Read a list file: `image label` or just `image` a line, blank lines and `#` comments allowed.

    Columns are separated by white space. A line with a tab in it, were it the line's last character, is split at tabs
    only, so that names may contain spaces. With `labels`, every line must have a label. With `inside`, the data root,
    no path may leave that folder. `progress` wraps the iterator over the file's blocks.
    Raises DataError for a missing, empty or malformed list.
    """
    return read_entries(path, "required" if labels else "kept", inside, progress)


def read_entries(path: str | Path, labels: str, inside: str | Path | None, progress: Progress) -> Samples:
    """The entries of a list file; `labels`: required, kept where there are any, or dropped."""
    reader, writer, number = _LineReader(path, labels, inside), SamplesWriter(), 0
    for block in progress(f"reading {path}", "blocks", _blocks(path), 1 + _file_size(path) // BLOCK):
        # The first block is read with care: only there can be a heading.
        records = reader.plain_records(block) if writer.count else None
        if records is not None:
            writer.write_records(*records)
            number += len(records[1])
        else:
            lines = _decode(path, block, first=number == 0).splitlines()
            writer.write(list(reader.samples(lines, number + 1, writer.count == 0)))
            number += len(lines)
    if not writer.count:
        raise DataError(f"{path}: the list is empty")
    return writer.finish()


class _LineReader:
    """The lines of one list."""

    def __init__(self, path: str | Path, labels: str, inside: str | Path | None) -> None:
        self.path, self.labels, self.inside = path, labels, inside
        self.root = None if inside is None else os.path.abspath(inside)

    def plain_records(self, block: bytes) -> tuple[bytes, np.ndarray] | None:
        """The records of Samples, and their lengths, of a block that holds nothing unusual; else None.

        That is ASCII, each line `image`, or each line `image label` with one space between. A hundred times as fast.
        """
        if self.root is not None and (block[:1] == b"/" or any(part in block for part in (b"..", b"\n/", b" /"))):
            return None
        block = block if block.endswith(b"\n") else block + b"\n"
        codes = np.frombuffer(block, np.uint8)
        if _UNUSUAL[codes].any():
            return None
        ends, spaces = np.flatnonzero(codes == ord("\n")), np.flatnonzero(codes == ord(" "))
        starts = np.concatenate([[0], ends[:-1] + 1])
        if len(spaces) == 0 and self.labels != "required" and (starts < ends).all():
            return block.replace(b"\n", b"\t\n"), ends - starts + 2
        if len(spaces) == len(ends) and (starts < spaces).all() and (spaces + 1 < ends).all():
            if self.labels == "dropped":
                return re.sub(rb" [^\n]*", b"\t", block), spaces - starts + 2
            return block.replace(b" ", b"\t"), ends - starts + 1
        return None

    def samples(self, lines: Sequence[str], start: int, first: bool) -> Iterator[Sample]:
        """The samples of `lines`, counted from `start`; `first`: no sample came before."""
        path, root = self.path, self.root
        for number, line in enumerate(lines, start):
            line = line.lstrip()
            if not line or line.startswith("#"):
                continue
            columns = [column.strip() for column in re.split(r"\t+", line.rstrip())] if "\t" in line else line.split()
            if first and {word.strip("\"'").lower() for word in re.split(r"[\s,;]+", line) if word} <= HEADINGS:
                raise DataError(f"{path}:{number}: '{line.strip()}' is a heading, no image: remove the line")
            first = False
            if len(columns) > 2:
                raise DataError(
                    f"{path}:{number}: expected `image label`, found {len(columns)} columns "
                    "(put a tab between the columns where names contain spaces)"
                )
            if self.labels == "required" and len(columns) < 2:
                hint = " (a tab, also at the line's end, makes tabs its only separators)" if "\t" in line else ""
                hint = hint or (" (white space separates the two, not a comma)" if "," in line else "")
                raise DataError(
                    f"{path}:{number}: {columns[0]} has no label beside it; a labelled line is `image label`{hint}"
                )
            for column in columns:
                # Most paths are plain: only one that begins with / or goes up can lie outside.
                if root is not None and (column.startswith("/") or ".." in column) and not is_inside(column, root):
                    raise DataError(
                        f"{path}:{number}: {column} lies outside data_root ({self.inside}); {ALLOW_OUTSIDE}"
                    )
            yield Sample(columns[0], columns[1] if len(columns) == 2 and self.labels != "dropped" else None)


def _file_size(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0  # reading it says why


def _blocks(path: str | Path) -> Iterator[bytes]:
    """The file in blocks of whole lines; the first is a short one."""
    try:
        with open(path, "rb") as file:
            block = file.read(FIRST_BLOCK) + file.readline()
            yield block.removeprefix(codecs.BOM_UTF8)  # some Windows programs begin a file with a mark
            while block := file.read(BLOCK):
                yield block + file.readline()
    except FileNotFoundError:
        raise DataError(f"{path}: no such list file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable list file: {error}") from None


def _decode(path: str | Path, block: bytes, first: bool) -> str:
    try:
        text = block.decode("utf-8")
        if "\0" not in text:
            return text
    except ValueError:
        pass
    wide = first and (block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in block[:64])
    found = "UTF-16 text" if wide else "no UTF-8 text"
    raise DataError(f"{path}: not a readable list file: {found}; save it as UTF-8")


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether `path`, relative to `folder`, is in it by its text: symlinks are not resolved, so they may lead out."""
    folder = os.path.abspath(folder)
    return os.path.join(location(folder, path), "").startswith(os.path.join(folder, ""))


def find_unlabeled(
    source: str | Path,
    data_root: str | Path,
    labeled: Sequence[Sample],
    allow_outside: bool = False,
    progress: Progress = no_progress,
    suffixes: Set[str] = IMAGE_SUFFIXES,
    is_prediction: Callable[[Path], bool] = lambda path: False,
    left_out: list[str] | None = None,
) -> Samples:
    """Unlabelled images: those of a list file, or of a folder under `data_root`, without the labelled ones.

    Their labels, listed or not, are dropped here: nothing after this could open one. Unless `allow_outside`, no path
    may leave `data_root`. `progress` as in `read_list` and, like `is_prediction` and `left_out`, as in `images_in`.
    Raises DataError.
    """
    folder = Path(data_root) / source
    if Path(source).is_file():
        images = read_entries(source, "dropped", None if allow_outside else data_root, progress)
    elif not allow_outside and not is_inside(source, data_root):
        raise DataError(f"{source}: neither a list file nor a folder under {data_root}; {ALLOW_OUTSIDE}")
    elif folder.is_dir():
        names = images_in(folder, Path(data_root), left_out, suffixes, is_prediction, progress)
        images = Samples.of(Sample(name, None) for name in names)
    else:
        raise DataError(f"{source}: neither a list file nor a folder under {data_root}")
    root = os.path.abspath(data_root)
    taken = set(Samples.of(labeled).places(root))
    samples = images.keep(np.fromiter((place not in taken for place in images.places(root)), bool, len(images)))
    if not samples:
        raise DataError(f"{source}: no unlabelled image in it ({len(images)} images, all of them labelled)")
    return samples


def list_digest(samples: Sequence[Sample]) -> str:
    """A short fingerprint of a list's content, to notice that a resumed run was given other images."""
    return Samples.of(samples).digest


def images_in(
    folder: Path,
    root: Path,
    left_out: list[str] | None = None,
    suffixes: Set[str] = IMAGE_SUFFIXES,
    is_prediction: Callable[[Path], bool] = lambda path: False,
    progress: Progress = no_progress,
) -> Iterator[str]:
    """The images in `folder` and the folders in it, sorted, as paths relative to `root`. Raises DataError for none.

    Links to folders are followed, but not back into a folder that leads there; what is hidden is left out, and so are
    the files of which `is_prediction`, which is asked of the images in PREDICTION_SUFFIXES. `left_out` gets the paths
    of all else: hidden folders and images, links that lead back, files of other kinds, predictions. `progress` counts
    the images as they are found, which is before the first one comes.
    """
    found = iter(progress(f"searching {folder}", "images", itertools.repeat(None), None))

    def takes(directory: str, name: str) -> bool:
        may_be = name.lower().endswith(PREDICTION_SUFFIXES)
        if not is_image(name, suffixes) or (may_be and is_prediction(Path(directory, name))):
            return False
        next(found)
        return True

    leave_out = (lambda path: None) if left_out is None else left_out.append
    above = tuple((status.st_dev, status.st_ino) for status in map(os.stat, Path(os.path.realpath(folder)).parents))
    images = _images_below(str(folder), Path(os.path.relpath(folder, root)).as_posix(), above, takes, leave_out)
    first = next(images, None)
    if first is None:
        raise DataError(f"{folder}: no image in this folder ({', '.join(sorted(suffixes))})")
    yield first
    yield from images


def _images_below(
    directory: str,
    relative: str,
    above: tuple[tuple[int, int], ...],
    takes: Callable[[str, str], bool],
    leave_out: Callable[[str], None],
) -> Iterator[str]:
    """The images in a folder, in order; `above` has the device and number of each folder that it lies in."""
    names = []  # those of folders end in a slash: so names in order give paths in order
    try:
        status = os.stat(directory)
        if (place := (status.st_dev, status.st_ino)) in above:
            leave_out(f"{relative}/")
            return
        with os.scandir(directory) as entries:
            for entry in entries:
                name, is_folder = entry.name, entry.is_dir()
                if is_folder and not is_hidden(f"{name}/"):
                    names.append(f"{name}/")
                # Opening a pipe would wait for ever.
                elif not is_folder and (entry.is_file() or entry.is_symlink()) and takes(directory, name):
                    names.append(name)
                else:
                    leave_out(posixpath.normpath(f"{relative}/{name}") + "/" * is_folder)
    except OSError as error:
        raise DataError(f"{directory}: this folder cannot be read: {error.strerror}") from None
    names.sort(reverse=True)
    while names:  # a name that is used takes no memory any more
        path = posixpath.normpath(f"{relative}/{(name := names.pop())}")
        if name.endswith("/"):
            yield from _images_below(os.path.join(directory, name[:-1]), path, (*above, place), takes, leave_out)
        else:
            yield path


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk that follows links to folders and enters no folder twice, so that a link may lead back.

    Raises DataError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: this folder cannot be read: {error.strerror}") from None

    seen = set()
    for directory, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(directory)
        if (place := (status.st_dev, status.st_ino)) in seen:
            folders.clear()
        else:
            seen.add(place)
            yield directory, folders, names


def is_image(name: str, suffixes: Set[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a file's name is that of an image; `._name` is not, in which macOS keeps what belongs to `name`."""
    return os.path.splitext(name)[1].lower() in suffixes and not is_hidden(name)


def is_hidden(path: str) -> bool:
    """Whether a listed path has a part that is hidden or a system's own; of an absolute path the last one counts."""
    parts = path.split("/")[-1:] if path.startswith("/") else path.split("/")
    return any(part in SYSTEM_FOLDERS or part.startswith(".") for part in parts if part not in (".", ".."))


def shared_images(samples: Sequence[Sample], others: Sequence[Sample], data_root: str | Path) -> list[str]:
    """The images of `samples` that are also among `others`, however either list writes their paths."""
    root, samples = os.path.abspath(data_root), Samples.of(samples)
    wanted = set(samples.places(root))
    taken = {place for place in Samples.of(others).places(root) if place in wanted}
    return [samples[k].image for k, place in enumerate(samples.places(root)) if place in taken] if taken else []


def location(data_root: str | Path, image: str | Path) -> str:
    """The same text for the same path, however a list writes it."""
    return os.path.abspath(os.path.join(data_root, image))
