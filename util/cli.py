"""The command line that the four methods share, and how an entry script ends."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch

from util.distributed.launch import launcher_keeps_store
from util.distributed.watchdog import Watchdog
from util.errors import (
    EXIT_CONSEQUENCE,
    EXIT_SIGNAL,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    USER_ERRORS,
    Interrupted,
    Silenced,
    TrainingStopped,
    error_line,
)
from util.screen import steady_output
from util.signals import expect_end_by_srun


def add_common_arguments(parser: argparse.ArgumentParser, config_required: bool = True) -> None:
    """Arguments of every entry script that reads a config."""
    default = "" if config_required else " (default: the checkpoint's own)"
    parser.add_argument(
        "--config", required=config_required, metavar="F", help=f"recipe, such as configs/pascal.yaml{default}"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change keys of the config",
    )


def parse_args(method: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of a method script (`unimatch`, `unimatch_v2`, `fixmatch` or `supervised`)."""
    about = f"Train {method} on one process, or under torchrun or srun on several."
    parser = argparse.ArgumentParser(prog=f"{method}.py", description=about)
    add_common_arguments(parser)
    parser.add_argument("--labeled-id-path", required=True, metavar="F", help="list of labelled images")
    parser.add_argument(
        "--unlabeled-id-path",
        metavar="F",
        help="list of unlabelled images, or a folder of images "
        "under data_root; labelled images are left out (default: the config's unlabeled_id_path)",
    )
    parser.add_argument("--save-path", required=True, metavar="D", help="folder for checkpoints, log and curves")
    parser.add_argument("--port", type=int, help="rendezvous port under srun; torchrun brings its own")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: continue from latest.pth in the save path; never: start over, earlier results are "
        "moved to a folder previous-N",
    )
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # old torch launchers pass it
    if method == "supervised":
        parser.add_argument(
            "--double-batch",
            action="store_true",
            help="double batch_size, as the published baseline "
            "does (it sees 16 labelled images a step); ignored where --set batch_size is given",
        )
    return parser.parse_args(argv)


def run_main(main: Callable[[], None]) -> None:
    """Run an entry script's main; an error that the user can mend becomes one line and exit status 2 or 3.

    A signal ends it with 128 plus the signal's number. Of several processes one speaks. Printing never ends it.
    """
    with steady_output():
        _run_main(main)


def _run_main(main: Callable[[], None]) -> None:
    rank, silent = _rank(), False
    expect_end_by_srun(rank, not launcher_keeps_store())
    try:
        main()
        return
    except USER_ERRORS as error:
        message, status = error_line(error), EXIT_USER_ERROR
    except TrainingStopped as error:
        message, status = str(error), EXIT_STOPPED
    except Interrupted as error:
        message, status, silent = str(error), EXIT_SIGNAL + error.number, rank > 0
    except KeyboardInterrupt:
        message, status, silent = "interrupted", EXIT_SIGNAL + signal.SIGINT, rank > 0
    except Silenced as error:
        message, status, silent = str(error), EXIT_CONSEQUENCE, True
    except Exception as error:
        if where := _out_of_memory(error):
            hint = "lower batch_size or crop_size, or use more processes; predict: lower --tile and --tile-above"
            message, status = f"out of {where}: {hint} ({str(error).splitlines()[0]})", EXIT_STOPPED
        elif Watchdog.watching:
            traceback.print_exc()
            message, status = f"{type(error).__name__}: {error_line(error)}", EXIT_CONSEQUENCE
        else:
            raise
    grouped = Watchdog.watching  # then the other processes have been told
    if rank > 0 and not silent:
        # Before the processes have met, the same error occurs on every process. The launcher ends all once the first
        # has ended. So rank 0 speaks at once, and another process only if it is still there a little later.
        if not grouped:
            time.sleep(5)
        message = f"process {rank}: {message}"
    sys.stdout.flush()
    if not silent:
        print(f"error: {message}", file=sys.stderr, flush=True)
    _end_loading_processes()
    # Not sys.exit: other processes may be gone, and waiting for them at the interpreter's end could take forever.
    os._exit(status) if grouped else sys.exit(status)


def _out_of_memory(error: Exception) -> str:
    """Which memory an error is about the lack of; empty for others."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "GPU memory"
    # Of PyTorch on a CPU it is a RuntimeError like any other; of NumPy and Python a MemoryError.
    return "memory" if isinstance(error, MemoryError) or "can't allocate memory" in str(error) else ""


def _rank() -> int:
    """This process's number, as in `find_processes`: one variable that is left over, without the other, is none."""
    env = os.environ
    pairs = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    rank = next((env[name] for name, count in pairs if env.get(name) and env.get(count)), "0")
    return int(rank) if rank.isdecimal() else 0  # what is no number is refused later


def _end_loading_processes() -> None:
    """Let loading processes ignore SIGTERM: the interpreter would end them by it and then wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would take their end for a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
