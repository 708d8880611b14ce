"""Two runs cannot write to one save path, and a crash does not leave it shut."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model import read_checkpoint
from tests.helpers import PROJECT_ROOT
from util import checkpoint, lock
from util.checkpoint import copy_checkpoint, save_checkpoint, writing
from util.errors import SavePathError
from util.lock import LOCK_FILE, check_lock, locked, release
from util.log import RunLog
from util.run_files import LOG_FILE

HOLDER = """
import sys, time
from pathlib import Path
from util.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def _refusal(path: Path) -> str:
    with pytest.raises(SavePathError) as caught, locked(path):
        pass
    return str(caught.value)


def _leave(path: Path, age: float = 0, **changes: object) -> dict[str, object]:
    """A lock file as a crashed run leaves it, last touched `age` seconds ago."""
    owner = {**lock.this_process(), "pid": _dead_pid(), "start": "1", "since": "2026-01-02 03:04:05", **changes}
    (path / LOCK_FILE).write_text(json.dumps(owner))
    os.utime(path / LOCK_FILE, (time.time() - age,) * 2)
    return owner


def _dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_second_run_is_refused_and_the_first_one_named(tmp_path, holder):
    line = _refusal(tmp_path)
    assert line.startswith(
        f"{tmp_path}: another run writes there: process {holder.pid} on {socket.gethostname()}, since 2"
    )
    assert "\n" not in line and "another --save-path" in line
    holder.send_signal(signal.SIGSTOP)  # it is not gone
    assert _refusal(tmp_path) == line


def test_the_lock_is_given_free_at_the_end_and_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
        raise KeyError
    with locked(tmp_path) as notes:
        assert notes == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_ends_gives_the_lock_free_before_and_writes_nothing_more(tmp_path):
    release(tmp_path)  # it is not locked: nothing happens
    with locked(tmp_path):
        release(tmp_path)
        assert not (tmp_path / LOCK_FILE).exists()
        with pytest.raises(SavePathError, match="this one ends and writes nothing more"):
            check_lock(tmp_path)


def test_a_killed_runs_lock_is_taken_over_saying_so(tmp_path, holder):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie: dead all the same
    with locked(tmp_path) as (note,):
        assert f"(process {holder.pid} on {socket.gethostname()}) ended without giving the save path free" in note
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    _leave(tmp_path, pid=os.getppid(), start="1")
    with locked(tmp_path) as notes:
        assert len(notes) == 1


def test_without_locks_of_the_file_system_the_process_itself_is_looked_for(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    parent = os.getppid()
    _leave(tmp_path, pid=parent, start=lock.start_time(parent))
    assert f"process {parent} on" in _refusal(tmp_path)
    _leave(tmp_path)
    with locked(tmp_path) as notes:
        assert len(notes) == 1


def test_another_machines_run_counts_as_alive_for_minutes_after_its_last_sign(tmp_path):
    _leave(tmp_path, age=60, host="node7", boot="x")
    assert "process" in _refusal(tmp_path) and "on node7, since 2026-01-02 03:04:05" in _refusal(tmp_path)
    _leave(tmp_path, age=lock.STALE + 10, host="node7", boot="x")
    with locked(tmp_path) as (note,):
        assert "a run of 2026-01-02 03:04:05 (process" in note and "on node7)" in note


def test_a_machine_that_is_gone_leaves_a_lock_shut_only_for_minutes(tmp_path, holder):
    """Its lock is still held, as a file server may think, but by a machine that gives no sign of life."""
    path = tmp_path / LOCK_FILE
    owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "host": "node7", "boot": "x"}))
    assert "on node7" in _refusal(tmp_path)
    os.utime(path, (time.time() - lock.STALE - 10,) * 2)
    with locked(tmp_path) as notes:
        assert len(notes) == 1


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 1}', "\0\0"])
def test_a_lock_file_without_an_owner_does_not_matter(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    with locked(tmp_path) as notes:
        assert notes == []


@pytest.mark.parametrize("in_place", [False, True])
def test_a_run_whose_lock_was_taken_over_writes_nothing_more(tmp_path, in_place):
    """As after SIGSTOP, minutes, another machine's start, and SIGCONT; `in_place`: the file system has no locks."""
    best = tmp_path / "best.pth"
    other = {**lock.this_process(), "pid": 77, "host": "node7", "since": "2026-01-02 03:04:05"}
    with locked(tmp_path):
        save_checkpoint({"weights": 1}, best)
        check_lock(tmp_path)
        check_lock(tmp_path / "elsewhere")  # never locked
        with pytest.raises(SavePathError) as caught, writing(best) as temporary:
            temporary.write_bytes(b"old")
            if not in_place:
                (tmp_path / LOCK_FILE).unlink()
            (tmp_path / LOCK_FILE).write_text(json.dumps(other))
        line = str(caught.value)
        assert "took over (process 77 on node7, since 2026-01-02 03:04:05) while this one was suspended" in line
        assert "\n" not in line
        for write in (lambda: save_checkpoint({}, best), lambda: copy_checkpoint(best, tmp_path / "latest.pth")):
            with pytest.raises(SavePathError, match="took over"):
                write()
        assert read_checkpoint(best) == {"weights": 1}
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == 77  # the other one's lock stays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pth", LOCK_FILE]


@pytest.mark.parametrize("keep_last", [0, 1])
def test_a_run_that_loses_its_lock_while_it_saves_removes_nothing_of_the_other_ones(tmp_path, monkeypatch, keep_last):
    save_checkpoint({"epoch": 1}, tmp_path / "midway.pth")
    save_checkpoint({"epoch": 1}, tmp_path / "epoch-0001.pth")
    last, copies = ("epoch-0002.pth" if keep_last else "latest.pth"), checkpoint.copy_checkpoint

    def save_and_lose(*arguments):
        copies(*arguments)
        if arguments[1].name == last:
            (tmp_path / LOCK_FILE).unlink()

    monkeypatch.setattr(checkpoint, "copy_checkpoint", save_and_lose)
    with locked(tmp_path), pytest.raises(SavePathError, match="took over"):
        checkpoint.save_epoch({"epoch": 2}, tmp_path, True, keep_last)
    assert (tmp_path / "midway.pth").exists() and (tmp_path / "epoch-0001.pth").exists()


def test_a_suspended_run_that_lost_its_lock_logs_nothing_more(tmp_path):
    with locked(tmp_path), RunLog(tmp_path, True) as log:
        log.info("mine")
        (tmp_path / LOCK_FILE).unlink()
        for write in (lambda: log.info("no"), lambda: log.progress("no"), lambda: log.scalars({"loss": 1.0}, 1)):
            with pytest.raises(SavePathError, match=r"took over \(it has ended since\)"):
                write()
        log.stopped("no")
    assert (tmp_path / LOG_FILE).read_text().count("\n") == 1


def test_a_run_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK_FILE).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
