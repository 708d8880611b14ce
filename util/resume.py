"""Choosing the checkpoint that a run continues from: the newest whole one, trained with the same settings.

The parts of a checkpoint file carry checksums (CRC-32). torch.load does not look at them, so they are verified here.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import read_checkpoint
from util.checkpoint import CHOICES, aside_name
from util.config import Config, differing_keys, to_dict
from util.errors import CheckpointError
from util.release import adopt, is_release
from util.run_files import BEST, LATEST, MID_EPOCH, PREVIOUS, epoch_files

NEEDED = ("model", "optimizer", "epoch", "iteration", "previous_best", "config", "run")
NUMBER = (int, float)
KINDS = {"model": dict, "optimizer": dict, "epoch": int, "iteration": int, "previous_best": NUMBER, "config": dict}
KINDS |= {"run": dict, "best_epoch": int, "last_miou": NUMBER, "steps": int}


@dataclass(frozen=True)
class Found:
    """The checkpoint to continue from: its file, the steps of an epoch, the first TensorBoard step after it, and what
    the log should say."""

    path: Path | None
    steps: int = 0
    first_step: int = 0
    notes: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()


def find_checkpoint(save_path: Path, cfg: Config, run: Mapping[str, str], processes: int = 1, steps: int = 0) -> Found:
    """What to continue from: the newest checkpoint that is whole; its path is None for a fresh run.

    `run` says what shapes training besides the config: method and lists. A mid-epoch checkpoint serves `processes` that
    take as many images a step as those that wrote it, and an epoch then keeps its steps; otherwise it has `steps`.
    Raises CheckpointError where the settings differ, and where `latest.pth` is damaged and nothing is left to fall back
    to. Changes nothing.
    """
    damaged: list[Path] = []
    notes: list[str] = []

    def read(path: Path) -> dict[str, Any] | None:
        return _read_whole(path, damaged, lambda state: as_ours(state, cfg, run, steps))

    earlier = reversed(epoch_files(save_path))
    whole: dict[Path, dict[str, Any]] = {}
    for path in (save_path / LATEST, save_path / PREVIOUS, *earlier, save_path / BEST):
        if state := read(path):
            whole[path] = state
            break
    mid_epoch = save_path / MID_EPOCH
    state = read(mid_epoch)
    if state and state["epoch"] >= max((other["epoch"] for other in whole.values()), default=0):
        _check_settings(mid_epoch, state, cfg, run, processes)
        if _takes_as_many(state, cfg, processes):
            whole = {mid_epoch: state}
        else:
            notes.append(
                f"note: {mid_epoch} is of {state['processes']} process(es), and there are {processes} now, with other "
                "images in a step: "
                f"going on from the start of epoch {max((other['epoch'] for other in whole.values()), default=0) + 1}"
            )
    if not whole:
        if any(path != mid_epoch for path in damaged):
            raise CheckpointError(
                f"{damaged[0]}: damaged or not a checkpoint, and there is no earlier one to fall back to: "
                "put a good copy in its place, or start over with --resume never (it keeps earlier results aside)"
            )
        path, first_step = None, 0
    else:
        ((path, state),) = whole.items()
        notes += _check_settings(path, state, cfg, run, processes)
        # Within an epoch the curves of its last step are still to be written.
        first_step = state["iteration"] - ("position" in state)
        kept = state.get("steps", steps)
        if kept != steps and _takes_as_many(state, cfg, processes):
            notes.append(f"note: an epoch keeps its {kept} steps; one begun on {processes} process(es) has {steps}")
            steps = kept
    notes += [
        f"warning: {bad} is damaged or incomplete: it is kept as {aside_name(bad).name}, and training goes on from "
        + (path.name if path else "the beginning")
        for bad in damaged
    ]
    return Found(path, steps, first_step, tuple(notes), tuple(damaged))


def _takes_as_many(state: Mapping[str, Any], cfg: Config, processes: int) -> bool:
    """Whether a step has as many labelled images, over all processes, as when the checkpoint was written."""
    return _per_step_of(state) == _per_step(to_dict(cfg), processes)


def _per_step(config: Mapping[str, Any], processes: int) -> Any:
    """Labelled images of a step, over all processes."""
    return config.get("batch_size", 0) * config.get("accumulate", 1) * processes


def _per_step_of(state: Mapping[str, Any]) -> Any:
    """The same of a checkpoint; 0 where it does not say how many processes there were."""
    try:
        return _per_step(state["config"], int(state.get("processes", 0)))
    except (TypeError, ValueError):  # a stranger's
        return 0


def as_ours(state: Any, cfg: Config, run: Mapping[str, str], steps: int) -> Any:
    """What a checkpoint file holds; that of the published code in our form."""
    return adopt(state, to_dict(cfg), run, steps) if is_release(state) else state


def _read_whole(path: Path, damaged: list[Path], convert: Callable[[Any], Any]) -> dict[str, Any] | None:
    """A checkpoint's place and settings; None if there is no such file, or if it is put among the `damaged`."""
    try:
        open(path, "rb").close()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        state = None if broken else convert(read_checkpoint(path))
    except Exception:  # zipfile raises whatever its parser meets in damaged bytes
        state = None
    if state is None:
        damaged.append(path)
        return None
    needed = (*NEEDED, "position", "metrics", "processes") if path.name == MID_EPOCH else NEEDED
    missing = [key for key in needed if not isinstance(state, dict) or key not in state]
    if missing:
        raise CheckpointError(f"{path}: cannot be resumed: it has no {', '.join(missing)} {CHOICES}")
    check_kinds(path, state)
    return {key: value for key, value in state.items() if key not in ("model", "optimizer", "metrics", "teacher")}


def _check_settings(
    path: Path, state: Mapping[str, Any], cfg: Config, run: Mapping[str, str], processes: int
) -> list[str]:
    """Raise CheckpointError if the checkpoint was trained otherwise. Returns notes on what may differ and does."""
    notes = [f"note: {path} is {state['note']}"] if "note" in state else []
    # Checkpoints of earlier versions do not name the validation list.
    saved_run, saved = {"validation list": run.get("validation list"), **state["run"]}, {**state["config"]}
    if saved.get("pretrained", True) and cfg.pretrained:  # read at the start only, wherever the file lies now
        saved["pretrained"] = cfg.pretrained
    epochs = saved.get("epochs")
    if isinstance(epochs, int) and cfg.epochs > epochs:
        saved["epochs"] = cfg.epochs
        notes.append(
            f"note: epochs is raised from {epochs} to {cfg.epochs}: from here on the learning rate follows the longer "
            f"schedule, so the end is not that of a run of {cfg.epochs} epochs from the start"
        )
    if _takes_as_many(state, cfg, processes):
        # The same images a step, shared among the processes in another way.
        saved |= {key: getattr(cfg, key) for key in ("batch_size", "accumulate")}
    differing = [f"{key}: {saved_run.get(key)} -> {value}" for key, value in run.items() if saved_run.get(key) != value]
    differing += differing_keys(saved, cfg)
    if differing:
        raise CheckpointError(f"{path}: was trained with other settings ({'; '.join(differing)}) {CHOICES}")
    return notes


def check_kinds(path: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a value is of another kind than training saves; the file may be a stranger's."""
    for key, kind in KINDS.items():
        if key in state and not isinstance(state[key], kind):
            raise CheckpointError(f"{path}: cannot be resumed: its {key} is a {type(state[key]).__name__} {CHOICES}")
    for key in ("config", "run"):
        try:
            json.dumps(state.get(key))
        except (TypeError, ValueError, RecursionError):
            raise CheckpointError(
                f"{path}: cannot be resumed: its {key} holds more than text and numbers {CHOICES}"
            ) from None
