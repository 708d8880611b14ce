"""A Slurm cluster of simulated nodes on this machine, in a network namespace of its own; for root on Debian."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "ip", "unshare")
# In a namespace whose only card is loopback Slurm finds no address: its look-ups skip loopback. A bridge is one.
NETWORK = ["link set lo up", "link add card type bridge", "addr add 10.78.0.1/24 dev card", "link set card up"]
# Patience for a machine that has other work. A requeued job waits for its old credential to expire: 20 s, not 120.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SrunPortRange=16900-16999
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CredType=cred/munge
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=60
MessageTimeout=60
BatchStartTimeout=120
SlurmdTimeout=90
UnkillableStepTimeout=300
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=g1 NodeHostname={host} NodeAddr=127.0.0.1 Port=16821 CPUs=2 Gres=gpu:a100:2
NodeName=g2 NodeHostname={host} NodeAddr=127.0.0.1 Port=16822 CPUs=2 Gres=gpu:a100:2
NodeName=c1 NodeHostname={host} NodeAddr=127.0.0.1 Port=16823 CPUs=2
PartitionName=gpu Nodes=g1,g2 Default=YES PriorityTier=1
PartitionName=urgent Nodes=g1,g2 PriorityTier=10 PreemptMode=OFF
PartitionName=cpu Nodes=c1
"""
GRES = "NodeName=g[1-2] Name=gpu Type=a100 File={folder}/gpu[0-1]\n"  # any files that exist serve
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"  # mounts nothing
GOING_ON = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED")  # states from which a job may run again
LIMIT = 120  # seconds for the nodes to be ready


class Cluster:
    """The running cluster: nodes g1 and g2 with two pretended GPUs each, and c1 without; two CPUs on each."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._name = folder, f"slurm{os.getpid()}"
        self._host = socket.gethostname().partition(".")[0]

    def command(self, *words: str | Path) -> list[str]:
        """The command line that runs a command in the cluster's network."""
        inside = ["unshare", "--mount", "sh", "-c", 'mount --bind "$1" /etc/hosts && shift && exec "$@"', "sh"]
        settings = ["env", f"SLURM_CONF={self._folder / 'slurm.conf'}"]
        return ["ip", "netns", "exec", self._name, *inside, str(self._folder / "hosts"), *settings, *map(str, words)]

    def run(self, *words: str | Path) -> str:
        """Run a command in it: its stdout."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=True, timeout=90).stdout

    def wait_for_job(self, job: str, state: str, restarts: int, seconds: float) -> None:
        """Wait until a job is in a state after so many restarts. Fails at once where it cannot get there any more."""

        def there() -> bool:
            shown = self.run("scontrol", "show", "job", job)
            now, reason, count = (re.search(rf"\b{key}=(\S+)", shown)[1] for key in ("JobState", "Reason", "Restarts"))
            if now not in (state, *GOING_ON) or "held" in reason.lower():
                pytest.fail(f"job {job} is {now} ({reason}), not {state}")
            return (now, int(count)) == (state, restarts)

        wait_for(there, f"job {job} that is {state} after {restarts} restarts", seconds, pause=1)

    @contextlib.contextmanager
    def told(self, job: str, output: Path) -> Iterator[None]:
        """Print what Slurm knows of a job, and what it printed, if the test fails in here."""
        try:
            yield
        except BaseException:
            for words in (("scontrol", "show", "job", job), ("sinfo", "-R"), ("sinfo", "-N", "-l")):
                with contextlib.suppress(subprocess.SubprocessError):
                    print(self.run(*words))
            print(self.logs(), _end_of(output), sep="\n")
            raise

    def logs(self) -> str:
        """The last lines of each daemon's log."""
        return "\n".join(map(_end_of, sorted(self._folder.glob("*.log"))))

    def make_network(self) -> None:
        """Make the network, and see that commands run in it. Raises CalledProcessError where namespaces are refused."""
        names = f"127.0.0.1 localhost {self._host} g1 g2 c1\n"
        (self._folder / "hosts").write_text(names, encoding="ascii")
        _run("ip", "netns", "add", self._name)
        for words in NETWORK:
            _run("ip", "-n", self._name, *words.split())
        self.run("true")

    def start(self) -> None:
        """Start munge, the controller and a daemon for each node."""
        folder = self._folder
        folder.chmod(0o755)
        for name, text in (
            ("slurm.conf", CONF),
            ("gres.conf", GRES),
            ("cgroup.conf", CGROUP),
            ("gpu0", ""),
            ("gpu1", ""),
        ):
            (folder / name).write_text(text.format(folder=folder, host=self._host), encoding="ascii")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        places = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        places |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        self.run("munged", *(f"--{name}={folder / file}" for name, file in places.items()))
        self.run("slurmctld", "-c")
        for node in ("g1", "g2", "c1"):
            (folder / node).mkdir()
            self.run("slurmd", "-N", node)
        listed = ("sinfo", "--noheader", "-N", "--format=%T")
        wait_for(lambda: self.run(*listed).split() == ["idle"] * 5, "idle nodes", LIMIT, pause=0.5)

    def stop(self) -> None:
        """End the daemons, and all jobs with them."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--signal=KILL", "--full", "--user=root")
        for file in self._folder.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        time.sleep(1)  # they write their state
        subprocess.run(["ip", "netns", "del", self._name], check=False, capture_output=True)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster, installing Slurm before where that works.

    Skips the test without root, network namespaces or Slurm; fails it where Slurm is installed and does not start.
    There is one at a time: another test process waits for its end.
    """
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster needs root")
    with (
        open(Path(tempfile.gettempdir(), "unimatch-test-slurm.lock"), "w") as lock,
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if any(shutil.which(name) is None for name in PROGRAMS):
            _install()
        own = Cluster(Path(folder))
        try:
            try:
                own.make_network()
            except subprocess.SubprocessError as error:  # such as in a container
                pytest.skip(f"a Slurm cluster needs network namespaces: {_reason(error)}")
            try:
                own.start()
            except (subprocess.SubprocessError, AssertionError) as error:
                pytest.fail(f"Slurm is installed and does not start: {_reason(error)}\n{own.logs()}", pytrace=False)
            yield own
        finally:
            own.stop()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60, pause: float = 0.05) -> None:
    """Wait until the condition is true. Fails after `seconds`.

    A condition that starts programs is looked at less often, by `pause`; one of these that fails is tried again.
    """
    end, failure = time.monotonic() + seconds, None
    while True:
        try:
            if condition():
                return
        except subprocess.SubprocessError as error:  # a busy daemon may not answer in time
            failure = f"{error} {getattr(error, 'stderr', None) or ''}"
        assert time.monotonic() < end, f"no {what} after {seconds} s{f': {failure}' if failure else ''}"
        time.sleep(pause)


def _install() -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("Slurm is not installed, and there is no apt-get")
    quick = ["-qq", "-o", "Acquire::http::Timeout=5", "-o", "Acquire::Retries=0"]
    install = ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge", "iproute2", "util-linux"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # The network's part is bounded and may be cut off; the installation itself may not.
    for words, seconds in ((["update"], 60), ([*install, "--download-only"], 90), (install, None)):
        try:
            _run("apt-get", *quick, *words, env=environment, timeout=seconds)
        except subprocess.SubprocessError as error:
            lines = _reason(error).splitlines()
            pytest.skip(f"Slurm cannot be installed: {lines[-1] if lines else error}")


def _reason(error: Exception) -> str:
    return str(getattr(error, "stderr", None) or error).strip()


def _end_of(file: Path) -> str:
    """The last lines of a file, below its name."""
    try:
        lines = file.read_text(errors="replace").splitlines()[-40:]
    except OSError:
        lines = []
    return "\n".join([f"--- {file.name}", *lines])


def _run(*words: str, **options: object) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, **options)
