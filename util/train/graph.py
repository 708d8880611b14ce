"""A step as one CUDA graph: its kernels are recorded once, and later steps launch them all together.

Otherwise the host launches some thousand kernels in a step, one by one. At small batches a GPU waits for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

WARM_UP = 3  # steps before the recording, in which cuDNN chooses kernels and a compiler compiles


class GraphedStep:
    """A method's step that is recorded after WARM_UP ordinary ones. Forward and backward passes are in the graph.

    The optimiser is not, so its learning rate and fp16's scaler stay the host's. Batches must have one shape, and no
    gradient may be there before a step. Metrics and gradients are tensors that the next step overwrites. Weights and
    buffers must stay the same tensors; so they do when a checkpoint is loaded.
    """

    def __init__(self, train_step: Callable[..., dict[str, torch.Tensor]], parameters: Iterable[nn.Parameter]) -> None:
        self._train_step, self._parameters = train_step, list(parameters)
        self._steps, self._replay = 0, None

    def __call__(self, batch: Any, backward: Callable[[torch.Tensor], None]) -> dict[str, torch.Tensor]:
        """As the method's step."""
        self._steps += 1
        if self._steps <= WARM_UP:
            return beside(lambda: self._train_step(batch, backward))
        if self._replay is None:
            self._batch = tree_map_only(torch.Tensor, torch.clone, batch)
            self._metrics, self._replay = record(lambda: self._train_step(self._batch, backward))
            self._gradients = [parameter.grad for parameter in self._parameters]
        for own, new in zip(tree_leaves(self._batch), tree_leaves(batch), strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(new)
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._metrics


def beside(function: Callable[[], Any]) -> Any:
    """Run `function` on a side stream: what is recorded later must have run before, and not on the default stream."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = function()
    current.wait_stream(stream)
    return result


def record(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Record the kernels of `function` without running them: what it returns, and the function that runs them."""
    graph, random_state = torch.cuda.CUDAGraph(), torch.cuda.get_rng_state()
    # Only this thread is held to what can be recorded: another one pins the next batch's memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    torch.cuda.set_rng_state(random_state)  # draws are made when the kernels run, from the seed at that time
    return result, graph.replay
