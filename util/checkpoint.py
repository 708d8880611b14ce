"""Checkpoints: written whole or not at all, read without running code, compared with the config that continues them.

A run keeps `latest.pth` of the last finished epoch, `previous.pth`, which was the latest before it, `best.pth`, and,
within an epoch, `midway.pth`. The files are PyTorch's zip archives, whose parts carry checksums (CRC-32); torch.load
does not look at them, so what a run continues from is verified here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from model import read_checkpoint
from util.config import Config, differing_keys
from util.errors import CheckpointError
from util.run_files import BEST, CONFIG_FILE, EPOCHS, LATEST, MID_EPOCH, PREVIOUS, RESULTS

NEEDED = ("model", "optimizer", "epoch", "iteration", "previous_best", "config", "run")
NUMBER = (int, float)
KINDS = {"model": dict, "optimizer": dict, "epoch": int, "iteration": int, "previous_best": NUMBER, "config": dict}
KINDS |= {"run": dict, "best_epoch": int, "last_miou": NUMBER}
CHOICES = (
    "- set them back, choose another --save-path, or start anew with --resume never (it keeps earlier results aside)"
)


@dataclass(frozen=True)
class Found:
    """The checkpoint to continue from: its file, the TensorBoard step that it comes after, and what there is to say."""

    path: Path | None
    first_step: int = 0
    notes: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write `state` to `path`, which is whole at every moment. Raises CheckpointError."""
    with replacing(path) as file:
        torch.save(dict(state), file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is written to the end and flushed to the disk.

    Until then it has a temporary name. Raises CheckpointError if the disk refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({_reason(error)}); earlier ones are intact") from None
    finally:
        _remove(temporary)


def save_epoch(state: Mapping[str, Any], save_path: Path, improved: bool, keep_last: int = 0) -> None:
    """Save the state after an epoch; if it `improved` on the best mIoU, as the best one too.

    The latest one becomes the previous one and stays until the new one is complete. Of the last `keep_last` epochs
    copies are kept. What was saved within the epoch is removed.
    """
    latest, best = save_path / LATEST, save_path / BEST
    if latest.exists():
        copy_checkpoint(latest, save_path / PREVIOUS)
    if improved:
        # Best before latest: a run killed between the two repeats the epoch and writes the same again.
        save_checkpoint(state, best)
        copy_checkpoint(best, latest)
    else:
        save_checkpoint(state, latest)
    if keep_last:
        copy_checkpoint(latest, save_path / EPOCHS.replace("*", f"{state['epoch']:04}"))
        for old in sorted(save_path.glob(EPOCHS))[:-keep_last]:
            _remove(old)
    _remove(save_path / MID_EPOCH)


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


def find_checkpoint(save_path: Path, cfg: Config, run: Mapping[str, str], processes: int = 1) -> Found:
    """What to continue from: the newest checkpoint that is whole; its path is None for a fresh run.

    `run` says what shapes training besides the config: method and lists. A checkpoint within an epoch serves only the
    number of `processes` that wrote it. Raises CheckpointError where the settings differ, and where `latest.pth` is
    damaged and nothing is left to fall back to. Nothing is changed here.
    """
    damaged: list[Path] = []
    notes: list[str] = []
    earlier = sorted(save_path.glob(EPOCHS), reverse=True)
    whole: dict[Path, dict[str, Any]] = {}
    for path in (save_path / LATEST, save_path / PREVIOUS, *earlier, save_path / BEST):
        if state := _read_whole(path, damaged):
            whole[path] = state
            break
    midway = save_path / MID_EPOCH
    state = _read_whole(midway, damaged)
    if state and state["epoch"] >= max((other["epoch"] for other in whole.values()), default=0):
        _check_settings(midway, state, cfg, run)
        if state["processes"] == processes:
            whole = {midway: state}
        else:
            notes.append(
                f"note: {midway} is of {state['processes']} process(es), and there are {processes} now: "
                f"going on from the start of epoch {max((other['epoch'] for other in whole.values()), default=0) + 1}"
            )
    if not whole:
        if any(path != midway for path in damaged):
            raise CheckpointError(
                f"{damaged[0]}: damaged or not a checkpoint, and there is no earlier one to fall back to: "
                "put a good copy in its place, or start anew with --resume never (it keeps earlier results aside)"
            )
        path, first_step = None, 0
    else:
        ((path, state),) = whole.items()
        _check_settings(path, state, cfg, run)
        # Within an epoch the curves of its last step are still to be written.
        first_step = state["iteration"] - ("position" in state)
    notes += [
        f"warning: {bad} is damaged or incomplete: it is kept as {aside_name(bad).name}, and training goes on from "
        + (path.name if path else "the beginning")
        for bad in damaged
    ]
    return Found(path, first_step, tuple(notes), tuple(damaged))


def _read_whole(path: Path, damaged: list[Path]) -> dict[str, Any] | None:
    """What tells a checkpoint's place and settings; None if there is no such file, or it is put among the `damaged`."""
    try:
        open(path, "rb").close()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        state = None if broken else read_checkpoint(path)
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
    return {key: value for key, value in state.items() if key not in ("model", "optimizer", "metrics")}


def _check_settings(path: Path, state: Mapping[str, Any], cfg: Config, run: Mapping[str, str]) -> None:
    saved = state["run"]
    differing = [f"{key}: {saved.get(key)} -> {value}" for key, value in run.items() if saved.get(key) != value]
    differing += differing_keys(state["config"], cfg)
    if differing:
        raise CheckpointError(f"{path}: was trained with other settings ({'; '.join(differing)}) {CHOICES}")


def aside_name(path: Path) -> Path:
    """The next free name under which a damaged file is kept."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return target


def tidy(save_path: Path, damaged: Iterable[Path]) -> None:
    """Keep damaged checkpoints under another name, and remove the unfinished files that a killed run left behind."""
    for path in damaged:
        path.rename(aside_name(path))
    for name in (LATEST, PREVIOUS, BEST, MID_EPOCH, CONFIG_FILE):
        _remove(save_path / f"{name}.tmp")


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
    for p, momentum in momenta:
        if momentum is not None and momentum.stride() != p.stride():
            # Saved with another memory format. The fused kernels walk through both in the order of memory.
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum).detach_()
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
