"""State dicts in files: what torch.save wrote is read without running code, and a network's tensors are found in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Network = Literal["student", "teacher"]
# Under which keys a checkpoint holds each network, ours and those of UniMatch V2's release.
NETWORK_KEYS: dict[Network, tuple[str, ...]] = {"student": ("model",), "teacher": ("teacher", "model_ema")}
# What DistributedDataParallel, torch.compile and PyTorch Lightning put before a name, in any order.
WRAPPERS = ("module.", "_orig_mod.", "model.")


class WeightsError(ValueError):
    """Weights that are missing, unreadable or of another model; one line for the user."""


def read_checkpoint(path: str | Path) -> Any:
    """What `torch.save` wrote to `path`, on the CPU; only tensors, containers and numbers are read, never code.

    Raises WeightsError if there is no such file, or it is something else or incomplete.
    """
    # Published checkpoints hold their mIoU as a NumPy number, which weights_only reads only if it is allowed to.
    torch.serialization.add_safe_globals(_NUMPY_NUMBERS)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # torch.load has no error of its own: a bad file raises whatever its parser meets
        kind = type(error).__name__
        raise WeightsError(f"{path}: not a PyTorch checkpoint of tensors, or an incomplete one ({kind})") from None


def _numpy_scalar(module: str) -> Any:
    """The function under which NumPy pickles a number, restricted to plain numbers (no objects)."""

    def scalar(dtype: np.dtype, data: bytes) -> int | float:
        return np.frombuffer(data, dtype, count=1)[0].item()

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


_NUMPY_NUMBERS = [
    _numpy_scalar("numpy.core.multiarray"),  # NumPy 1
    _numpy_scalar("numpy._core.multiarray"),  # NumPy 2
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64")},
]


def choose_network(checkpoint: Any, prefer: Network = "student") -> Network:
    """Which network `find_state_dict` takes: the preferred one where the checkpoint holds both, else the one it has.

    A state dict that is not under a key of its own counts as the student.
    """
    checkpoint = _under(checkpoint, ("state_dict",), checkpoint)
    order: tuple[Network, ...] = ("teacher", "student") if prefer == "teacher" else ("student", "teacher")
    return next((network for network in order if _under(checkpoint, NETWORK_KEYS[network]) is not None), "student")


def find_state_dict(checkpoint: Any, source: str | Path, prefer: Network = "student") -> dict[str, Tensor]:
    """The state dict in a checkpoint, without what DDP, compilation or Lightning put before its names.

    It may be bare or under `state_dict`, `model` (the student), `teacher` or `model_ema` (the teacher).
    Raises WeightsError, after `source`, where there is none.
    """
    network = choose_network(checkpoint, prefer)
    checkpoint = _under(checkpoint, ("state_dict",), checkpoint)
    checkpoint = _under(checkpoint, NETWORK_KEYS[network], checkpoint)
    items = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
    if not items or not all(isinstance(key, str) and _is_dense(value) for key, value in items):
        raise WeightsError(f"{source}: holds no state dict (named tensors, bare or under `model`)")
    state = {}
    for key, value in items:
        if _bare(key) in state:
            raise WeightsError(f"{source}: holds two tensors for {_bare(key)}, one of them as {key}")
        state[_bare(key)] = value
    return state


def _under(checkpoint: Any, keys: tuple[str, ...], default: Any = None) -> Any:
    """The first mapping under one of these keys."""
    if not isinstance(checkpoint, Mapping):
        return default
    return next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), Mapping)), default)


def _bare(name: str) -> str:
    while wrapper := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None):
        name = name.removeprefix(wrapper)
    return name


def _is_dense(value: Any) -> bool:
    """Whether this is a tensor of numbers, all of them there; what is not may have no shape, or fail to be copied."""
    return (
        isinstance(value, Tensor)
        and not (value.is_nested or value.is_quantized or value.is_meta)
        and value.layout is torch.strided
    )


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What `state` lacks, has too many of or in another shape: the first of each and a count; empty if nothing.

    `num_batches_tracked` may be absent: it matters only to a BatchNorm without momentum.
    """
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
    return ", ".join(
        f"{kind} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "") for kind, keys in kinds if keys
    )
