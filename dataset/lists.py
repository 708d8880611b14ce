"""List files and folders of images: which images and labels a run uses."""

from __future__ import annotations

import codecs
import hashlib
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
ALLOW_OUTSIDE = "allow_outside_root: true permits that"
# Folders that systems put among a user's files; others of that kind are hidden, their names begin with a dot.
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"})
# A first line of these words alone is the heading of a table.
HEADINGS = frozenset(
    ("image", "images", "img", "file", "filename", "file_name", "path", "image_path", "image_name", "image_id", "id")
    + ("label", "labels", "label_path", "mask", "masks", "mask_path", "annotation", "annotations", "gt", "target")
)


class Sample(NamedTuple):
    """One line of a list: paths relative to the data root; an unlabelled line may have no label."""

    image: str
    label: str | None


def read_list(path: str | Path, labels: bool = True, inside: str | Path | None = None) -> list[Sample]:
    """Read a list file: `image label` or just `image` a line, blank lines and `#` comments allowed.

    Columns are separated by white space. A line with a tab in it, were it the line's last character, is split at tabs
    only, so that names may contain spaces. With `labels`, every line must have a label. With `inside`, the data root,
    no path may leave that folder. Raises DataError for a missing, empty or malformed list.
    """
    samples, root = [], None if inside is None else os.path.abspath(inside)
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        line = line.lstrip()
        if not line or line.startswith("#"):
            continue
        columns = [column.strip() for column in re.split(r"\t+", line.rstrip())] if "\t" in line else line.split()
        if not samples and {word.strip("\"'").lower() for word in re.split(r"[\s,;]+", line) if word} <= HEADINGS:
            raise DataError(f"{path}:{number}: '{line.strip()}' is a heading, no image: remove the line")
        if len(columns) > 2:
            raise DataError(
                f"{path}:{number}: expected `image label`, found {len(columns)} columns "
                "(put a tab between the columns where names contain spaces)"
            )
        if labels and len(columns) < 2:
            hint = " (a tab, also at the line's end, makes tabs its only separators)" if "\t" in line else ""
            hint = hint or (" (white space separates the two, not a comma)" if "," in line else "")
            raise DataError(
                f"{path}:{number}: {columns[0]} has no label beside it; a labelled line is `image label`{hint}"
            )
        for column in columns:
            # Most paths are plain: only one that begins with / or goes up can lie outside.
            if root is not None and (column.startswith("/") or ".." in column) and not is_inside(column, root):
                raise DataError(f"{path}:{number}: {column} lies outside data_root ({inside}); {ALLOW_OUTSIDE}")
        samples.append(Sample(columns[0], columns[1] if len(columns) == 2 else None))
    if not samples:
        raise DataError(f"{path}: the list is empty")
    return samples


def _read_text(path: str | Path) -> str:
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such list file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable list file: {error}") from None
    try:
        text = content.decode("utf-8-sig")  # some Windows programs begin a file with a mark
        if "\0" not in text:
            return text
    except ValueError:
        pass
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:64]
    found = "UTF-16 text" if wide else "no UTF-8 text"
    raise DataError(f"{path}: not a readable list file: {found}; save it as UTF-8")


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
        raise DataError(f"{source}: neither a list file nor a folder under {data_root}; {ALLOW_OUTSIDE}")
    elif folder.is_dir():
        images = images_in(folder, Path(data_root))
    else:
        raise DataError(f"{source}: neither a list file nor a folder under {data_root}")
    root = os.path.abspath(data_root)  # once, not for each of millions of images
    taken = {location(root, sample.image) for sample in labeled}
    samples = [Sample(image, None) for image in images if location(root, image) not in taken]
    if not samples:
        raise DataError(f"{source}: no unlabelled image in it ({len(images)} images, all of them labelled)")
    return samples


def list_digest(samples: Sequence[Sample]) -> str:
    """A short fingerprint of a list's content, to notice that a resumed run was given other images."""
    text = "\n".join(f"{sample.image}\t{sample.label or ''}" for sample in samples)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def images_in(folder: Path, root: Path, left_out: list[str] | None = None) -> list[str]:
    """The images in `folder` and the folders in it, sorted, as paths relative to `root`. Raises DataError for none.

    Links to folders are followed, but not back into a folder that leads there; what is hidden is left out. `left_out`
    gets the paths of all else: hidden folders and images, links that lead back, files of other kinds.
    """
    found, left_out = [], [] if left_out is None else left_out
    around = Path(os.path.realpath(folder)).parents
    # A folder, and what it lies in: (device, number) of each folder.
    waiting = [(str(folder), tuple((status.st_dev, status.st_ino) for status in map(os.stat, around)))]
    while waiting:
        directory, above = waiting.pop()
        relative = Path(os.path.relpath(directory, root)).as_posix()
        try:
            status = os.stat(directory)
            place = (status.st_dev, status.st_ino)
            if place in above:
                left_out.append(f"{relative}/")
                continue
            with os.scandir(directory) as entries:
                listed = [(entry.name, entry.is_dir(), entry.is_file() or entry.is_symlink()) for entry in entries]
        except OSError as error:
            raise DataError(f"{directory}: this folder cannot be read: {error.strerror}") from None
        for name, is_folder, is_file in listed:
            path = posixpath.normpath(f"{relative}/{name}")
            if is_folder and not is_hidden(f"{name}/"):
                waiting.append((os.path.join(directory, name), (*above, place)))
            elif not is_folder and is_file and is_image(name):  # opening a pipe would wait for ever
                found.append(path)
            else:
                left_out.append(f"{path}/" if is_folder else path)
    if not found:
        raise DataError(f"{folder}: no image in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image; `._name` is not, in which macOS keeps what belongs to `name`."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not is_hidden(name)


def is_hidden(path: str) -> bool:
    """Whether a listed path has a part that is hidden or a system's own; of an absolute path the last one counts."""
    parts = path.split("/")[-1:] if path.startswith("/") else path.split("/")
    return any(part in SYSTEM_FOLDERS or part.startswith(".") for part in parts if part not in (".", ".."))


def shared_images(samples: Sequence[Sample], others: Sequence[Sample], data_root: str | Path) -> list[str]:
    """The images of `samples` that are also among `others`, however either list writes their paths."""
    root = os.path.abspath(data_root)
    wanted = {location(root, sample.image) for sample in samples}
    taken = {path for sample in others if (path := location(root, sample.image)) in wanted}
    return [sample.image for sample in samples if location(root, sample.image) in taken]


def location(data_root: str | Path, image: str | Path) -> str:
    """The same text for the same path, however a list writes it."""
    return os.path.abspath(os.path.join(data_root, image))
