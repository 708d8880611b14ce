"""Processes: how this one was started, the process group, DDP and synchronised BatchNorm on any device.

Rank logic lives here and in util.log; method scripts have none.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from util.config import ConfigError
from util.faults import Watch


@dataclass(frozen=True)
class Processes:
    """This process's place: its rank of `count`, and its number on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def find_processes(port: int | None = None) -> Processes:
    """How this process was started: by torchrun, by srun, or alone.

    Under srun the rendezvous address is put into the environment: the job's first node, and `port`.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Processes(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    # Only srun sets SLURM_STEP_NUM_TASKS: a plain `python` inside a batch script is alone, whatever the job's size.
    count = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if count == 1:
        return Processes()
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_slurm_node()
    if "MASTER_PORT" not in env:
        if port is None:
            raise ConfigError("--port is needed under srun with several processes: any free port, the same for all")
        env["MASTER_PORT"] = str(port)
    processes = Processes(int(env["SLURM_PROCID"]), count, int(env["SLURM_LOCALID"]))
    if processes.is_main and not port_is_free(int(env["MASTER_PORT"])):
        raise ConfigError(f"port {env['MASTER_PORT']} is taken on {env['MASTER_ADDR']}: choose another")
    return processes


def local_process_count() -> int:
    """The number of processes of this run on this machine."""
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"])
    # Slurm writes `4`, or `4(x2),3` for nodes with 4, 4 and 3 tasks: the first number is near enough.
    tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "")) if "SLURM_STEP_NUM_TASKS" in env else None
    return int(tasks[0]) if tasks else 1


def choose_device(wanted: str, processes: Processes) -> torch.device:
    """This process's device for `auto`, `cpu` or `cuda`. Raises ConfigError where it does not exist."""
    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError(
            "device: cuda was asked for, but torch finds no GPU (use --set device=cpu, or check the driver)"
        )
    if processes.local_rank >= count:
        raise ConfigError(
            f"process {processes.local_rank + 1} on this machine has no GPU: there are {count} "
            "(start fewer processes, or use --set device=cpu)"
        )
    return torch.device("cuda", processes.local_rank)


def port_is_free(port: int, host: str = "") -> bool:
    """Whether a server could listen on `port` of this machine now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, port))
        except OSError:
            return False
        return True


@contextlib.contextmanager
def process_group(
    processes: Processes,
    device: torch.device,
    seconds: float = 600,
    on_fault: Callable[[str], None] = lambda line: None,
) -> Iterator[None]:
    """Join the other processes (nccl on GPUs, gloo on the CPU); nothing for a process alone.

    A process that fails ends the others soon, one that does not answer within `seconds`; one of them tells why
    (util.faults). `on_fault` gets the line where it is another's fault.
    """
    if processes.count == 1:
        yield
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    # The main process may check the data for long before it comes.
    patience = timedelta(hours=2)
    store, *_ = next(rendezvous("env://", processes.rank, processes.count, timeout=patience))
    # torchrun's store outlives a restart of the processes.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(f"here{processes.rank}", "")
    store.wait([f"here{rank}" for rank in range(processes.count)], patience)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=processes.rank,
        world_size=processes.count,
        timeout=timedelta(seconds=seconds),
        device_id=device if cuda else None,
    )
    watch = Watch(processes.rank, processes.count, seconds, on_fault)
    dist.barrier()
    watch.start()
    try:
        yield
    except Exception as error:
        # The group stays: without this process the others would fail at once, before it has told its own fault.
        settled = watch.settle(error)
        if settled is error:
            raise
        raise settled from None
    watch.stop()
    dist.barrier()  # the first process may be the one that keeps the store
    dist.destroy_process_group()


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on `device`; with several processes under DDP, with BatchNorm statistics over all of them."""
    model = model.to(device)
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        _convert_batchnorm(model)
    # After its first backward pass DDP arranges the gradients anew, unless it looks for unused parameters (there are
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


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks, on each of them. The host waits for it."""
    values = [value] * process_count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def process_count() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes, of one shape, along a new first dimension, on each of them."""
    if not dist.is_initialized():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(process_count())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


class Agreement:
    """What all processes agree on: the greatest of their wishes, numbers from 0.

    The answer comes one call late. So it is on its way during a step, and nobody waits for it, nor for a GPU: the
    numbers go between the processors, in a gloo group of their own. Make it on all processes alike.
    """

    def __init__(self, seconds: float) -> None:
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds)) if process_count() > 1 else None
        )
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, wish: int) -> int:
        """Send this call's wish; the answer to those of the call before (with one process, to this one)."""
        if self._group is None:
            return wish
        answer = self.settle()
        tensor = torch.tensor([wish])
        self._pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True), tensor
        return answer

    def settle(self) -> int:
        """The answer that is still on its way, 0 if none is."""
        if self._pending is None:
            return 0
        (work, tensor), self._pending = self._pending, None
        work.wait()
        return int(tensor)

    def wait_for_all(self) -> None:
        """Return when all processes have called this."""
        if self._group is not None:
            dist.barrier(self._group)


# torch 2.14 renamed the argument.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_BROADCAST = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class _AllReduceSum(torch.autograd.Function):
    """The sum over all processes; what flows back to each process's share is the sum of the gradients of all.

    torch.distributed.nn.functional.all_reduce is the same, but deprecated since torch 2.14, and its successor is not in
    older versions.
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient.clone())


class SyncBatchNormCPU(nn.BatchNorm2d):
    """BatchNorm with statistics over all processes, on the CPU, where torch's own SyncBatchNorm refuses to train.

    Same formulas, parameters and buffers as nn.BatchNorm2d of the joined batch; gradients flow through the sums.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) float -> the same shape."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        count = x.numel() // x.shape[1] * torch.ones(1, dtype=x.dtype)
        total = _AllReduceSum.apply(torch.cat([x.sum((0, 2, 3)), count]))
        n = total[-1].detach()
        mean = total[:-1] / n
        centred = x - mean[:, None, None]
        # Summed after centring: sums of raw squares would cancel in float32.
        var = _AllReduceSum.apply(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            if self.num_batches_tracked is not None:  # None while activations are computed again
                self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


def _convert_batchnorm(module: nn.Module) -> None:
    """Turn every BatchNorm2d in place; the instances, with their parameters and buffers, stay the same objects."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncBatchNormCPU


def _first_slurm_node() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if shutil.which("scontrol") is None:
        if nodes and not set(nodes) & set("[,"):
            return nodes
        raise ConfigError(
            "MASTER_ADDR is not set and scontrol is not found: export the first node's name as MASTER_ADDR"
        )
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode != 0 or not listed.stdout.strip():
        raise ConfigError(f"MASTER_ADDR is not set and scontrol cannot expand the node list '{nodes}'")
    return listed.stdout.split()[0]
