"""Writing checkpoints: whole or not at all, with hard links for copies.

A run keeps `latest.pth` of the last finished epoch, `previous.pth` (the latest before it), `best.pth` and, within an
epoch, `midway.pth`. All are PyTorch's zip archives.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dataset.atomic import replacing
from util.errors import CheckpointError
from util.lock import check_lock
from util.run_files import BEST, CONFIG_FILE, EPOCHS, LATEST, MID_EPOCH, PREVIOUS, RESULTS, epoch_files

_TOKEN = secrets.token_hex(4)
# What an optimiser keeps of each parameter, in the parameter's shape.
MOMENTA = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}
CHOICES = (
    "- set them back, choose another --save-path, or start over with --resume never (it keeps earlier results aside)"
)


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write `state` to `path`, which is whole at every moment. Raises CheckpointError."""
    with writing(path) as temporary, open(temporary, "wb") as file:
        torch.save(dict(state), file)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path for a file of the save path, which it replaces once it is written and on the disk.

    Raises CheckpointError if the disk refuses, SavePathError if another run has taken over the folder.
    """
    check_lock(path.parent)
    # A name of this process alone: a run that was suspended may still be writing its own.
    temporary = path.with_name(f"{path.name}.{_TOKEN}.tmp")
    try:
        # Checked again: a run may be suspended, and its lock taken over, at any moment.
        with replacing(path, durable=True, temporary=temporary, check=lambda: check_lock(path.parent)):
            yield temporary
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({_reason(error)}); earlier ones are intact") from None


def save_epoch(state: Mapping[str, Any], save_path: Path, improved: bool, keep_last: int = 0) -> None:
    """Save the state after an epoch; if it `improved` on the best mIoU, as the best one too.

    The latest one becomes the previous one and stays until the new one is complete. Of the last `keep_last` epochs
    copies are kept. The mid-epoch checkpoint is removed.
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
        check_lock(save_path)
        for old in epoch_files(save_path)[:-keep_last]:
            _remove(old)
    check_lock(save_path)  # else it is another run's
    _remove(save_path / MID_EPOCH)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make `target` the same checkpoint as `source`: a hard link where the file system has them, else a copy."""
    with writing(target) as temporary:
        _remove(temporary)  # of a killed run
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def aside_name(path: Path) -> Path:
    """The next free name under which a damaged file is kept."""
    return _next_free(path.with_name(f"{path.name}.damaged-*"))


def tidy(save_path: Path, damaged: Iterable[Path]) -> None:
    """Keep damaged checkpoints under another name, and remove the unfinished files that a killed run left behind."""
    for path in damaged:
        path.rename(aside_name(path))
    for name in (LATEST, PREVIOUS, BEST, MID_EPOCH, CONFIG_FILE):
        for path in save_path.glob(f"{name}*.tmp"):
            _remove(path)


def set_aside(save_path: Path, given: Path | None = None) -> Path | None:
    """Move earlier results into a new folder `previous-N` beside them; None where there are none.

    The config that the run is `given` stays in its place if it is there, and a copy of it is set aside.
    """
    results = [path for pattern in RESULTS for path in save_path.glob(pattern)]
    kept = [path for path in results if given and given.exists() and path.samefile(given)]
    if len(results) == len(kept):
        return None
    target = _next_free(save_path / "previous-*")
    target.mkdir()
    for path in results:
        if path in kept:
            shutil.copy2(path, target / path.name)
        else:
            path.rename(target / path.name)
    return target


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Load an optimiser's state, such as momenta, in place. Rates and other settings stay as the config sets them.

    Raises CheckpointError, which names the file `path`, if the state does not fit this optimiser.
    """
    settings, names = [{**group} for group in optimizer.param_groups], MOMENTA[type(optimizer)]
    try:
        optimizer.load_state_dict(state)
        fits = all(_fits(parameter, values, names) for parameter, values in optimizer.state.items())
    except Exception:  # torch takes what it is given apart without looking at it first
        fits = False
    if not fits:
        raise CheckpointError(f"{path}: cannot be resumed: its optimizer is not the state of this model's {CHOICES}")
    for parameter, values in optimizer.state.items():
        for name in names:
            momentum = values.get(name)
            if momentum is not None and momentum.stride() != parameter.stride():
                # Saved with another memory format. The fused kernels walk through both in the order of memory.
                values[name] = torch.empty_like(parameter).copy_(momentum).detach_()
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # with scale_lr and another number of processes, base_lr is not the saved one
        for values in (optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state):
            if "step" in values:
                values["step"] = _placed(values, group["fused"])


def _placed(values: Mapping[str, torch.Tensor], fused: bool | None) -> torch.Tensor:
    """AdamW's count of steps where its kernel needs it: the fused one beside the momenta, the others on the CPU.

    torch places it for the kernel that saved it: checkpoints of a CPU, and the release's, then fail on a GPU.
    """
    return values["step"].to(values["exp_avg"].device, torch.float32) if fused else values["step"].cpu()


def _fits(parameter: torch.Tensor, values: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether these values are an optimiser's state of the parameter."""
    if names == MOMENTA[torch.optim.SGD] and values.get(*names) is None:  # the parameter had no gradient yet
        return True
    counted = names == MOMENTA[torch.optim.SGD] or (torch.is_tensor(values["step"]) and values["step"].ndim == 0)
    return counted and all(torch.is_tensor(values[name]) and values[name].shape == parameter.shape for name in names)


def _next_free(pattern: Path) -> Path:
    """The path with the first number, from 1, in place of `*` that is not taken."""
    number = 1
    while (path := pattern.with_name(pattern.name.replace("*", str(number)))).exists():
        number += 1
    return path


def _reason(error: Exception) -> str:
    """What the disk said: torch hides a full one behind an error of its own."""
    hidden = not isinstance(error, OSError) and isinstance(error.__context__, OSError)
    cause = error.__context__ if hidden else error
    return getattr(cause, "strerror", None) or str(cause)


def _remove(path: Path) -> None:
    """Remove a file if it is there; on a file system that became read-only it stays."""
    with contextlib.suppress(OSError):
        path.unlink()
