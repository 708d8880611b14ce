"""Start a training script in several processes: torchrun, with checks before and short errors after.

    python -m scripts.launch --processes 4 [--port 29500] [--max-restarts 3] unimatch.py --config ...

On several machines each runs it, with `--nodes`, `--node-rank`, `--master-addr` and the same port.

One process per GPU; without a GPU, or with `--set device=cpu`, the processes share the CPU. The port is where the
processes meet; a free one is taken when none is given. After a failure all processes start again, at most
`--max-restarts` times. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C are passed on, and the processes have GRACE seconds to
save and end; under nohup SIGHUP is ignored by all. Several machines wait for each other for WAIT seconds.
The exit status is 0, or that of the first process that failed (128 + number if a signal ended it), or 2 with one line
on stderr if the launch cannot work.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
import uuid
from pathlib import Path

from util.distributed.network import port_fault

GRACE = 120  # seconds; older versions of torch have 30, and whoever sent the signal may have a limit too
WAIT = 900  # seconds that a machine waits for the others to come
NOTE_AFTER = 10  # seconds of them before it says so
PART = 30  # seconds that a machine whose processes have finished waits for the others, for whom nothing is at stake


class LaunchError(ValueError):
    """A launch that cannot work. The message is one line with the way out."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise LaunchError(f"{message}; {' '.join(self.format_usage().split())}")


def parse_args(argv):
    """`argv` (list of str, None for the command line's) as a namespace: processes, port or None, max_restarts, ..."""
    parser = _Parser(
        prog="python -m scripts.launch", description="Start a training script in several processes.", allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="processes, one per GPU")
    parser.add_argument("--port", type=int, metavar="P", help="port at which they meet (default: a free one)")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="restarts after a failure (default: 0)"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="this machine's number, from 0")
    parser.add_argument("--master-addr", metavar="A", help="name or address of the machine with number 0")
    parser.add_argument("script", metavar="METHOD.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to METHOD.py")
    return parser.parse_args(argv)


def check_port(port):
    """Raise LaunchError unless a server could listen on `port` (int) now."""
    if not 1024 <= port <= 65535:
        raise LaunchError(f"port {port} is out of range; choose one from 1024 to 65535, or leave it out for a free one")
    if fault := port_fault(port):
        raise LaunchError(f"port {port} is {fault}; choose another, or leave it out for a free one")


def check_nodes(args):
    """Raise LaunchError unless the arguments let several machines meet."""
    if not 0 <= args.node_rank < args.nodes:
        raise LaunchError(f"--node-rank {args.node_rank}: must be from 0 to {args.nodes - 1}")
    if args.port is None or args.master_addr is None:
        raise LaunchError("several machines need --master-addr and --port: where the first one listens")
    if args.max_restarts:
        raise LaunchError("--max-restarts works on one machine only: start the command again on each of several")
    try:
        socket.getaddrinfo(args.master_addr, args.port)
    except OSError as error:
        reason = f"{socket.gethostname()} knows no machine of that name ({error.strerror})"
        raise LaunchError(f"--master-addr {args.master_addr}: {reason}; give its IP address") from None


def check_gpus(processes, gpus, arguments):
    """Raise LaunchError if `processes` need more GPUs than the `gpus` visible ones.

    None visible, or `--set device=cpu` among the script's `arguments`, means the CPU, which any number can share.
    """
    devices = [word.removeprefix("--set=").removeprefix("device=") for word in arguments if "device=" in word]
    if devices and devices[-1] == "cpu":
        return
    if 0 < gpus < processes:
        raise LaunchError(
            f"{processes} processes, but only {gpus} visible GPUs: start at most {gpus}, or add --set device=cpu"
        )


def bound_waiting(args, agent):
    """Bound the waiting of `agent`, torchrun's class for this machine's part, and let signals end it.

    torch waits inside calls that no signal interrupts and that outlast their timeout where a connection is dead.
    """
    from torch.distributed import DistNetworkError

    from util.distributed.store import Helper, NoAnswer

    helper, meet, part = Helper("machines"), agent._rendezvous, agent._exit_barrier
    place, to_do = f"{args.master_addr}:{args.port}", "start the same command on each, with its own NODE_RANK"

    def rendezvous(self, group):
        started = time.monotonic()
        wait = helper.start(lambda: meet(self, group))
        try:
            with contextlib.suppress(NoAnswer):
                return wait(NOTE_AFTER)
            line = f"note: waiting for the other machines at {place} (NNODES={args.nodes}; {to_do})"
            print(line, file=sys.stderr, flush=True)
            return wait(WAIT - NOTE_AFTER + 5)  # on the first machine torch gives up before, and says how many came
        except (NoAnswer, RuntimeError) as error:
            within = f" within {WAIT / 60:g} minutes" if time.monotonic() - started >= WAIT else ""
            came = re.search(r"(\d+)/\d+ clients joined", str(error))
            if args.node_rank > 0 and not answers(args.master_addr, args.port):
                what = f"no answer from the first machine (NODE_RANK=0) at {place}{within}: {to_do}"
            elif within and not isinstance(error, DistNetworkError):
                count = f"{came[1] if came else 'not all'} of {args.nodes} machines"
                what = f"{count} came to {place}{within}: {to_do}"
            else:
                what = f"the machines cannot meet at {place}: {str(error).splitlines()[0]}"
            raise LaunchError(what) from None

    def exit_barrier(self):
        with contextlib.suppress(NoAnswer):
            helper.call(lambda: part(self), PART)

    agent._rendezvous, agent._exit_barrier = rendezvous, exit_barrier


def answers(address, port):
    """Whether something listens at `port` (int) of `address`."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def first_failure(failures):
    """(rank, exit code) of the process that failed first; a negative exit code is a signal's number.

    `failures`: torchrun's dict from rank to failure, in the order in which it saw them, times in whole seconds.
    Once one process has failed torchrun ends the others by SIGTERM, so these come last. Others fail because a peer is
    gone, with an uncaught exception's status 1, so within a second any other status or signal comes first.
    """
    order = {
        rank: (failure.exitcode == -signal.SIGTERM, failure.timestamp, failure.exitcode == 1)
        for rank, failure in failures.items()
    }
    rank = min(order, key=order.get)
    return rank, failures[rank].exitcode


def exit_status(rank, exitcode):
    """The status to exit with for a process's exit code; the end by a signal, which could say nothing, is reported."""
    if exitcode > 0:
        return exitcode
    try:
        name = f" ({signal.Signals(-exitcode).name})"
    except ValueError:  # a real-time signal
        name = ""
    cause = "; out of memory is the usual cause" if exitcode == -signal.SIGKILL else ""
    print(f"error: process {rank} was ended by signal {-exitcode}{name}{cause}", file=sys.stderr)
    return 128 - exitcode


def run(args):
    """Run the script under torchrun and return the exit status. A signal to this process is passed on to all."""
    processes, port, nodes = args.processes, args.port, args.nodes
    # Read when torch is imported. Its warnings, and here its errors, which are raised too, bury the one line that says
    # what failed.
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "FATAL"
    import torch

    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
    from torch.distributed.elastic.multiprocessing import api as elastic
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    check_gpus(processes, torch.cuda.device_count(), args.arguments)
    if processes > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))

    def pass_on(number, _):  # as torchrun does with SIGTERM and SIGINT
        raise SignalException(f"got signal {number}", signal.Signals(number))

    signal.signal(signal.SIGUSR1, pass_on)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        # nohup. torchrun would replace that by a handler, and so let the processes have the signal: they take over a
        # blocked one from this thread; torch's other threads still bring it to the handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
        terminate = elastic._terminate_process_handler
        elastic._terminate_process_handler = lambda number, _: number == signal.SIGHUP or terminate(number, _)
    else:
        signal.signal(signal.SIGHUP, pass_on)
    # torchrun logs every failure at length; `exit_status` says it in a line. The processes' own logging is untouched.
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False

    # By its own name a machine may not find itself, and some hosts files lack localhost: the address always works.
    meeting = ["--local-addr=127.0.0.1"]
    if port is None:  # as --standalone
        meeting += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={uuid.uuid4()}"]
    else:
        meeting += [f"--master-port={port}"]
    if nodes > 1:
        bound_waiting(args, SimpleElasticAgent)
        signal.signal(signal.SIGTERM, pass_on)  # which torchrun hears only once the machines have met
        meeting = [
            f"--master-port={port}",
            f"--node-rank={args.node_rank}",
            f"--master-addr={args.master_addr}",
            f"--rdzv-conf=timeout={WAIT}",
        ]
    try:
        temporary = tempfile.TemporaryDirectory()  # its own would stay behind
    except OSError as error:
        line = f"no folder for temporary files ({error.strerror or error}): set TMPDIR to one that can be written to"
        raise LaunchError(line) from None
    try:
        with temporary as logs:
            options = [*meeting, f"--nnodes={nodes}", f"--nproc-per-node={processes}", f"--log-dir={logs}"]
            options.append(f"--max-restarts={args.max_restarts}")
            torchrun.main([*options, args.script, *args.arguments])
    except ChildFailedError as error:
        return exit_status(*first_failure(error.failures))
    except SignalException as error:
        return 128 + error.sigval
    except torch.distributed.DistNetworkError as error:  # the port was taken since the check
        where = "" if port is None else f" at port {port}"
        raise LaunchError(f"the processes cannot meet{where}: {str(error).splitlines()[0]}") from None
    return 0


def main(argv=None):
    """Check, run, and return the exit status."""
    # A shell's background process, as with `seeds` of train.sh, would ignore Ctrl-C until torchrun takes over.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        args = parse_args(argv)
        if args.processes < 1:
            raise LaunchError(f"--processes {args.processes}: at least 1 is needed")
        if not Path(args.script).is_file():
            raise LaunchError(f"{args.script}: no such file; name a training script, such as unimatch.py")
        if args.nodes > 1:
            check_nodes(args)
        if args.port is not None and args.node_rank == 0:
            check_port(args.port)
        if args.max_restarts < 0:
            raise LaunchError(f"--max-restarts {args.max_restarts}: at least 0 is needed")
        return run(args)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before torchrun has taken over the signals: nothing runs yet
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
