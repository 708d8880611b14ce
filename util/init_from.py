"""Starting a run from a segmentation checkpoint's weights: what fits is loaded, the rest is initialised."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import WeightsError, build_model, choose_network, find_state_dict, read_checkpoint
from util.config import Config, resolve_path

NAMED = 6  # tensors that the log names one by one


class Start(NamedTuple):
    """The weights to start from, by name, and a line for the log that names what is initialised."""

    weights: dict[str, Tensor]
    note: str


def read_start(model: nn.Module, path: str) -> Start:
    """The tensors of a checkpoint that fit `model` by name and shape: ours, or a release's with `module.` names.

    It may be of other classes or another data set. Raises WeightsError, which names the file, if nothing fits.
    """
    try:
        checkpoint = read_checkpoint(resolve_path(path))
        state = find_state_dict(checkpoint, path)
    except WeightsError as error:
        raise WeightsError(f"init_from: {error}") from None
    own = model.state_dict()
    weights = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    if not any(name.endswith("weight") for name in weights):
        raise WeightsError(f"init_from: {path}: none of its tensors fits this model by name and shape")
    # A count of batches matters only to a BatchNorm without momentum, and is not in every file.
    new = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    reasons = [f"{name} ({_shapes(state[name], own[name])})" if name in state else name for name in new[:NAMED]]
    more = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
    unused = sum(name not in own for name in state)
    note = f"starting from the weights of {path} (init_from): {len(weights)} of {len(own)} tensors"
    if choose_network(checkpoint, "teacher") != choose_network(checkpoint):
        note += " of the student, the trained one of the file's two networks"
    note += f"; new are {', '.join(reasons)}{more}" if new else ""
    note += f"; {unused} of the file have no place in this model" if unused else ""
    return Start(weights, note)


def load_start(model: nn.Module, path: str) -> None:
    """Load what fits into `model`, in place. Raises WeightsError as `read_start` does."""
    model.load_state_dict(read_start(model, path).weights, strict=False)


def check_start(cfg: Config) -> str:
    """The note of `read_start` for the config's model and `init_from`, and its WeightsError; needs no memory for it."""
    with torch.device("meta"):
        model = build_model(cfg, pretrained=False)
    return read_start(model, cfg.init_from).note


def _shapes(found: Tensor, needed: Tensor) -> str:
    return f"{tuple(found.shape)} instead of {tuple(needed.shape)}"
