"""What a tool writes: never over a file that it did not write itself, whole or not at all, and recognised again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dataset import DataError, atomic
from dataset.windows import no_pixel_limit
from util.errors import ConfigError

# The mark of a file that a tool wrote, and of what it was made: texts of a PNG, a comment of a JPEG or zip.
MARK, FINGERPRINT = "UniMatch tool output", "Fingerprint"
TABLE_HEADER = (
    "class,name,iou,accuracy,boundary_iou,pixels,predicted_pixels"  # of evaluate's table: a CSV has no comments
)
TIFF_SOFTWARE, TIFF_DESCRIPTION = 305, 270
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
NAME_LIMIT = 255 - len("..part")  # bytes, so that a temporary name fits into the 255 of file systems


def check_suffix(option: str, path: str | Path, allowed: Iterable[str]) -> None:
    """Raise ConfigError if a file that is to be written at the end has another suffix than those `allowed`."""
    if Path(path).suffix.lower() not in allowed:
        raise ConfigError(f"{option} {path}: the suffix must be one of {', '.join(allowed)}")


def check_targets(targets: Iterable[str | Path], sources: Iterable[tuple[str, str | Path]]) -> dict[Path, str]:
    """Raise ConfigError if a target is one of the `(kind, path)` that are only read, or exists and is not a tool's own.

    Files are compared by identity: neither another spelling of the path nor a link hides a file. Returns the marks of
    the targets that exist.
    """
    targets, marks = [Path(target) for target in targets], {}
    existing = {identity(target) for target in targets} - {None}  # few, where the sources may be millions
    known = {key: (kind, path) for kind, path in sources if (key := identity(path)) in existing}
    for target in targets:
        key = identity(target)
        if key in known:
            kind, path = known[key]
            raise ConfigError(f"{target}: is the {kind} {path}, which would be overwritten: choose another output")
        if key:
            mark = read_mark(target)
            if mark is None:
                what = "is a folder" if target.is_dir() else "exists, and these tools did not write it"
                raise ConfigError(f"{target}: {what}: choose another output, or move it away")
            marks[target] = mark
        for folder in target.parents:
            if folder.exists():
                if not folder.is_dir():
                    raise ConfigError(f"{target}: cannot be written: {folder} is no folder: choose another output")
                break
    return marks


def identity(path: str | Path) -> tuple[int, int] | None:
    """Device and inode of the file that `path` leads to; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return status.st_dev, status.st_ino


def is_own(path: str | Path) -> bool:
    """Whether a tool of this project wrote this file."""
    return read_mark(path) is not None


def read_mark(path: str | Path) -> str | None:
    """What the file was made of, as its mark says; None for a file that no tool of this project wrote."""
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return _marked(archive.comment)
        if suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/metadata.json"))
                return "" if json.loads(archive.read(name)).get("tool") == MARK else None
        if suffix in (".html", ".json", ".md", ".csv", ".txt", ".onnx", ".png"):
            with open(path, "rb") as file:
                head = file.read(500)
            marked = MARK.encode() in head or head.startswith(TABLE_HEADER.encode())
            if suffix != ".png" or not marked:  # of a folder of PNGs none is taken apart in vain
                return "" if marked else None
        with no_pixel_limit(), Image.open(path) as image:  # the header alone; nothing is decoded
            if image.info.get("Software") == MARK:
                return image.info.get(FINGERPRINT, "")
            tags = getattr(image, "tag_v2", {})  # of a TIFF
            if tags.get(TIFF_SOFTWARE) == MARK:
                return tags.get(TIFF_DESCRIPTION, "").removeprefix(f"{FINGERPRINT} ")
            return _marked(image.info.get("comment") or b"")
    except Exception:  # whatever a file that is none of ours makes its reader raise
        return None


def _marked(comment: bytes) -> str | None:
    if not comment.startswith(MARK.encode()):
        return None
    return json.loads(comment[len(MARK) :] or b'""')


def comment(fingerprint: str = "") -> bytes:
    """The mark as a comment of a JPEG or zip file."""
    return MARK.encode() + json.dumps(fingerprint).encode()


def save_picture(image: Image.Image, path: Path, fingerprint: str = "", optimize: bool = False) -> None:
    """Save a picture, by its suffix, with the mark of the tools; `optimize`: a smaller PNG. Raises ConfigError."""
    with writing(path) as file:
        if path.suffix.lower() == ".png":
            text = PngInfo()
            text.add_text("Software", MARK)
            text.add_text(FINGERPRINT, fingerprint)
            image.save(file, "PNG", pnginfo=text, optimize=optimize)
        else:
            image.convert("RGB").save(file, "JPEG", quality=92, comment=comment(fingerprint))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is complete; its folder is made. Raises ConfigError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        yield file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` once it is complete; its folder is made. Raises ConfigError.

    The name is always the same, so that a run that continues a killed one leaves nothing behind. A name that is too
    long is a DataError: others may not be.
    """
    name = path.name
    if len(os.fsencode(name)) > NAME_LIMIT:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.part")
        temporary.unlink(missing_ok=True)  # of a killed run; or a link, whose target is nobody's to write to
        with atomic.replacing(path, temporary=temporary):
            yield temporary
    except OSError as error:
        kind = DataError if error.errno == errno.ENAMETOOLONG else ConfigError
        raise kind(f"{path}: cannot be written: {error.strerror or error}") from None
