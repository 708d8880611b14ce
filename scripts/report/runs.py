"""What a run's save path holds: its settings, its curves, how far it came, and the command that repeats it."""

from __future__ import annotations

import csv
import math
import os
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dataset.errors import DataError
from dataset.lists import list_digest, read_list
from model import WeightsError, read_checkpoint
from util.config import NOT_SHAPING, PROJECT_ROOT, Config, load_config, to_dict
from util.errors import ConfigError
from util.run_files import BEST, CONFIG_FILE, CURVES_FILE, LATEST
from util.run_info import read_info

Curve = dict[int, float]  # steps done -> value
MIOU = "eval/mIoU"


@dataclass(frozen=True)
class RunRecord:
    """A run as read from its save path. `state` is the small part of its last checkpoint, `info` how it was started."""

    path: Path
    cfg: Config
    method: str
    state: Mapping[str, Any]
    info: Mapping[str, Any]
    curves: Mapping[str, Curve]
    notes: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        return self.cfg.seed

    @property
    def epoch(self) -> int:
        return int(self.state.get("epoch", 0))

    @property
    def lists(self) -> Mapping[str, str]:
        """`N images, DIGEST` of each list; empty where no checkpoint holds them."""
        return self.state.get("run", {})

    @property
    def best(self) -> float:
        """mIoU of the best epoch in percent; NaN without an evaluation."""
        return _number(self.state.get("previous_best"), max(self.curves.get(MIOU, {}).values(), default=math.nan))

    @property
    def last(self) -> float:
        """mIoU of the last evaluation in percent; NaN without one."""
        return _number(self.state.get("last_miou"), _last(self.curves.get(MIOU, {})))

    def class_iou(self, name: str, best: bool) -> float:
        """A class's IoU in percent, at the best or the last evaluation; NaN where it is absent."""
        miou, curve = self.curves.get(MIOU, {}), self.curves.get(f"eval/{name}_IoU", {})
        if not miou:
            return math.nan
        step = max(miou, key=lambda step: (miou[step], -step)) if best else max(miou)
        return curve.get(step, math.nan)

    @property
    def speed(self) -> float:
        """Images per second in training, the median; NaN for runs that did not log it."""
        values = list(self.curves.get("machine/images_per_second", {}).values())
        return statistics.median(values) if values else math.nan

    @property
    def memory(self) -> float:
        """Peak memory in GB; NaN for runs that did not log it."""
        curves = (self.curves.get(name, {}) for name in ("machine/memory_gb", "eval/memory_gb"))
        return max((value for curve in curves for value in curve.values()), default=math.nan)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that pictures are made with."""
        return next((self.path / name for name in (BEST, LATEST) if (self.path / name).is_file()), None)

    @property
    def split(self) -> str | None:
        """The published split whose labelled list this run has."""
        return published_splits(self.cfg.dataset).get(self.lists.get("labelled list", ""))

    @property
    def command(self) -> str:
        """A command that repeats the run, into another save path. Words in capitals are not known."""
        processes = self.info.get("processes", 1)
        start = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
        split = f"splits/{self.cfg.dataset}/{self.split}/labeled.txt" if self.split else "LABELED_LIST"
        words = [*start, f"{self.method}.py", "--config", str(self.path / CONFIG_FILE)]
        words += ["--labeled-id-path", str(self.info.get("labeled_id_path") or split)]
        if unlabeled := self.info.get("unlabeled_id_path"):
            words += ["--unlabeled-id-path", str(unlabeled)]
        return shlex.join([*words, "--save-path", f"{self.path}-again"])


@dataclass
class Group:
    """Runs that differ only in the seed; `name` distinguishes it from the other groups."""

    runs: list[RunRecord]
    name: str = ""
    differing: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> RunRecord:
        return self.runs[0]


def find_runs(folders: Iterable[str]) -> list[RunRecord]:
    """The runs in these folders: each is a run's save path, or holds such in any depth. Raises ConfigError."""
    found: dict[Path, Path] = {}
    for folder in folders:
        path = Path(folder)
        if not path.is_dir():
            raise ConfigError(f"{folder}: {'no folder' if path.exists() else 'no such folder'}: give a run's save path")
        paths = list(_save_paths(path))
        if not paths:
            raise ConfigError(f"{folder}: no run: no {CONFIG_FILE} in it or below")
        for inner in paths:
            found.setdefault(inner.resolve(), inner)
    return [read_run(path) for path in found.values()]


def _save_paths(folder: Path) -> Iterator[Path]:
    """The save paths in `folder`, itself included, in order.

    None is looked for inside another one, which may hold earlier results and loggers' files, or in other tools'
    folders: their `config.yaml` is none of ours.
    """
    for place, inner, _ in os.walk(folder):
        if Path(place, CONFIG_FILE).is_file():
            inner.clear()
            yield Path(place)
        inner[:] = sorted(
            name for name in inner if not name.startswith(("previous-", ".")) and name not in ("wandb", "mlruns")
        )


def read_run(path: Path) -> RunRecord:
    """Read the save path `path`. Nothing is written there. Raises ConfigError for a config that is none."""
    cfg, info, notes = load_config(path / CONFIG_FILE), read_info(path), []
    state: dict[str, Any] = {}
    if (path / LATEST).is_file():
        try:
            whole = read_checkpoint(path / LATEST)
            state = {key: value for key, value in whole.items() if key not in ("model", "teacher", "optimizer")}
        except (WeightsError, AttributeError):
            notes.append(f"{LATEST} is damaged")
    else:
        notes.append("no epoch is finished")
    state["run"] = state["run"] if isinstance(state.get("run"), dict) else {}
    method = str(info.get("method") or state["run"].get("method") or "METHOD")
    curves = read_curves(path)
    if not curves:
        notes.append("no curves: the run had no logger that keeps them here")
    if state.get("epoch", 0) < cfg.epochs:
        notes.append(f"{state.get('epoch', 0)} of {cfg.epochs} epochs are done")
    return RunRecord(path, cfg, method, state, info, curves, tuple(notes))


def read_curves(path: Path) -> dict[str, Curve]:
    """Name -> curve, from the run's CSV file or its TensorBoard files; empty if it has neither. Steps count from 1."""
    if (path / CURVES_FILE).is_file():
        curves: dict[str, Curve] = {}
        with open(path / CURVES_FILE, encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.reader(file):
                if len(row) == 3 and row[0].isdecimal():
                    curves.setdefault(row[1], {})[int(row[0]) + 1] = _number(row[2])
        return curves
    if not list(path.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1, "tensors": 1}).Reload()
    names = events.Tags()["scalars"]
    return {name: {event.step + 1: event.value for event in events.Scalars(name)} for name in names}


def group_runs(runs: Iterable[RunRecord]) -> list[Group]:
    """The runs in groups of equal settings, in the order given; in a group by seed."""
    groups: dict[str, Group] = {}
    for run in runs:
        groups.setdefault(repr(_settings(run)), Group([])).runs.append(run)
    found = list(groups.values())
    for group in found:
        group.runs.sort(key=lambda run: run.seed)
    settings = [_settings(group.first) for group in found]
    for group, own in zip(found, settings, strict=True):
        group.differing = {
            key: str(value) for key, value in own.items() if any(other.get(key) != value for other in settings)
        }
    for group in found:
        others = [other for other in found if other is not group and other.first.method == group.first.method]
        differing = [
            f"{key} {value[:30]}"
            for key, value in group.differing.items()
            if any(other.differing.get(key) != value for other in others)
        ]
        group.name = ", ".join([group.first.method, *differing[:3]])
    return found


def _settings(run: RunRecord) -> dict[str, Any]:
    """What shapes the run besides its seed; `init_from` too, though a continued run does not read it."""
    left_out = {*NOT_SHAPING, "seed"} - {"init_from"}
    kept = {key: value for key, value in to_dict(run.cfg).items() if key not in left_out}
    lists = {key: value for key, value in run.lists.items() if key != "method"}
    return {"method": run.method, **kept, **lists}


@cache
def published_splits(dataset: str) -> dict[str, str]:
    """`N images, DIGEST` of a labelled list -> the name of the split in splits/DATASET."""
    found = {}
    for path in sorted(PROJECT_ROOT.glob(f"splits/{dataset}/*/labeled.txt")):
        try:
            samples = read_list(path)
        except DataError:
            continue
        found[f"{len(samples)} images, {list_digest(samples)}"] = path.parent.name
    return found


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; NaN for fewer than two) of the values that are there."""
    known = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan


def _last(curve: Curve) -> float:
    return curve[max(curve)] if curve else math.nan


def _number(value: Any, otherwise: float = math.nan) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return otherwise
    return otherwise if math.isinf(number) else number
