"""Reference weights and images by formula, and the comparison of a tensor to its summary in figures.json."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.reference import formulas


def reference_state(model_or_state_dict: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict for which the figures were computed: every tensor a function of its name and shape (float32)."""
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    return {name: _reference_tensor(name, tuple(tensor.shape)) for name, tensor in state.items()}


def _reference_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    n = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(n)
    elif name.endswith(("running_mean", "bias")):
        value = 0.1 * n
    elif len(shape) == 4:
        value = n * math.sqrt(2 / (shape[1] * shape[2] * shape[3]))
    else:
        value = 0.7 + 0.1 * n
    return torch.from_numpy(value.astype(np.float32))


def reference_state_v2(model_or_shapes: nn.Module | Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The state dict for which UniMatch V2's figures were computed (float32), from a model or from names and shapes."""
    if isinstance(model_or_shapes, nn.Module):
        model_or_shapes = {name: tensor.shape for name, tensor in model_or_shapes.state_dict().items()}
    return {name: _reference_tensor_v2(name, tuple(shape)) for name, shape in model_or_shapes.items()}


def _reference_tensor_v2(name: str, shape: tuple[int, ...]) -> Tensor:
    n = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("gamma"):
        value = 0.5 + 0.1 * n
    elif len(shape) == 4:
        value = n * math.sqrt(2 / (shape[1] * shape[2] * shape[3]))
        if name.endswith("output_conv.2.weight"):
            value /= 15
    elif len(shape) == 2:
        value = n / math.sqrt(shape[1])
    elif name.endswith("weight"):
        value = 0.7 + 0.1 * n
    else:
        value = 0.1 * n
    return torch.from_numpy(value.astype(np.float32))


def with_reference_weights(
    model: nn.Module, state_of: Callable[[nn.Module], dict[str, Tensor]] = reference_state
) -> nn.Module:
    """The same model with reference weights, in float64 and eval mode."""
    model.double().load_state_dict(state_of(model))
    return model.eval()


def reference_image(*args: int) -> Tensor:
    """The image of formulas.image, in float64."""
    return torch.from_numpy(formulas.image(*args)).double()


def check_summary(tensor: Tensor, summary: Mapping[str, Any], rtol: float = 1e-5) -> None:
    """Assert that shape, mean, std, l2 norm and the eight samples of `tensor` are those of `summary`.

    Figures have 7 digits and were computed in float64. Exact zeros, as after a ReLU, must be zeros.
    """
    assert list(tensor.shape) == list(summary["shape"])
    flat = tensor.detach().double().flatten()
    picks = torch.from_numpy(np.linspace(0, flat.numel() - 1, 8).astype(np.int64))
    computed = {"mean": flat.mean().item(), "l2": flat.norm().item()}
    if summary["std"] is not None:  # a single value has none
        computed["std"] = flat.std().item()
    assert computed == pytest.approx({key: summary[key] for key in computed}, rel=rtol, abs=0)
    assert flat[picks].tolist() == pytest.approx(list(summary["samples"]), rel=rtol, abs=0)
