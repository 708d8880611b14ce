"""A training run of seconds on generated images: started, watched, ended, continued."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from PIL import Image

from dataset.files import IGNORE_INDEX
from dataset.prepare.toy import CLASSES, scene
from util.config import PROJECT_ROOT
from util.run_files import LOG_FILE

IMAGES = {"labeled": 4, "unlabeled": 10, "val": 2}
EPOCHS = 3
LINE = re.compile(r"epoch (\d+)/\d+  iteration (\d+)/(\d+)  (.*)  lr \S+  ")
CONTINUED = re.compile(r"continuing from \S+: (\d+) of \d+ epochs are done(?: and (\d+) of)?")
LIMIT = 300  # seconds that a run may take


class Unanswered(Exception):
    """A run did not answer a fault as it should."""


class Missed(Exception):
    """A run was finished before the fault struck."""


class Skipped(Exception):
    """This fault cannot be inflicted here; the message says why."""


@dataclass
class Run:
    """A training run in the folder `path`, of one process or of several under the launcher."""

    path: Path
    data: Path
    processes: int
    method: str = "unimatch"
    settings: list[str] = field(default_factory=list)  # changes of the config
    double: bool = False  # whether it trains in float64
    checkpoint_bytes: int = 0  # what an undisturbed run's checkpoint has
    lost: int = 0
    output: str = ""
    process: subprocess.Popen | None = field(default=None, repr=False)

    def command(self, *launch: str) -> list[str]:
        """The command line that starts or continues it, with arguments of the launcher."""
        several = self.processes > 1 or launch
        launcher = ["-m", "scripts.launch", "--processes", str(self.processes), *launch] if several else []
        arguments = ["--config", self.data / "config.yaml", "--labeled-id-path", self.data / "labeled.txt"]
        changes = ["--set", *self.settings] if self.settings else []
        script = ["scripts/chaos/double.py", f"{self.method}.py"] if self.double else [f"{self.method}.py"]
        words = [sys.executable, *launcher, *script, *arguments, "--save-path", self.path, *changes]
        return [str(word) for word in words]

    def start(self, *launch: str, file_limit: int | None = None) -> None:
        """Start or continue; `file_limit`: bytes from which the system refuses to write to a file."""
        self.process = self.popen(self.command(*launch), file_limit)

    def popen(self, command: Sequence[str], file_limit: int | None = None) -> subprocess.Popen[str]:
        """Start a command in the project's root; `end` waits for `self.process`."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead

        return subprocess.Popen(
            command,
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

    def end_by(self, *expected: int) -> None:
        """Wait for the end by a fault, which is Missed if the run came to its own end before."""
        self.end(*expected, 0)
        if self.process.returncode == 0:
            raise Missed

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

    def lines(self) -> int:
        """How many lines of progress are logged."""
        return len(LINE.findall(self.log()))

    def wait_for_lines(self, count: int) -> bool:
        """Wait until that many more lines of progress are logged."""
        before = self.lines()
        return self.wait_for(lambda: self.lines() >= before + count)

    def finish(self, *launch: str) -> None:
        """Continue to the end, and count the steps that had to be repeated."""
        self.start(*launch)
        self.end(0)
        done = steps = 0
        for line in self.log().splitlines():
            if progress := LINE.search(line):
                epoch, iteration, steps = (int(number) for number in progress.groups()[:3])
                done = max(done, (epoch - 1) * steps + iteration)
            elif place := CONTINUED.search(line):
                resumed = int(place[1]) * steps + int(place[2] or 0)
                self.lost += max(0, done - resumed)
                done = resumed


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


def make_data(root: Path) -> None:
    """Images of the toy set, lists, and the config of a short run.

    No pixel is ignored, nor padded by a crop: so every process divides its losses by as many.
    """
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    start = 0
    for kind, count in IMAGES.items():
        lines = []
        for index in range(count):
            picture, label = scene(0, "train", start + index)
            label[label == IGNORE_INDEX] = 0
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
        "crop_size": 28,
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
