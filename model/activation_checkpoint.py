"""Activation checkpointing: parts of the network computed again in the backward pass instead of kept until then.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174). Losses and gradients stay the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run(part: nn.Module, *inputs: Any, again: bool, function: Callable[..., Any] | None = None) -> Any:
    """`function(*inputs)`, by default `part(*inputs)`; `again`: its activations are computed again when needed.

    `part` holds every BatchNorm that the function uses. The function must draw no random numbers.
    """
    function = function or part
    if not (again and torch.is_grad_enabled()):
        return function(*inputs)

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), _statistics_kept(part)

    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextlib.contextmanager
def _statistics_kept(part: nn.Module) -> Iterator[None]:
    """BatchNorm normalises with the batch's statistics as before, but its running ones have seen this batch already."""
    norms = [module for module in part.modules() if isinstance(module, _BatchNorm)]
    before = [(module.momentum, module.num_batches_tracked) for module in norms]
    for module in norms:
        # Not track_running_stats: another number of tensors would be saved than before. The batch is counted in a copy,
        # since torch's SyncBatchNorm refuses to train without a count.
        module.momentum, module.num_batches_tracked = 0.0, module.num_batches_tracked.clone()
    try:
        yield
    finally:
        for module, (momentum, count) in zip(norms, before, strict=True):
            module.momentum, module.num_batches_tracked = momentum, count
