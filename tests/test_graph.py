"""util/train/graph.py: a recorded step gives what ordinary steps give; and where a graph cannot be, it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from dataset.packing import to_device
from tests.helpers import assert_same, make_model, model_config
from tests.steps import ALL_BOXES, NO_BOX, packed_batch, run_step
from util.backends import set_backends
from util.errors import ConfigError
from util.losses import CrossEntropy
from util.precision import check_precision, describe_precision
from util.schedule import build_optimizer
from util.train import graph
from util.train.graph import WARM_UP, GraphedStep

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BOXES = ([NO_BOX, ALL_BOXES], [NO_BOX] * 2, [ALL_BOXES] * 2, [ALL_BOXES, NO_BOX], [NO_BOX] * 2)


def recorder(model: nn.Module) -> Callable[..., Any]:
    """A stand-in for CUDA's recording: no step is taken while it records, and a replay fills the recorded tensors."""

    def record(function: Callable[[], dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        state, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        metrics = function()
        gradients = [parameter.grad for parameter in model.parameters()]
        model.load_state_dict(state)
        torch.set_rng_state(random_state)

        def replay() -> None:
            model.zero_grad(set_to_none=True)
            for own, new in zip(metrics.values(), function().values(), strict=True):
                own.copy_(new)
            for own, parameter in zip(gradients, model.parameters(), strict=True):
                own.copy_(parameter.grad)

        return metrics, replay

    return record


def _train(graphed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, Any]]:
    model = make_model().to(device)
    optimizer = build_optimizer(model, 0.01, 2.0)

    def step(batch: Any, backward: Callable[[torch.Tensor], None]) -> dict[str, torch.Tensor]:
        return run_step("unimatch", model, batch, CrossEntropy(), backward)

    if graphed:
        step = GraphedStep(step, model.parameters())
        if device == CPU:
            monkeypatch.setattr(graph, "beside", lambda function: function())
            monkeypatch.setattr(graph, "record", recorder(model))
    rows = []
    for seed, boxes in enumerate(BOXES):
        batch = to_device(packed_batch("unimatch", boxes, seed=seed), device, fixed_shapes=True)
        torch.manual_seed(seed)
        optimizer.zero_grad(set_to_none=True)
        rows.append({name: float(value) for name, value in step(batch, torch.Tensor.backward).items()})
        optimizer.step()
    return rows, model.state_dict()


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with `deterministic: true`: otherwise a GPU's interpolation adds up in any order."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_backends(SimpleNamespace(deterministic=True, tf32=None), CPU)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark, cudnn.deterministic = before


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "deterministic")
def test_recorded_steps_equal_ordinary_ones_bit_for_bit(device, monkeypatch):
    assert len(BOXES) == WARM_UP + 2
    (rows, state), (expected_rows, expected) = (_train(graphed, device, monkeypatch) for graphed in (True, False))
    assert len({row["loss"] for row in rows}) == len(BOXES)
    assert rows == expected_rows
    assert_same(state, expected)


@pytest.mark.slow
@pytest.mark.parametrize("boxes", [[NO_BOX] * 2, [NO_BOX, ALL_BOXES]], ids=["no box", "a box"])
def test_with_fixed_shapes_losses_and_gradients_are_those_of_the_ragged_way(boxes):
    results = []
    for fixed_shapes in (True, False):
        batch = to_device(packed_batch("fixmatch", boxes), CPU, fixed_shapes)
        model = make_model().double()
        batch = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, batch)
        metrics = run_step("fixmatch", model, batch, CrossEntropy())
        results.append((metrics, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)


def test_a_graph_is_a_gpu_s_and_of_one_process():
    cfg = model_config(cuda_graphs=True)
    check_precision(cfg, GPU)
    with pytest.raises(ConfigError, match=r"^cuda_graphs: true needs a GPU, and this run is on cpu: leave it out$"):
        check_precision(cfg, CPU)
    with pytest.raises(ConfigError, match=r"^cuda_graphs: true is for one process, and this run has 2, [^\n]*$"):
        check_precision(cfg, GPU, processes=2)
    assert "one CUDA graph a step" in describe_precision(cfg, GPU)
