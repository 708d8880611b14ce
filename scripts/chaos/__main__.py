"""Break training runs in every way that machines do, continue them, and compare their end with an undisturbed run's.

    python -m scripts.chaos --rounds 50 --seed 0

A round starts a run of seconds on generated images, inflicts one fault on it at a random moment, starts it again until
it is finished, and compares weights, optimiser, logged losses, TensorBoard curves and mIoU, bit for bit. It ends with a
table, and with status 1 if anything differed or a fault was not answered as it should be. Linux only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset.prepare.toy import CLASSES, scene
from model import read_checkpoint
from util.cli import run_main
from util.config import PROJECT_ROOT
from util.errors import EXIT_SIGNAL, EXIT_USER_ERROR, ConfigError
from util.run_files import LATEST, LOG_FILE, MID_EPOCH

IMAGES = {"labeled": 4, "unlabeled": 10, "val": 2}
EPOCHS = 3
LINE = re.compile(r"epoch (\d+)/\d+  iteration (\d+)/(\d+)  (.*)  lr \S+  ")
CONTINUED = re.compile(r"continuing from \S+: (\d+) of \d+ epochs are done(?: and (\d+) of)?")
LIMIT = 300  # seconds that a run may take


class Unanswered(Exception):
    """A run did not answer a fault as it should."""


@dataclass
class Run:
    """A training run in the folder `path`, of one process or of several under the launcher."""

    path: Path
    data: Path
    processes: int
    lost: int = 0
    output: str = ""
    process: subprocess.Popen | None = field(default=None, repr=False)

    def start(self, *launch: str, file_limit: int | None = None) -> None:
        """Start or continue; `file_limit`: bytes from which the system refuses to write to a file."""
        launcher = ["-m", "scripts.launch", "--processes", str(self.processes), *launch] if self.processes > 1 else []
        arguments = ["--config", self.data / "config.yaml", "--labeled-id-path", self.data / "labeled.txt"]
        command = [sys.executable, *launcher, "unimatch.py", *arguments, "--save-path", self.path]

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead

        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=PROJECT_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=limit if file_limit else None,
        )

    def end(self, *expected: int) -> None:
        """Wait for the end, whose status has to be an expected one."""
        try:
            self.output, _ = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.output, _ = self.process.communicate()
            raise Unanswered(f"no end after {LIMIT} s") from None
        if self.process.returncode not in expected:
            last = " | ".join(self.output.strip().splitlines()[-3:])
            raise Unanswered(f"status {self.process.returncode}, not {expected}: {last}")
        # A loading process may complain that its parent was killed.
        if "Traceback" in self.output and self.process.returncode != -signal.SIGKILL:
            raise Unanswered(f"a traceback: {self.output[self.output.index('Traceback') :][-500:]}")

    def log(self) -> str:
        """What train.log says so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.path / LOG_FILE).read_text(encoding="utf-8")
        return ""

    def wait_for(self, condition: Callable[[], bool], pause: float = 0.02) -> bool:
        """Whether the condition came true before the run ended."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(pause)
        return False

    def wait_for_lines(self, count: int) -> bool:
        """Wait until that many more lines of progress are logged."""
        before = len(LINE.findall(self.log()))
        return self.wait_for(lambda: len(LINE.findall(self.log())) >= before + count)

    def finish(self, *launch: str) -> None:
        """Continue to the end, and count the steps that had to be repeated."""
        self.start(*launch)
        self.end(0)
        done = 0
        for line in self.log().splitlines():
            if progress := LINE.search(line):
                epoch, iteration, steps = (int(number) for number in progress.groups()[:3])
                done = max(done, (epoch - 1) * steps + iteration)
            elif place := CONTINUED.search(line):
                resumed = int(place[1]) * steps + int(place[2] or 0)
                self.lost += max(0, done - resumed)
                done = resumed


# --- faults: each starts a run and harms it; whoever calls continues it


def kill(run: Run, rng: random.Random) -> None:
    """SIGKILL at a random moment."""
    run.start()
    run.wait_for_lines(rng.randint(0, 10))
    time.sleep(rng.uniform(0, 0.5))
    run.process.kill()
    run.end(-signal.SIGKILL, 0)


def kill_in_save(run: Run, rng: random.Random) -> None:
    """SIGKILL while a checkpoint is being written."""
    run.start()
    run.wait_for_lines(rng.randint(0, 10))
    run.wait_for(lambda: any(run.path.glob("*.pth.*.tmp")), pause=0.0005)
    time.sleep(rng.uniform(0, 0.05))
    run.process.kill()
    run.end(-signal.SIGKILL, 0)


def ask_to_end(run: Run, rng: random.Random) -> None:
    """SIGTERM, SIGUSR1 or SIGINT at a random moment: no step may be lost."""
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    run.start()
    run.wait_for_lines(rng.randint(1, 10))
    run.process.send_signal(number)
    run.end(EXIT_SIGNAL + number, 0)
    if run.process.returncode and not (run.path / MID_EPOCH).exists():
        raise Unanswered(f"{number.name}: no {MID_EPOCH}")


def kill_one_of_two(run: Run, rng: random.Random) -> None:
    """SIGKILL of one process; the launcher starts both again, or whoever started it."""
    restarts = rng.randint(0, 1)
    run.start("--max-restarts", str(restarts))
    run.wait_for_lines(rng.randint(1, 4))
    victims = _children(run.process.pid)
    if victims:
        os.kill(rng.choice(victims), signal.SIGKILL)
    run.end(*((0,) if restarts else (EXIT_SIGNAL + signal.SIGKILL, 0)))


def ask_two_to_end(run: Run, rng: random.Random) -> None:
    """SIGTERM to the launcher of two processes, or to one of them: both end after the same step."""
    run.start()
    run.wait_for_lines(rng.randint(1, 4))
    os.kill(rng.choice([run.process.pid, *_children(run.process.pid)]), signal.SIGTERM)
    run.end(EXIT_SIGNAL + signal.SIGTERM, 0)


def fill_disk(run: Run, rng: random.Random) -> None:
    """The file system of the save path gets full; what is there stays whole."""
    run.path.mkdir()
    size = 1.1 + 0.8 * rng.random()  # in checkpoints: room for one, not for a second
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(size * CHECKPOINT_BYTES)}", "tmpfs", run.path],
        capture_output=True,
        check=False,
    )
    if mounted.returncode == 0:
        run.start()
        run.end(EXIT_USER_ERROR)
        subprocess.run(["mount", "-o", "remount,size=4G", run.path], check=True)
    else:  # only root may mount
        run.start(file_limit=CHECKPOINT_BYTES // 2)
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


FAULTS: dict[str, tuple[Callable[[Run, random.Random], None], int]] = {
    "kill": (kill, 1),
    "kill-in-save": (kill_in_save, 1),
    "signal": (ask_to_end, 1),
    "damage": (damage, 1),
    "full-disk": (fill_disk, 1),
    "label": (delete_label, 1),
    "kill-one-of-two": (kill_one_of_two, 2),
    "signal-two": (ask_two_to_end, 2),
}
CHECKPOINT_BYTES = 130_000_000  # of this model, about


def _children(pid: int) -> list[int]:
    """The training processes that a launcher started."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()]
    return []


def make_data(root: Path) -> None:
    """Images of the toy set, lists, and the config of a short run."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    start = 0
    for kind, count in IMAGES.items():
        lines = []
        for index in range(count):
            picture, label = scene(0, "train", start + index)
            Image.fromarray(picture).save(root / f"images/{kind}{index}.png")
            lines.append(f"images/{kind}{index}.png")
            if kind != "unlabeled":
                Image.fromarray(label).save(root / f"labels/{kind}{index}.png")
                lines[-1] += f" labels/{kind}{index}.png"
        start += count
        (root / f"{kind}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    config = {
        "dataset": "chaos",
        "data_root": str(root),
        "classes": list(CLASSES),
        "val_id_path": str(root / "val.txt"),
        "unlabeled_id_path": str(root / "unlabeled.txt"),
        "crop_size": 32,
        "epochs": EPOCHS,
        "batch_size": 1,
        "lr": 0.001,
        "conf_thresh": 0.3,
        "backbone": "resnet18",
        "pretrained": False,
        "device": "cpu",
        "workers": 1,
        "log_interval": 2,
        "checkpoint_minutes": 0.02,
        "dist_timeout": 30,
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def end_state(path: Path) -> dict[str, Any]:
    """What a finished run left: its checkpoint, its logged losses and its curves."""
    state = read_checkpoint(path / LATEST)
    log = (path / LOG_FILE).read_text(encoding="utf-8")
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    curves = {tag: curve for tag, curve in curves.items() if tag != "eval/memory_gb" and not tag.startswith("machine/")}
    losses = {(epoch, iteration): values for epoch, iteration, _, values in LINE.findall(log)}
    return {**state, "losses": losses, "curves": dict(sorted(curves.items()))}


def difference(first: Any, second: Any, where: str = "") -> str | None:
    """Where two nested containers differ, tensors bit for bit; None if nowhere."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return None if same else where
    if type(first) is not type(second):
        return where
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return f"{where} keys"
        pairs = [(first[key], second[key], f"{where}[{key!r}]") for key in first]
    elif isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return f"{where} length"
        pairs = [(*pair, f"{where}[{index}]") for index, pair in enumerate(zip(first, second, strict=True))]
    else:
        return None if first == second else where
    return next((found for pair in pairs if (found := difference(*pair))), None)


@contextlib.contextmanager
def removed_at_the_end(run: Run) -> Iterator[None]:
    """End the run's process and remove its folder, whatever happens: checkpoints are large."""
    try:
        yield
    finally:
        if run.process and run.process.poll() is None:
            run.process.terminate()
            run.process.communicate()
        subprocess.run(["umount", run.path], capture_output=True, check=False)
        subprocess.run(["rm", "-rf", run.path], check=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(prog="scripts.chaos", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=len(FAULTS), metavar="N", help="faults to inflict, in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds of faults")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), metavar="F", help=f"of {', '.join(FAULTS)}")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.faults if name not in FAULTS]:
        raise ConfigError(f"--faults {unknown[0]}: there are {', '.join(FAULTS)}")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells every continued run
    rng = random.Random(args.seed)
    counts: dict[str, int] = collections.Counter()
    lost: dict[str, list[int]] = collections.defaultdict(list)
    faults: dict[str, list[str]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        root = Path(scratch)
        make_data(root / "data")
        expected = {}
        for number in range(args.rounds):
            name = args.faults[number % len(args.faults)]
            inflict, processes = FAULTS[name]
            if processes not in expected:
                whole = Run(root / f"whole{processes}", root / "data", processes)
                with removed_at_the_end(whole):
                    whole.finish()
                    expected[processes] = end_state(whole.path)
            run = Run(root / f"round{number}", root / "data", processes)
            verdict = "equal"
            with removed_at_the_end(run):
                try:
                    inflict(run, random.Random(rng.random()))
                    run.finish()
                    if where := difference(expected[processes], end_state(run.path)):
                        verdict = f"DIFFERS in {where}"
                except Unanswered as error:
                    verdict = f"UNANSWERED: {error}"
            counts[name] += 1
            lost[name].append(run.lost)
            if verdict != "equal":
                faults[name].append(verdict)
            print(f"round {number + 1}/{args.rounds}  {name}: {run.lost} steps repeated, {verdict}", flush=True)
    print(f"\n{'fault':<18}{'rounds':>7}{'steps lost (most)':>20}{'equal':>8}")
    for name in counts:
        lost_text = f"{sum(lost[name])} ({max(lost[name])})"
        print(f"{name:<18}{counts[name]:>7}{lost_text:>20}{counts[name] - len(faults[name]):>8}")
    if any(faults.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
