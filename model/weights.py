"""Reading weights: ImageNet backbones and checkpoints of whole models, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.backbone import BACKBONES, create_backbone

PROJECT_ROOT = Path(__file__).resolve().parents[1]
# Backbones that ImageNet weights are published of, by the paper's authors or by torchvision.
PUBLISHED = ("resnet50", "resnet101", "xception", "resnet50_tv", "resnet101_tv")


class WeightsError(ValueError):
    """Weights that are missing, unreadable or of another model; one line for the user."""


def load_pretrained(backbone: nn.Module, name: str, path: str | Path | None = None) -> None:
    """Load ImageNet weights into `backbone`, in place; arguments and errors are those of `read_pretrained`."""
    backbone.load_state_dict(read_pretrained(backbone, name, path), strict=False)  # the reading is stricter


def read_pretrained(backbone: nn.Module, name: str, path: str | Path | None = None) -> dict[str, Tensor]:
    """ImageNet weights that fit `backbone`, which is of kind `name`; nothing is loaded into it.

    `path`: a weights file, relative to the current folder or else to the project; None stands for
    `pretrained/NAME.pth` of the project. A state dict is expected, bare or under `state_dict` or `model`. Its
    classifier (`fc.*`) is left out, and for Xception every name with `itr`, `tmp` or `track` in it. Anything else
    missing or unexpected is a WeightsError.
    """
    path = PROJECT_ROOT / "pretrained" / f"{name}.pth" if path is None else _find(path)
    try:
        return pretrained_state(backbone, name, read_checkpoint(path), path)
    except WeightsError as error:
        stem = f" with {_stem(name)}" if name.startswith("resnet") else ""
        where = "see pretrained/README.md for where to get them" if name in PUBLISHED else "none are published"
        raise WeightsError(
            f"{error}; expected ImageNet weights of {name}{stem}: {where}, or set `pretrained: false`"
        ) from None


def pretrained_state(backbone: nn.Module, name: str, checkpoint: Any, source: str | Path) -> dict[str, Tensor]:
    """What `read_pretrained` gives and raises for a file of this content; `source` names it in errors."""
    state = find_state_dict(checkpoint, source)
    ignored = ("itr", "tmp", "track") if name == "xception" else ()
    state = {k: v for k, v in state.items() if not k.startswith("fc.") and not any(part in k for part in ignored)}
    if fault := _differences(backbone.state_dict(), state):
        found, stem = _identify(state), state.get("conv1.weight")
        if found and found != name:
            fault = f"weights of {found}"
            if "resnet" in found and "resnet" in name and _stem(found) != _stem(name):
                fault += f", a ResNet with another stem, {_stem(found)}: set `backbone: {found}` to use them"
        elif name in ("resnet18", "resnet50", "resnet101") and stem is not None and stem.shape[-1:] == (7,):
            fault = f"a ResNet with another stem, {_stem('resnet50_tv')} as torchvision's"
        raise WeightsError(f"{source}: {fault}")
    return state


def load_checkpoint_state(model: nn.Module, checkpoint: Any, source: str | Path) -> None:
    """Load a segmentation checkpoint into `model` in place: a state dict, bare or under `model`, published ones too.

    A `module.` prefix of the names (DistributedDataParallel) is dropped. Every name and shape must agree, else the
    model stays as it is and a WeightsError says, after `source` (the file), what differs.
    """
    state, own = find_state_dict(checkpoint, source), model.state_dict()
    if fault := _differences(own, state):
        found, expected = (_identify(_part(s, "backbone.")) for s in (state, own))
        classes, own_classes = (s["classifier.bias"].numel() if "classifier.bias" in s else None for s in (state, own))
        if found and expected and found != expected:
            raise WeightsError(f"{source}: its backbone is {found}, the config's is {expected}")
        if classes and own_classes and classes != own_classes:
            raise WeightsError(f"{source}: its classifier has {classes} classes, the config has {own_classes}")
        raise WeightsError(f"{source}: not a checkpoint of this model: {fault}")
    model.load_state_dict(state, strict=False)  # _differences is stricter


def read_checkpoint(path: str | Path) -> Any:
    """What `torch.save` wrote to `path`, on the CPU; only tensors, containers and numbers are read, never code.

    Raises WeightsError if there is no such file, or it is something else or incomplete.
    """
    # Published checkpoints hold their mIoU as a NumPy number, which weights_only reads only if told so.
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


def _find(path: str | Path) -> Path:
    """A relative path is taken from the current folder, else from the project."""
    path = Path(path).expanduser()
    return path if path.exists() or path.is_absolute() else PROJECT_ROOT / path


def find_state_dict(checkpoint: Any, source: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, bare or under `state_dict` or `model`, without `module.` prefixes."""
    for key in ("state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    items = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
    if not items or not all(isinstance(key, str) and _is_dense(value) for key, value in items):
        raise WeightsError(f"{source}: holds no state dict (named tensors, bare or under `model`)")
    return {key.removeprefix("module."): value for key, value in items}


def _is_dense(value: Any) -> bool:
    """Whether this is a tensor of numbers, all of them there; what is not may have no shape, or fail to be copied."""
    return (
        isinstance(value, Tensor)
        and not (value.is_nested or value.is_quantized or value.is_meta)
        and value.layout is torch.strided
    )


def _stem(name: str) -> str:
    """The stem of a ResNet, and a weight's name that shows it."""
    if name.endswith("_tv"):
        return "one 7x7 convolution (conv1.weight)"
    return "a deep stem of three 3x3 convolutions (conv1.0.weight)"


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
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


def _identify(state: Mapping[str, Tensor]) -> str | None:
    """The backbone whose names and shapes these are, if any."""
    with torch.device("meta"):  # shapes without memory
        return next((name for name in BACKBONES if not _differences(create_backbone(name).state_dict(), state)), None)
