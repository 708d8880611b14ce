"""One run at a time in a save path: a lock file that names its owner and that a crash cannot leave locked."""

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
HEARTBEAT = 30  # seconds between two heartbeats: the lock file's modification time
# Some network file systems do not show another machine's locks. Then its heartbeats count.
STALE = 300  # seconds without a heartbeat

_held: dict[Path, tuple[TextIO, str]] = {}  # this process's locks: the open file, and what it wrote there


@contextlib.contextmanager
def locked(save_path: Path) -> Iterator[list[str]]:
    """Hold the lock of `save_path`; yields notes for the log: a line where a dead run's lock is taken over.

    Raises SavePathError, which names the other run's machine and process, while another run has it. A run is dead if
    its process on this machine is gone, or if it ran on another machine and sent no heartbeat for minutes.
    """
    path = save_path / LOCK_FILE
    file, own, notes = _acquire(path)
    key = save_path.resolve()
    _held[key] = file, own
    stopped = threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(key, stopped), daemon=True, name="lock")
    heartbeat.start()
    try:
        yield notes
    finally:
        stopped.set()
        heartbeat.join()
        release(save_path)
        del _held[key]
        file.close()


def release(save_path: Path) -> None:
    """Give `save_path` free, if this process has locked it: before an end that does not come by the end of `locked`.

    Then another machine need not wait until the heartbeats have been missing for minutes.
    """
    key = save_path.resolve()
    with contextlib.suppress(OSError):
        if key in _held and _is_own(key / LOCK_FILE, *_held[key]):
            (key / LOCK_FILE).unlink()


def check_lock(save_path: Path) -> None:
    """Raise SavePathError if this process has held the lock of `save_path` and another run has taken it over.

    That happens to a run that was suspended for minutes. Call it before each write there. A process that has not
    locked the folder passes.
    """
    key = save_path.resolve()
    if key not in _held or _is_own(key / LOCK_FILE, *_held[key]):
        return
    try:
        # Not through a second open file unless the lock is lost: closing that would free a POSIX lock.
        owner = json.loads((key / LOCK_FILE).read_text(encoding="utf-8"))
        by = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        by = "it has ended since"
    raise SavePathError(
        f"{save_path}: another run took over ({by}) while this one was suspended; this one ends and writes nothing more"
    )


def _acquire(path: Path) -> tuple[TextIO, str, list[str]]:
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
            if not free:  # by a machine that is gone or suspended: a new file has no lock
                path.unlink()
                file.close()
                continue
            own = json.dumps(this_process())
            file.truncate(0)
            file.write(own)
            file.flush()
            return file, own, notes
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
    own = this_process()
    if (owner["host"], owner["boot"]) == (own["host"], own["boot"]):
        return not free or (owner["pid"] != own["pid"] and owner["start"] == start_time(owner["pid"]))
    with tempfile.TemporaryFile(dir=path.parent) as now:  # by the clock of the file system, as heartbeats are
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime < STALE


def this_process() -> dict[str, Any]:
    """What a lock file says of its owner, for this process."""
    pid = os.getpid()
    since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "start": start_time(pid), "since": since}


def _boot() -> str:
    """This machine's identity since it was started; empty where the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def start_time(pid: int) -> str | None:
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
    """Who holds the lock, as far as the file says."""
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


def _is_own(path: Path, file: TextIO, own: str) -> bool:
    """Whether the lock file is still the one of this process, unchanged."""
    try:
        # Without locks of the file system another run writes into the same file.
        return _is_at(file, path) and os.pread(file.fileno(), len(own) + 1, 0).decode(errors="replace") == own
    except OSError:  # such as a network file system that is away for a moment: the write itself will show it
        return True


def _send_heartbeats(key: Path, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            file, own = _held[key]
            if _is_own(key / LOCK_FILE, file, own):
                os.utime(file.fileno())
