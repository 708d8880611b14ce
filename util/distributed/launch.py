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

# What to say where the environment names processes that are not there.
UNSET = "unset RANK, LOCAL_RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS if they are left over"
LEFT_OVER = f"{UNSET}, or start with python -m scripts.launch, torchrun or srun"


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
    if env.get("RANK") and env.get("WORLD_SIZE"):
        processes = Processes(_number("RANK"), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", default=0))
        if processes.rank >= processes.count:
            raise ConfigError(f"RANK={processes.rank} with WORLD_SIZE={processes.count}: {LEFT_OVER}")
        if processes.count > 1:
            if not env.get("MASTER_ADDR"):
                raise ConfigError(f"RANK and WORLD_SIZE={processes.count} are set, MASTER_ADDR is not: {LEFT_OVER}")
            _number("MASTER_PORT", 1)
        return processes
    # Only srun sets SLURM_STEP_NUM_TASKS: a plain `python` inside a batch script is alone, whatever the job's size.
    count = _number("SLURM_STEP_NUM_TASKS", 1, default=1)
    if count == 1:
        return Processes()
    if not env.get("MASTER_ADDR"):
        env["MASTER_ADDR"] = _first_slurm_node()
    if not env.get("MASTER_PORT"):
        if port is None:
            raise ConfigError(
                f"--port is needed under srun with several processes: any free port, the same for all ({LEFT_OVER})"
            )
        env["MASTER_PORT"] = str(port)
    processes = Processes(_number("SLURM_PROCID"), count, _number("SLURM_LOCALID"))
    if processes.is_main and (fault := port_fault(_number("MASTER_PORT", 1))):
        raise ConfigError(f"port {env['MASTER_PORT']} is {fault} on {env['MASTER_ADDR']}: choose another")
    return processes


def process_alone(tool: str) -> Processes:
    """The place of a tool that writes files as one process. Raises ConfigError where the environment names more."""
    launched = os.environ.get("RANK") and os.environ.get("WORLD_SIZE")
    count = _number("WORLD_SIZE", 1) if launched else _number("SLURM_STEP_NUM_TASKS", 1, default=1)
    if count > 1:
        raise ConfigError(f"{tool} is one process, and the environment names {count}: start it alone, or {UNSET}")
    return Processes()


def _number(name: str, minimum: int = 0, default: int | None = None) -> int:
    """The whole number that an environment variable holds; `default` if it is not set. Raises ConfigError."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < minimum:
        raise ConfigError(f"{name}={text!r} in the environment is no number from {minimum} on: {LEFT_OVER}")
    return int(text)


def local_process_count() -> int:
    """The number of processes of this run on this machine."""
    env = os.environ
    if env.get("LOCAL_WORLD_SIZE"):
        return _number("LOCAL_WORLD_SIZE", 1)
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
    if count == 1 and processes.local_rank < _gpus_of_srun():
        return torch.device("cuda", 0)
    if processes.local_rank >= count:
        raise ConfigError(
            f"process {processes.local_rank + 1} on this machine has no GPU: there are {count} "
            f"(start fewer processes, or use --set device=cpu; {LEFT_OVER})"
        )
    return torch.device("cuda", processes.local_rank)


def _gpus_of_srun() -> int:
    """The number of GPUs that srun has on this machine for all its tasks; 0 where another launcher made this process.

    A task may see fewer: with --gpus-per-task=1 or --gpu-bind=single:1 its own only. SLURM_GPUS_PER_TASK does not tell:
    srun does not set it, and sbatch's stays set where an srun asks for fewer GPUs than tasks.
    """
    env = os.environ
    by_srun = env.get("SLURM_STEP_NUM_TASKS") and not (env.get("RANK") and env.get("WORLD_SIZE"))
    return _number("SLURM_GPUS_ON_NODE", default=0) if by_srun else 0


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
