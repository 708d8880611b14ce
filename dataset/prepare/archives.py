"""Files as they were downloaded: archives, which are never trusted, and folders, read one file at a time."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.atomic import replacing
from dataset.errors import DataError
from dataset.lists import is_hidden, walk

_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz")
_UNREADABLE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError, ValueError)


class Member(NamedTuple):
    """A file of a source: its path in it (with slashes), its size in bytes, and its content.

    `read` works only while the member is the one that `members` has just given.
    """

    path: str
    size: int
    read: Callable[[], bytes]


def find_sources(path: Path, archives: Sequence[str]) -> list[Path]:
    """An archive or another file itself; a folder and the archives directly in it that match a pattern of `archives`.

    Raises DataError for a path that does not exist or cannot be read.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise DataError(f"--source {path}: no such file or folder")
    try:
        inside = sorted(file for file in path.iterdir() if any(fnmatch.fnmatch(file.name, name) for name in archives))
    except OSError as error:
        raise _damaged(path, error) from None
    inside = [file for file in inside if not is_hidden(file.name) and file.is_file()]
    return [path, *(file for file in inside if file.suffix.lower() in _ARCHIVE_SUFFIXES)]


def members(source: Path) -> Iterator[Member]:
    """The files of a folder (links followed), of a tar (compressed or not) or of a zip; of another file, itself.

    Hidden files and folders are left out.

    An archive comes in its own order, and no more than one member is held in memory. Raises DataError for a source that
    cannot be read to its end, and for an archive with a path that leads out of it, a link or a device.
    """
    try:
        if source.is_dir():
            yield from _folder_members(source)
        elif tarfile.is_tarfile(source):  # first: a tar may end with a zip
            yield from _tar_members(source)
        elif zipfile.is_zipfile(source):
            yield from _zip_members(source)
        elif source.suffix.lower() in _ARCHIVE_SUFFIXES:
            raise DataError(f"{source}: damaged or incomplete: not a readable archive; download it again")
        else:
            yield Member(source.name, source.stat().st_size, source.read_bytes)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _damaged(source, error) from None


def _folder_members(folder: Path) -> Iterator[Member]:
    for directory, folders, names in walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            path = Path(directory, name)
            if not is_hidden(name) and path.is_file():  # hidden ones may be temporary files of `new_file`
                yield Member(path.relative_to(folder).as_posix(), path.stat().st_size, _guarded(path, path.read_bytes))


def _zip_members(source: Path) -> Iterator[Member]:
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            _check_member(source, info.filename, stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG))
            if is_hidden(info.filename):
                continue
            yield Member(info.filename, info.file_size, _guarded(source, lambda info=info: archive.read(info)))


def _tar_members(source: Path) -> Iterator[Member]:
    with tarfile.open(source) as archive:
        for info in archive:
            if info.isdir():
                continue
            _check_member(source, info.name, info.isreg())
            if is_hidden(info.name):
                continue
            yield Member(info.name, info.size, _guarded(source, lambda info=info: archive.extractfile(info).read()))
        # tarfile takes a missing end, or a damaged header, for the end, which is marked by two blocks of zeros.
        marked = archive.fileobj.tell() - archive.offset == tarfile.BLOCKSIZE
        if not marked or any(archive.fileobj.read(tarfile.BLOCKSIZE)):
            raise EOFError("its end is missing")


def _check_member(source: Path, name: str, regular: bool) -> None:
    parts = re.split(r"[/\\]", name)
    if ".." in parts or not parts[0] or ":" in parts[0]:
        raise DataError(f"{source}: {name!r} leads out of the archive, so it is not the official one; nothing is taken")
    if not regular:
        raise DataError(
            f"{source}: {name!r} is a link or a device, so it is not the official archive; nothing is taken"
        )


def _guarded(source: Path, read: Callable[[], bytes]) -> Callable[[], bytes]:
    def guarded() -> bytes:
        try:
            return read()
        except _UNREADABLE as error:
            raise _damaged(source, error) from None

    return guarded


def _damaged(source: Path, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno:
        return DataError(f"{error.filename or source}: cannot be read: {error.strerror}")
    return DataError(f"{source}: damaged or incomplete ({error}); download it again")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written; it becomes `path` when all went well, and is gone otherwise.

    A killed process leaves a hidden file, see dataset.atomic.remove_leftovers. Raises DataError if the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None
