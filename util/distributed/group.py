"""The process group: how the processes of a run meet and part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from util.distributed.launch import Processes
from util.distributed.watchdog import Watch


@contextlib.contextmanager
def process_group(
    processes: Processes,
    device: torch.device,
    seconds: float = 600,
    on_fault: Callable[[str], None] = lambda line: None,
) -> Iterator[None]:
    """Join the other processes (nccl on GPUs, gloo on the CPU); nothing for a process alone.

    A process that fails ends the others soon, one that does not answer within `seconds`; one of them tells why
    (util.distributed.watchdog). `on_fault` gets the line where it is another's fault.
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
