"""A cache of decoded images and labels, in memory or on a disk, shared by the loading processes of a machine.

Each picture is one file: a header with the size and the time of change of its source file, then the pixels row by row.
Readers map the file into memory and so read only the part that a crop needs. A file gets its name when it is complete:
neither two writers nor a kill can leave half a picture. A full cache keeps what it has. Every picture is used once an
epoch, so replacing some by others would gain nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.atomic import replacing
from dataset.errors import DataError
from dataset.files import LabelColors, read_indices, read_pixels
from dataset.handover import SHARED_MEMORY

MAX_MAPS = 4096  # pictures that a process keeps mapped; labelled ones, which come often, mostly stay among them
SPARE = 2**30  # bytes left free: batches from the workers need shared memory too
_PREFIX = "unimatch-cache-"
# Magic, bytes and time (ns) of the source file, height, width, channels (0: a label).
_HEADER = struct.Struct("<8sQQIII")
_MAGIC = b"pixels01"


class ImageCache:
    """Decoded pictures in `folder`, at most `limit` bytes of them.

    Any number of processes may open one folder. `image` and `label` return read-only arrays of what the files hold now;
    a picture that does not fit is decoded each time. Pickles and forks into workers.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._maps: OrderedDict[tuple[str | Path, str, int], tuple[tuple[int, int], np.ndarray]] = OrderedDict()
        try:
            self._lock, self._owner = _hold(self.folder), os.getpid()
            with self._counter() as counter:  # counted again: a killed writer may have reserved what it never wrote
                counter.write(_size(self.folder))
        except OSError as error:
            raise DataError(f"cache_dir {self.folder}: cannot be used: {error.strerror}") from None

    def image(
        self,
        path: str | Path,
        channels: int = 3,
        read: Callable[[str | Path], np.ndarray] | None = None,
        variant: str = "",
    ) -> np.ndarray:
        """uint8 (H, W, channels), as `read` (default: `read_pixels`) gives it; raises its DataError.

        `variant` names the way of reading, where there are several.
        """
        return self._get(path, read or read_pixels, channels, variant)

    def label(self, path: str | Path, colors: LabelColors | None = None) -> np.ndarray:
        """uint8 (H, W), as `read_indices` gives it; raises its DataError."""
        variant = f" {sorted(colors.items())}" if colors else ""
        return self._get(path, lambda label: read_indices(label, colors), 0, variant)

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_maps": OrderedDict()}

    def _get(
        self, path: str | Path, read: Callable[[str | Path], np.ndarray], channels: int, variant: str = ""
    ) -> np.ndarray:
        if os.getpid() != self._owner:  # a worker: its parent holds the folder, and may run longer
            self.close()
        try:
            source = os.stat(path)
        except OSError:
            return read(path)  # which says what is wrong
        stamp = (source.st_size, source.st_mtime_ns)
        made_of, pixels = self._maps.pop((path, variant, channels), (None, None))
        if made_of != stamp:
            name = hashlib.sha256(
                f"{channels} {os.path.abspath(path)}{variant}".encode("utf-8", "backslashreplace")
            ).hexdigest()[:40]
            entry = os.path.join(self.folder, name[:2], name)
            pixels = _read_entry(entry, stamp, channels)
            if pixels is None:
                pixels = read(path)
                # A full or failing cache costs time, not the run.
                with contextlib.suppress(OSError):
                    self._write(Path(entry), stamp, channels, pixels)
                return pixels
        self._maps[path, variant, channels] = stamp, pixels
        if len(self._maps) > MAX_MAPS:
            self._maps.popitem(last=False)
        return pixels

    def _write(self, entry: Path, stamp: tuple[int, int], channels: int, pixels: np.ndarray) -> None:
        needed = _HEADER.size + pixels.nbytes
        if not self._reserve(needed):
            return
        entry.parent.mkdir(exist_ok=True)
        replaced = 0
        try:
            with replacing(entry) as temporary:
                with open(temporary, "wb") as file:
                    file.write(_HEADER.pack(_MAGIC, *stamp, *pixels.shape[:2], channels))
                    file.write(np.ascontiguousarray(pixels))
                    file.flush()
                    os.fsync(file.fileno())  # else a power cut could leave a whole file of zeros under the name
                replaced = entry.stat().st_size if entry.exists() else 0
        except OSError:
            replaced = needed
            raise
        finally:
            if replaced:
                with self._counter() as counter:
                    counter.write(max(counter.read() - replaced, 0))

    def _reserve(self, needed: int) -> bool:
        """Take `needed` bytes of the limit, unless that is used up or the disk is nearly full."""
        if shutil.disk_usage(self.folder).free - needed < SPARE:
            return False
        with self._counter() as counter:
            used = counter.read()
            if used + needed > self.limit:
                return False
            counter.write(used + needed)
        return True

    @contextlib.contextmanager
    def _counter(self) -> Iterator[_Counter]:
        """The bytes that are used, locked against the other processes."""
        handle = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield _Counter(handle)
        finally:
            os.close(handle)


class _Counter:
    def __init__(self, handle: int) -> None:
        self._handle = handle

    def read(self) -> int:
        return int.from_bytes(os.pread(self._handle, 8, 0), "little")

    def write(self, value: int) -> None:
        os.pwrite(self._handle, value.to_bytes(8, "little"), 0)


def open_cache(
    kind: str, gigabytes: float, folder: str | Path | None = None, name: str = ""
) -> contextlib.AbstractContextManager[ImageCache | None]:
    """The cache of a run as a context manager: `kind` is none, ram or disk; `gigabytes` (1e9 bytes) bounds it.

    `disk`: in `folder`, where later runs find it again. `ram`: in shared memory, under `name`, which a run's processes
    on one machine have in common; it goes when the last of them ends, and what a killed run left is removed when the
    next one starts. Raises DataError where there is no room.
    """
    if kind == "none":
        return contextlib.nullcontext()
    if kind == "disk":
        return _opened(Path(folder), gigabytes, f"cache_dir {folder}: the disk has", "choose another folder")
    if not SHARED_MEMORY.is_dir():
        raise DataError(f"cache: ram needs {SHARED_MEMORY}, which this system does not have; use cache: disk")
    remove_unused()
    digest = _digest(name)[:16]
    place = SHARED_MEMORY / f"{_PREFIX}{os.getuid()}-{digest}"
    return _opened(place, gigabytes, f"cache: ram: {SHARED_MEMORY} has", "give a container more by --shm-size")


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()  # file names may be no UTF-8


@contextlib.contextmanager
def _opened(folder: Path, gigabytes: float, has: str, advice: str) -> Iterator[ImageCache]:
    cache = ImageCache(folder, int(gigabytes * 1e9))
    try:
        free = shutil.disk_usage(folder).free
        if free < 2 * SPARE and _size(folder) < SPARE:
            raise DataError(f"{has} {free / 1e9:.1f} GB free, of which 1 is left alone: {advice}, or set cache: none")
        yield cache
    finally:
        cache.close()
        remove_unused()


def remove_unused() -> None:
    """Remove this user's caches in shared memory that no process holds any more."""
    for folder in SHARED_MEMORY.glob(f"{_PREFIX}{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)


def _hold(folder: Path) -> int:
    """A lock that says `folder` is in use; the system lets go of it when the process ends, however it ends."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # removed in between, as unused
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.fstat(handle).st_ino == os.stat(folder / "lock").st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _read_entry(entry: str, stamp: tuple[int, int], channels: int) -> np.ndarray | None:
    """The pixels of `entry`, mapped, if it is whole and made of the source file with this stamp."""
    try:
        # Not by the mmap module, whose maps hold a file descriptor each.
        mapped = torch.from_file(entry, shared=False, size=os.stat(entry).st_size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError):  # it is missing, or was replaced meanwhile
        return None
    if len(mapped) < _HEADER.size:
        return None
    magic, size, changed, height, width, depth = _HEADER.unpack_from(mapped)
    shape = (height, width, channels) if channels else (height, width)
    whole = len(mapped) == _HEADER.size + height * width * max(channels, 1)
    if not whole or (magic, size, changed, depth) != (_MAGIC, *stamp, channels):
        return None
    pixels = mapped[_HEADER.size :].reshape(shape)
    pixels.flags.writeable = False
    return pixels


def _size(folder: Path) -> int:
    """Bytes of the pictures in `folder`; what a killed writer left behind is removed."""
    total = 0
    for entry in folder.glob("??/*"):
        with contextlib.suppress(OSError):  # another process may be busy here
            status = entry.stat()
            if entry.name.startswith(".") and time.time() - status.st_mtime > 3600:
                entry.unlink()
            else:
                total += status.st_size
    return total
