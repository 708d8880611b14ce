"""The process group: how the processes of a run meet and part."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from util.distributed.collectives import from_main
from util.distributed.launch import LEFT_OVER, Processes, launcher_keeps_store, local_process_count, master_address
from util.distributed.network import choose_interface, interfaces, is_loopback, source_address
from util.distributed.store import Helper, NoAnswer, StoreLost
from util.distributed.watchdog import Watchdog
from util.errors import ConfigError, Interrupted, Silenced, TrainingStopped

PATIENCE = 7200  # seconds for the main process to come, which checks the data before; the others come earlier


@contextlib.contextmanager
def process_group(
    processes: Processes,
    device: torch.device,
    seconds: float = 600,
    on_failure: Callable[[str], None] = lambda line: None,
    prepare: Callable[[], Any] = lambda: None,
) -> Iterator[Any]:
    """Join the other processes (nccl on GPUs, gloo on the CPU); a process alone only prepares.

    Each process calls `prepare` before the group starts, and all get what it returned to the main one. If a process
    fails, already then, or does not answer within `seconds`, the others end soon and one of them says why
    (util.distributed.watchdog). `on_failure` gets the line about another process's failure. Raises what `prepare`
    raises, and ConfigError or TrainingStopped where the processes cannot meet.
    """
    if processes.count == 1:
        yield prepare()
        return
    cuda = device.type == "cuda"
    store = _connect(processes, seconds)
    # torchrun's store stays when the processes are restarted.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    try:
        watchdog = Watchdog(processes, seconds, on_failure)
    except StoreLost as error:
        raise TrainingStopped(f"the processes cannot meet: {error}") from None
    watchdog.start()
    try:
        prepared = prepare()
        if cuda:
            torch.cuda.set_device(device)
        addresses = watchdog.meet(
            source_address(master_address()[0]) or "127.0.0.1", PATIENCE if processes.rank else max(600, seconds)
        )
        if processes.count > local_process_count():
            _set_interface(addresses)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",  # gloo is for what the processes agree on between steps
                store=store,
                rank=processes.rank,
                world_size=processes.count,
                timeout=timedelta(seconds=seconds),
                device_id=device if cuda else None,
            )
            dist.barrier()
        except RuntimeError as error:
            raise TrainingStopped(_no_connection(error)) from None
        yield from_main(prepared)
    except (Exception, Interrupted, Silenced) as error:
        # The group stays: without this process the others would fail at once, before it has reported its failure.
        explained = watchdog.explain(error)
        if explained is error:
            raise
        raise explained from None
    watchdog.close()
    # The first process may be the one that keeps the store. Whoever cannot come any more has nothing left to lose here.
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    watchdog.stop()
    dist.destroy_process_group()


def _connect(processes: Processes, seconds: float) -> dist.Store:
    """The store at which the processes meet, once its process is there."""
    address, port = master_address()
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={address}: {socket.gethostname()} knows no machine of that name ({error.strerror}); set it "
            "to the first machine's IP address"
        ) from None
    serve = processes.is_main and not launcher_keeps_store()
    helper = Helper("rendezvous")  # torch's own waiting is deaf to signals
    patience = timedelta(seconds=PATIENCE)
    wait = helper.start(lambda: dist.TCPStore(address, port, is_master=serve, wait_for_workers=False, timeout=patience))
    try:
        with contextlib.suppress(NoAnswer):
            return wait(10)
        if processes.local_rank == 0 or not launcher_keeps_store():
            line = f"note: waiting for process 0 at {address}:{port} ({LEFT_OVER})"
            print(line, file=sys.stderr, flush=True)
        return wait(PATIENCE)
    except (NoAnswer, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else "no answer"
        raise TrainingStopped(f"the processes cannot meet at {address}:{port}: {reason}") from None


def _set_interface(addresses: list[str]) -> None:
    """Tell gloo and NCCL, unless the environment does, which interface leads to the other machines.

    `addresses`: that of each process on its way to the master. By themselves they look up this machine's own name,
    which on many machines is 127.0.1.1.
    """
    name = choose_interface(master_address()[0], [address for address in addresses if not is_loopback(address)])
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign eth1 would mean eth10 as well


def _no_connection(error: RuntimeError) -> str:
    settings = [f"{key}={os.environ.get(key, '')}" for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
    names = ", ".join(f"{name} ({address})" for name, address in interfaces())
    reason = re.sub(
        r"^\[enforce fail at .*?\] .*?\. ", "", str(error).strip().splitlines()[0]
    )  # gloo's place in its source
    return (
        f"{socket.gethostname()} reaches {':'.join(map(str, master_address()))}, but cannot connect to the other "
        f"processes: {reason}; {' and '.join(settings)} name the network interface to use, "
        f"of {names}"
    )
