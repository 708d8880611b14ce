"""Training on two hosts, joined by a virtual cable: the end is one host's, also after the cable was pulled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.chaos.hosts import NoHosts, TwoHosts, two_hosts
from tests.helpers import PROJECT_ROOT, TinyData, assert_same, load_checkpoint, run_script
from tests.slurm import wait_for

pytestmark = pytest.mark.slow
DIST_TIMEOUT, PROMISE = 20, 10  # seconds; both sides tell of a cut within their sum


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        with two_hosts() as pair:
            yield pair
    except NoHosts as error:
        pytest.skip(str(error))


def told(path: Path, host: int) -> Path:
    """The file that has what a host's terminal would show of errors."""
    return path.with_suffix(f".{host}")


def start(hosts: TwoHosts, data: TinyData, path: Path, **variables: str) -> list[subprocess.Popen[bytes]]:
    """scripts/train.sh with one process on each host, whose stderr goes to `path`.HOST."""
    variables |= {"NNODES": "2", "MASTER_ADDR": hosts.addresses[0], "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    variables |= {"config": str(data.config), "labeled": str(data.labeled)}
    return [
        subprocess.Popen(
            hosts.command(host, "sh", "scripts/train.sh", "1", "29500", "--save-path", path),
            cwd=PROJECT_ROOT,
            env={**os.environ, **variables, "NODE_RANK": str(host)},
            stdout=subprocess.DEVNULL,
            stderr=open(told(path, host), "w"),
        )
        for host in range(2)
    ]


def test_two_hosts_train_as_one_and_tell_of_a_cut_cable_and_go_on(hosts, data, tmp_path):
    data.configure(batch_size=1, epochs=3, dist_timeout=DIST_TIMEOUT, checkpoint_minutes=0.005)
    one = ["-m", "scripts.launch", "--processes", "2", "unimatch.py", *data.arguments(tmp_path / "one")]
    result = run_script(*one)
    assert result.returncode == 0, result.stderr

    path = tmp_path / "two"
    processes = start(hosts, data, path)
    try:
        wait_for(lambda: (path / "midway.pth").exists() or processes[0].poll() is not None, "checkpoint", 300)
        hosts.cut()
        lines = [told(path, host) for host in range(2)]
        wait_for(lambda: all(line.read_text() for line in lines), "word of both hosts", DIST_TIMEOUT + PROMISE)
        for process, line in zip(processes, lines, strict=True):
            assert process.wait(300) in (1, 3)
            assert re.fullmatch(r"error: .*\n", line.read_text())
        hosts.join()
        processes = start(hosts, data, path)
        for process, line in zip(processes, lines, strict=True):
            assert (process.wait(300), line.read_text()) == (0, "")
    finally:
        for process in processes:
            process.kill()
    assert (path / "train.log").read_text().count("continuing from ") == 1
    assert_same(load_checkpoint(tmp_path / "one"), load_checkpoint(path))


def test_a_host_tells_of_the_other_ones_death_and_ends(hosts, data, tmp_path):
    data.configure(batch_size=1, epochs=50, dist_timeout=DIST_TIMEOUT, checkpoint_minutes=0.005)
    path = tmp_path / "run"
    processes = start(hosts, data, path)
    try:
        wait_for(lambda: (path / "midway.pth").exists() or processes[0].poll() is not None, "checkpoint", 300)
        hosts.kill(1)
        assert processes[0].wait(DIST_TIMEOUT + PROMISE) in (1, 3)
    finally:
        for process in processes:
            process.kill()
    assert re.fullmatch(r"error: process 1 .*\n", told(path, 0).read_text())


def test_what_the_first_host_finds_wrong_is_said_on_both(hosts, data, tmp_path):
    """It alone reads the lists and checks the data; the other one waits for it."""
    path = tmp_path / "run"
    data.unlabeled.write_text(data.unlabeled.read_text() + "images/gone.jpg\n")
    processes = start(hosts, data, path)
    try:
        assert [process.wait(300) for process in processes] == [2, 1]
    finally:
        for process in processes:
            process.kill()
    first, second = (told(path, host).read_text() for host in range(2))
    assert re.fullmatch(r"error: .*gone.jpg.*\n", first) and re.fullmatch(r"error: process 0: .*gone.jpg.*\n", second)


def test_interfaces_that_do_not_reach_the_other_host_are_named_on_both(hosts, data, tmp_path):
    data.configure(batch_size=1, dist_timeout=DIST_TIMEOUT)
    path = tmp_path / "run"
    processes = start(hosts, data, path, GLOO_SOCKET_IFNAME="lo")
    try:
        for process in processes:
            assert process.wait(300) in (1, 2, 3)
    finally:
        for process in processes:
            process.kill()
    for host in range(2):  # beside torch's own lines
        (line,) = re.findall(r"^error: .*", told(path, host).read_text(), re.MULTILINE)
        assert "cannot connect to the other processes" in line and "GLOO_SOCKET_IFNAME=lo" in line


def test_a_host_that_has_finished_ends_although_the_cable_is_pulled(hosts, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_name('started' + os.environ['RANK']).touch()\n"
        "while not pathlib.Path(__file__).with_name('go' + os.environ['RANK']).exists():\n"
        "    time.sleep(0.05)\n"
    )
    program = "import sys, scripts.launch as l; l.PART = 1; sys.exit(l.main(sys.argv[1:]))"
    words = [sys.executable, "-c", program, "--processes=1", "--nodes=2", "--port=29500"]
    words += [f"--master-addr={hosts.addresses[0]}"]
    processes = [
        subprocess.Popen(hosts.command(host, *words, f"--node-rank={host}", script), cwd=PROJECT_ROOT)
        for host in range(2)
    ]
    try:
        wait_for(lambda: (tmp_path / "started0").exists() and (tmp_path / "started1").exists(), "processes", 60)
        hosts.cut()
        (tmp_path / "go1").touch()
        assert processes[1].wait(30) == 0
    finally:
        for process in processes:
            process.kill()
        (tmp_path / "go0").touch()
