"""Atomic writes: a file is replaced as a whole or not at all, and a kill leaves no half of it under its name."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(
    path: Path,
    durable: bool = False,
    temporary: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """A temporary path beside `path`, to be written. It takes the place of `path` if the block ends without an error.

    `durable` waits for the disk, so that a power cut cannot leave an empty file either. The folder must exist. Raises
    OSError; the temporary file is then gone. A killed process leaves it: see `remove_leftovers`. With one writer at a
    time, `temporary` may be a fixed path, which the next write overwrites. `check` runs right before the replacing and
    may refuse it by raising an error.
    """
    temporary = temporary or path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        check()
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # on a file system that became read-only it stays
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`; nobody may be writing there."""
    if folder.is_dir():
        for path in folder.glob(".*.tmp"):
            if re.fullmatch(r"\..+\.[0-9a-f]+\.tmp", path.name):
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return once the file's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where its file system lets a folder be opened."""
    with contextlib.suppress(OSError):
        sync(folder)
