"""How this process was launched (torchrun, srun or alone), and which device it uses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

import torch

from util.distributed.network import port_fault
from util.errors import ConfigError


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
    if processes.is_main and (fault := port_fault(int(env["MASTER_PORT"]))):
        raise ConfigError(f"port {env['MASTER_PORT']} is {fault} on {env['MASTER_ADDR']}: choose another")
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


def master_address() -> tuple[str, int]:
    """Where the processes meet: name or address, and port."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def launcher_keeps_store() -> bool:
    """Whether the store at which the processes meet is torchrun's; otherwise it is the first process's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


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
