"""One run at a time in a save path: a lock file that says whose it is, and that a crash cannot leave shut."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from util.errors import SavePathError

LOCK_FILE = "run.lock"
BEAT = 30  # seconds between two signs of life, the file's time of change
# Where another machine's locks are not to be seen, such as on some network file systems, its signs of life count.
STALE = 300  # seconds


@contextlib.contextmanager
def locked(save_path: Path) -> Iterator[list[str]]:
    """Hold the lock of `save_path`; yields what there is to say, one line where a dead run's lock is taken over.

    Raises SavePathError, which names the other run's machine and process, while another run has it. A run is dead if
    it was on this machine and its process is gone, or on another one and has given no sign of life for minutes.
    """
    path = save_path / LOCK_FILE
    file, notes = _acquire(path)
    stopped = threading.Event()
    beats = threading.Thread(target=_beat, args=(file.fileno(), stopped), daemon=True, name="lock")
    beats.start()
    try:
        yield notes
    finally:
        stopped.set()
        beats.join()
        with contextlib.suppress(OSError):
            if _is_at(file, path):
                path.unlink()
        file.close()


def _acquire(path: Path) -> tuple[TextIO, list[str]]:
    notes: list[str] = []
    try:
        while True:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
            free, owner = _try_lock(file), _read(file)
            if not _is_at(file, path):  # its owner removed it meanwhile
                file.close()
                continue
            if owner and _is_alive(owner, path, free):
                raise SavePathError(
                    f"{path.parent}: another run writes there: process {owner['pid']} on {owner['host']}, since "
                    f"{owner['since']}; wait for it, end it, or choose another --save-path"
                )
            if not free and not owner:
                raise SavePathError(f"{path.parent}: another run is starting there; choose another --save-path")
            if owner:
                notes.append(
                    f"note: a run of {owner['since']} (process {owner['pid']} on {owner['host']}) ended without giving "
                    "the save path free; this one takes over"
                )
            if not free:  # by a machine that is gone: a new file has no lock
                path.unlink()
                file.close()
                continue
            file.truncate(0)
            file.write(json.dumps(_own()))
            file.flush()
            return file, notes
    except OSError as error:
        raise SavePathError(f"{path}: cannot be locked: {error.strerror}") from None


def _try_lock(file: TextIO) -> bool:
    """Whether nobody else holds a lock on the file. POSIX locks: they reach over NFS, and no child inherits them."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # anything else: there are no locks on this file system
    return True


def _is_alive(owner: dict[str, Any], path: Path, free: bool) -> bool:
    own = _own()
    if (owner["host"], owner["boot"]) == (own["host"], own["boot"]):
        return not free or (owner["pid"] != own["pid"] and owner["start"] == _start_time(owner["pid"]))
    with tempfile.TemporaryFile(dir=path.parent) as now:  # by the clock of the file system, as the other's signs are
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime < STALE


def _own() -> dict[str, Any]:
    pid = os.getpid()
    since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "start": _start_time(pid), "since": since}


def _boot() -> str:
    """This machine's identity since it was started; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _start_time(pid: int) -> str | None:
    """When a process of this machine started, in ticks: numbers of processes are used again. None: there is none."""
    try:
        # The name, in parentheses, may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    return ""


def _read(file: TextIO) -> dict[str, Any] | None:
    """Who holds the lock, as far as the file tells."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return None
    known = {"host": str, "boot": str, "pid": int, "since": str}
    whole = isinstance(owner, dict) and all(isinstance(owner.get(key), kind) for key, kind in known.items())
    return owner if whole and "start" in owner else None


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the open file is still what the path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _beat(handle: int, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(handle)
