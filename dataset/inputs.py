"""Pictures to predict: single files, folders, globs and lists, each with the place of its prediction."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from dataset.errors import DataError
from dataset.lists import IMAGE_SUFFIXES, is_hidden, is_inside, read_list, walk


class Picture(NamedTuple):
    """An image, its place relative to the output folder (with the image's suffix) and its label, if one is listed."""

    path: Path
    place: Path
    label: Path | None = None


class Found(NamedTuple):
    """The pictures, the files in folders that are none, and the predictions of earlier runs among them."""

    pictures: list[Picture]
    left_out: list[Path]
    predictions: list[Path]


def find_pictures(
    sources: Iterable[str | Path],
    data_root: str | Path,
    allow_outside: bool = False,
    is_prediction: Callable[[Path], bool] = lambda path: False,
    suffixes: Iterable[str] = IMAGE_SUFFIXES,
) -> Found:
    """What `sources` name: images, folders (searched in depth, hidden ones left out), globs, or list files.

    The place of a folder's image is its path in that folder, that of a glob's its path from the part without wildcards,
    that of a listed one its path in `data_root`. Files of which `is_prediction` are never among the pictures of a
    folder or a glob. Raises DataError for what does not exist and for a folder or glob without a picture.
    """
    found, suffixes = Found([], [], []), frozenset(suffixes)
    for source in sources:
        text, path, before = str(source), Path(source), len(found.pictures)
        if path.is_dir():
            _take(found, _files_in(path), path, suffixes, is_prediction)
            kind = "folder"
        elif os.path.exists(path):
            if path.suffix.lower() in suffixes:
                found.pictures.append(Picture(path, Path(path.name)))
            else:
                found.pictures.extend(_listed(path, data_root, allow_outside, suffixes))
            continue
        elif glob.has_magic(text):
            base = Path(*(part for part in _before_wildcards(path)))
            _take(found, _globbed(text), base, suffixes, is_prediction)
            kind = "glob"
        else:
            raise DataError(f"{source}: no such image, folder or list file")
        if len(found.pictures) == before:
            earlier = ", predictions of earlier runs left out" if found.predictions else ""
            raise DataError(f"{source}: no image in this {kind} ({', '.join(sorted(suffixes))}{earlier})")
    return found


def _take(
    found: Found, files: Iterable[Path], base: Path, suffixes: frozenset[str], is_prediction: Callable[[Path], bool]
) -> None:
    for path in files:
        if path.suffix.lower() not in suffixes:
            found.left_out.append(path)
        elif is_prediction(path):
            found.predictions.append(path)
        else:
            found.pictures.append(Picture(path, Path(os.path.relpath(path, base))))


def _files_in(folder: Path) -> list[Path]:
    """All files in depth, sorted, without hidden ones; a link back into a folder that was seen is not followed."""
    files = []
    for directory, folders, names in walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        files += [Path(directory, name) for name in names if not is_hidden(name)]
    return sorted(files)


def _globbed(pattern: str) -> list[Path]:
    """The files of a glob, sorted, each once: `**` follows links, also those that lead back."""
    files: dict[str, Path] = {}
    for name in sorted(glob.glob(pattern, recursive=True), key=lambda name: (name.count(os.sep), name)):
        if os.path.isfile(name):
            files.setdefault(os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name)), Path(name))
    return sorted(files.values())


def _before_wildcards(path: Path) -> list[str]:
    parts = list(path.parts)
    count = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return parts[:count]


def _listed(path: Path, root: str | Path, allow_outside: bool, suffixes: frozenset[str]) -> list[Picture]:
    try:
        samples = read_list(path, labels=False, inside=None if allow_outside else root)
    except DataError as error:
        if path.suffix.lower() in (".txt", ".lst", ".list", ""):
            raise
        known = ", ".join(sorted(suffixes))
        raise DataError(f"{error} (taken for a list, since its suffix is none of an image: {known})") from None
    pictures = []
    for image, label in samples:
        # Predictions stay in the output folder wherever the image is.
        place = os.path.relpath(Path(root, image), root) if is_inside(image, root) else Path(image).name
        pictures.append(Picture(Path(root, image), Path(place), Path(root, label) if label else None))
    return pictures
