"""DistributedDataParallel around the model, and the model inside it."""

from __future__ import annotations

import contextlib
import inspect

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util.distributed.batchnorm import convert_batchnorm
from util.distributed.collectives import process_count


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on `device`; with several processes under DDP, with BatchNorm statistics over all of them."""
    model = model.to(device)
    if not dist.is_initialized():
        return model
    model.share = dist.get_rank(), dist.get_world_size()  # of a step's samples, for what is drawn for them
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        convert_batchnorm(model)
    # After its first backward pass DDP rearranges the gradients, unless it looks for unused parameters (there are
    # none). From three processes on, their sums' last bits would then depend on where a run was interrupted.
    fixed_order = device.type == "cpu" and process_count() > 2
    # Buffers are equal everywhere without being sent: synchronised BatchNorm computes the same statistics.
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        **_NO_BUFFER_BROADCAST,
        gradient_as_bucket_view=True,
        find_unused_parameters=fixed_order,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Keep gradients local: around the forward and backward of a part that is not a step's last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


# torch 2.14 renamed the argument.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_BROADCAST = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
