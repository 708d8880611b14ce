"""Checkpoints: written whole or not at all, read without running code, compared with the config that continues them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model import read_checkpoint
from util.config import Config, differing_keys

LATEST, BEST, LOG_FILE, CONFIG_FILE = "latest.pth", "best.pth", "train.log", "config.yaml"
# What a run writes into its save path; `--resume never` moves these aside.
RESULTS = (LATEST, BEST, LOG_FILE, CONFIG_FILE, "events.out.tfevents.*")
NEEDED = ("model", "optimizer", "epoch", "iteration", "previous_best", "config", "run")
NUMBER = (int, float)
KINDS = {"model": dict, "optimizer": dict, "epoch": int, "iteration": int, "previous_best": NUMBER, "config": dict}
KINDS |= {"run": dict, "best_epoch": int, "last_miou": NUMBER}
CHOICES = (
    "- set them back, choose another --save-path, or start anew with --resume never (it keeps earlier results aside)"
)


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or continued; the message is one line for the user."""


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write `state` under a temporary name, flush it to the disk, then rename: `path` is whole at every moment."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({_reason(error)}); earlier ones are intact") from None
    finally:
        _remove(temporary)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make `target` the same checkpoint as `source`: a hard link where the file system has them, else a copy."""
    temporary = target.with_name(target.name + ".tmp")
    _remove(temporary)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({_reason(error)}); earlier checkpoints are intact"
        ) from None
    finally:
        _remove(temporary)  # also where both names were one file already: renaming then does nothing


def find_checkpoint(save_path: Path, cfg: Config, run: Mapping[str, str]) -> dict[str, Any] | None:
    """The `latest.pth` to continue from, or None for a fresh run.

    `run` says what shapes training besides the config: method and lists. Raises CheckpointError where any differs.
    """
    path = save_path / LATEST
    if not path.exists():
        return None
    state = read_checkpoint(path)
    missing = [key for key in NEEDED if not isinstance(state, dict) or key not in state]
    if missing:
        raise CheckpointError(f"{path}: cannot be resumed: it has no {', '.join(missing)} {CHOICES}")
    check_kinds(path, state)
    saved = state["run"]
    differing = [f"{key}: {saved.get(key)} -> {value}" for key, value in run.items() if saved.get(key) != value]
    differing += differing_keys(state["config"], cfg)
    if differing:
        raise CheckpointError(f"{path}: was trained with other settings ({'; '.join(differing)}) {CHOICES}")
    return state


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


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Load an optimiser's state in place, of momentum and the like; rates and other settings stay those of the config.

    Raises CheckpointError, which names the file `path`, if the state does not fit.
    """
    settings = [{**group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        momenta = [(p, values.get("momentum_buffer")) for p, values in optimizer.state.items()]
        fits = all(m is None or (isinstance(m, torch.Tensor) and m.shape == p.shape) for p, m in momenta)
    except Exception:  # torch takes what it is given apart without looking at it first
        fits = False
    if not fits:
        raise CheckpointError(f"{path}: cannot be resumed: its optimizer is not the state of this model's {CHOICES}")
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # with scale_lr and another number of processes, base_lr is not the saved one


def set_aside(save_path: Path) -> Path | None:
    """Move earlier results into a new folder `previous-N` beside them; None where there are none."""
    results = [path for pattern in RESULTS for path in save_path.glob(pattern)]
    if not results:
        return None
    number = 1
    while (target := save_path / f"previous-{number}").exists():
        number += 1
    target.mkdir()
    for path in results:
        path.rename(target / path.name)
    return target


def _reason(error: Exception) -> str:
    """What the disk said: torch hides a full one behind an error of its own."""
    hidden = not isinstance(error, OSError) and isinstance(error.__context__, OSError)
    cause = error.__context__ if hidden else error
    return getattr(cause, "strerror", None) or str(cause)


def _remove(path: Path) -> None:
    """Remove a temporary file if it is there; on a file system that became read-only it stays."""
    with contextlib.suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every file system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
