"""Faults of a run: each function starts a run and harms it; the caller then continues the run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from scripts.chaos.hosts import NoHosts, two_hosts
from scripts.chaos.run import EPOCHS, Missed, Run, Skipped, Unanswered
from util.errors import EXIT_CONSEQUENCE, EXIT_SIGNAL, EXIT_STOPPED, EXIT_USER_ERROR
from util.lock import LOCK_FILE, STALE
from util.run_files import LATEST, MID_EPOCH


def kill(run: Run, rng: random.Random) -> None:
    """SIGKILL at a random moment."""
    run.start()
    run.wait_for_lines(rng.randint(0, 10))
    time.sleep(rng.uniform(0, 0.5))
    run.process.kill()
    run.end_by(-signal.SIGKILL)


def kill_in_save(run: Run, rng: random.Random) -> None:
    """SIGKILL while a checkpoint is being written."""
    run.start()
    run.wait_for_lines(rng.randint(0, 10))
    run.wait_for(lambda: any(run.path.glob("*.pth.*.tmp")), pause=0.0005)
    time.sleep(rng.uniform(0, 0.05))
    run.process.kill()
    run.end_by(-signal.SIGKILL)


def ask_to_end(run: Run, rng: random.Random) -> None:
    """SIGTERM, SIGUSR1 or SIGINT at a random moment: no step may be lost."""
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    run.start()
    run.wait_for_lines(rng.randint(1, 10))
    run.process.send_signal(number)
    run.end_by(EXIT_SIGNAL + number)
    if not (run.path / MID_EPOCH).exists():
        raise Unanswered(f"{number.name}: no {MID_EPOCH}")


def kill_one_of_two(run: Run, rng: random.Random) -> None:
    """SIGKILL of one process; the launcher starts both again, or whoever started it."""
    restarts = rng.randint(0, 1)
    run.start("--max-restarts", str(restarts))
    run.wait_for_lines(rng.randint(1, 4))
    victims = _children(run.process.pid)
    if victims:
        os.kill(rng.choice(victims), signal.SIGKILL)
    if victims and restarts:
        run.end(0)
    else:
        run.end_by(EXIT_SIGNAL + signal.SIGKILL)


def ask_two_to_end(run: Run, rng: random.Random) -> None:
    """SIGTERM to the launcher of two processes, or to one of them: both end after the same step."""
    run.start()
    run.wait_for_lines(rng.randint(1, 4))
    if run.process.poll() is None:
        os.kill(rng.choice([run.process.pid, *_children(run.process.pid)]), signal.SIGTERM)
    run.end_by(EXIT_SIGNAL + signal.SIGTERM)


def fill_disk(run: Run, rng: random.Random) -> None:
    """The file system of the save path gets full; what is there stays whole."""
    run.path.mkdir()
    size = 1.1 + 0.8 * rng.random()  # in checkpoints: room for one, not for a second
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(size * run.checkpoint_bytes)}", "tmpfs", run.path],
        capture_output=True,
        check=False,
    )
    if mounted.returncode == 0:
        run.start()
        run.end(EXIT_USER_ERROR)
        subprocess.run(["mount", "-o", "remount,size=4G", run.path], check=True)
    else:  # only root may mount
        run.start(file_limit=run.checkpoint_bytes // 2)
        run.end(EXIT_USER_ERROR)
    if "cannot be written" not in run.output:
        raise Unanswered(f"a full disk is not named: {run.output[-300:]}")


def damage(run: Run, rng: random.Random) -> None:
    """After a kill, the newest checkpoint is cut off or has a bit flipped: an earlier one serves."""
    run.start()
    run.wait_for(lambda: f"epoch {EPOCHS}/" in run.log())  # before, latest.pth and best.pth may be all, and one file
    run.wait_for_lines(rng.randint(0, 3))
    run.process.kill()
    run.end(-signal.SIGKILL, 0)
    name = rng.choice([name for name in (LATEST, MID_EPOCH) if (run.path / name).exists()])
    if name == LATEST:
        (run.path / MID_EPOCH).unlink(missing_ok=True)
    with open(run.path / name, "r+b") as file:
        length = file.seek(0, os.SEEK_END)
        if rng.random() < 0.5:
            file.truncate(rng.randrange(length))
        else:
            # In the weights: bytes of the archive's own structure may not matter.
            place = rng.randrange(length // 4, length // 2)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    run.start()
    if not run.wait_for(lambda: f"{name} is damaged" in run.log()) and f"{name} is damaged" not in run.log():
        raise Unanswered(f"a damaged {name} was not noticed")
    run.process.kill()
    run.end(-signal.SIGKILL, 0)


def delete_label(run: Run, rng: random.Random) -> None:
    """A label disappears in mid-run, and comes back before the run continues."""
    label = run.data / "labels" / f"{rng.choice(['labeled', 'val'])}1.png"
    content = label.read_bytes()
    run.start()
    run.wait_for_lines(rng.randint(0, 4))
    label.unlink()
    try:
        run.end(EXIT_USER_ERROR)
    finally:
        label.write_bytes(content)
    if str(label) not in run.output:
        raise Unanswered(f"{label} is not named: {run.output[-300:]}")


def signal_before_the_first_step(run: Run, rng: random.Random) -> None:
    """SIGTERM, SIGUSR1 or SIGHUP while the run starts: it ends, and has nothing to say but that."""
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
    run.start()
    moment = time.monotonic() + rng.uniform(0, 10)
    run.wait_for(lambda: time.monotonic() > moment or run.lines() > 0)
    run.process.send_signal(number)
    run.end_by(EXIT_SIGNAL + number, -number)


def suspend(run: Run, rng: random.Random) -> None:
    """SIGSTOP for longer than the lock's patience: another machine's run takes over, and the first one gives way."""
    if subprocess.run(_as_other_machine("true"), check=False, capture_output=True).returncode:
        raise Skipped("a machine of another name needs root and unshare")
    run.start()
    run.wait_for_lines(rng.randint(1, 6))
    run.process.send_signal(signal.SIGSTOP)
    suspended = run.process
    try:
        lock = run.path / LOCK_FILE
        if not lock.exists():
            raise Missed
        os.utime(lock, (time.time() - 2 * STALE,) * 2)  # as if it had slept for so long
        run.process = run.popen(_as_other_machine(*run.command()))
        run.wait_for_lines(rng.randint(1, 4))
        suspended.send_signal(signal.SIGCONT)
        run.end(0)
        second, run.process = run.process, suspended
        run.end(EXIT_USER_ERROR)
        run.process = second
    finally:
        suspended.kill()
        suspended.communicate()
    if "another run took over" not in run.output:
        raise Unanswered(f"the lost lock is not named: {run.output[-300:]}")


def cut_link(run: Run, rng: random.Random) -> None:
    """The network between two hosts with a process each is gone: both end, and say so."""
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts())
        except NoHosts as error:
            raise Skipped(str(error)) from None
        launch = ["--nodes", "2", "--master-addr", hosts.addresses[0], "--port", "29500", "--node-rank"]
        alone = replace(run, processes=1)  # on each
        processes = [run.popen(hosts.command(host, *alone.command(*launch, str(host)))) for host in range(2)]
        run.process = processes[0]
        run.wait_for_lines(rng.randint(1, 4))
        hosts.cut()
        try:
            for host, process in enumerate(processes):
                run.process = process
                run.end(EXIT_STOPPED, EXIT_CONSEQUENCE, 0)
                if process.returncode and "error: " not in run.output:
                    raise Unanswered(f"host {host} says nothing")
            if all(process.returncode == 0 for process in processes):
                raise Missed
        finally:
            for process in processes:
                process.kill()


def go_on_with_one(run: Run, rng: random.Random) -> None:
    """Two processes are killed, and one goes on with the images of both, in the same epoch."""
    run.start()
    run.wait_for_lines(rng.randint(2, 6))
    for pid in _children(run.process.pid):
        os.kill(pid, signal.SIGKILL)
    run.process.kill()
    run.end_by(-signal.SIGKILL)
    run.processes, run.settings = 1, ["batch_size=2"]


class Fault(NamedTuple):
    """How to harm a run: by a function, on so many processes, and with which method unless it is done to several."""

    inflict: Callable[[Run, random.Random], None]
    processes: int = 1
    method: str | None = None
    exact: bool = True  # the end is that of an undisturbed run bit for bit; otherwise, in float64, nearly


FAULTS = {
    "kill": Fault(kill),
    "kill-in-save": Fault(kill_in_save),
    "signal": Fault(ask_to_end),
    "early-signal": Fault(signal_before_the_first_step),
    "damage": Fault(damage),
    "full-disk": Fault(fill_disk),
    "label": Fault(delete_label),
    "suspended": Fault(suspend),
    "kill-one-of-two": Fault(kill_one_of_two, 2),
    "signal-two": Fault(ask_two_to_end, 2),
    "cut-link": Fault(cut_link, 2),
    # One process and two add up in another order, so the ends are near, not equal.
    "one-for-two": Fault(go_on_with_one, 2, "fixmatch", exact=False),
}


def _as_other_machine(*command: str) -> list[str]:
    """The command line that runs a command on what looks like another machine, with a name of its own."""
    inside = 'echo another >/proc/sys/kernel/hostname && exec "$@"'
    return ["unshare", "--uts", "sh", "-c", inside, "sh", *command]


def _children(pid: int) -> list[int]:
    """The training processes that a launcher started."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()]
    return []
