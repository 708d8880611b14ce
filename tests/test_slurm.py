"""Training on a real Slurm cluster, of simulated nodes: through time limit, preemption and scancel to the same end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers import PROJECT_ROOT, TinyData, assert_same, load_checkpoint, make_dataset
from tests.slurm import Cluster, cluster, wait_for

pytestmark = pytest.mark.slow
LIMIT = 300  # seconds that anything may take


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """A cluster with two nodes g1 and g2 that have GPUs, as it believes, and one without."""
    with cluster() as own:
        yield own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Six epochs of four iterations of two processes: not done before the job is held for the third time."""
    data = make_dataset(tmp_path_factory.mktemp("data"), unlabeled=8)
    data.configure(batch_size=1, epochs=6, checkpoint_minutes=0.005)
    return data


def variables(data: TinyData) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "config": str(data.config),
        "labeled": str(data.labeled),
        "cpus_per_task": "1",
    }


def srun(
    slurm: Cluster, data: TinyData, path: Path, partition: str, *arguments: str, shell: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """slurm_train.sh with two tasks, as from a login node, or in the shell that a command opens."""
    words = [*shell, "sh", "scripts/slurm_train.sh", "2", "29500", partition, "--save-path", path, *arguments]
    return subprocess.Popen(
        slurm.command(*words), cwd=PROJECT_ROOT, env=variables(data), stdout=-1, stderr=subprocess.STDOUT, text=True
    )


def iterations(path: Path) -> int:
    """How many lines of progress the log has."""
    log = path / "train.log"
    return len(re.findall(r"iteration \d", log.read_text())) if log.exists() else 0


def trainers(path: Path) -> list[Path]:
    """The folders in /proc of the processes that train in `path`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"unimatch.py" in words and str(path).encode() in words and b"srun" not in words[0]:
            found.append(process)
    return found


def signalled(process: Path, number: int) -> bool:
    """Whether a signal waits for a process, which is suspended."""
    (mask,) = re.findall(r"ShdPnd:\s*(\w+)", (process / "status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def hold(path: Path, done: int) -> list[Path]:
    """Suspend the two processes once they have logged more than `done` iterations; returns their folders in /proc."""
    wait_for(lambda: iterations(path) > done, "next iteration", LIMIT)
    processes = trainers(path)
    assert len(processes) == 2
    for process in processes:
        os.kill(int(process.name), signal.SIGSTOP)
    return processes


def refuse(own: Cluster) -> None:
    (own._folder / "slurmctld.log").write_text("fatal: no address\n")
    raise subprocess.CalledProcessError(1, "slurmctld", stderr="not permitted\n")


@pytest.mark.parametrize(
    ("method", "outcome", "expected"),
    [
        ("make_network", pytest.skip.Exception, "needs network namespaces: not permitted$"),
        (
            "start",
            pytest.fail.Exception,
            "installed and does not start: not permitted\n--- slurmctld.log\nfatal: no addr",
        ),
    ],
)
def test_an_installed_slurm_that_does_not_start_is_no_reason_to_skip(monkeypatch, tmp_path, method, outcome, expected):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # for a lock of its own
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: name)
    for name in ("make_network", "start", "stop"):
        monkeypatch.setattr(Cluster, name, lambda own: None)
    monkeypatch.setattr(Cluster, method, refuse)
    with pytest.raises(outcome, match=expected), cluster():
        pass


def test_a_run_through_time_limit_preemption_and_scancel_ends_as_one_in_a_partition_without_gpus(slurm, data, tmp_path):
    whole, path, output = tmp_path / "whole", tmp_path / "run", tmp_path / "output"
    undisturbed = srun(slurm, data, whole, "cpu")
    assert undisturbed.wait(LIMIT) == 0, undisturbed.stdout.read()

    # A job on two nodes with GPUs of a type. Suspended, it does not come further until Slurm looks at its time.
    options = "--partition=gpu --nodes=2 --ntasks-per-node=1 --gres=gpu:a100:1 --time=10"
    settings = {**variables(data), "gpus_per_node": "1", "gpu_type": "a100"}
    words = ["--parsable", *options.split(), f"--output={output}", "scripts/slurm_train.sh", "2", "29500", "gpu"]
    job = subprocess.run(
        # Queued again, a job has the same arguments: it must not begin anew.
        slurm.command("sbatch", *words, "--save-path", path, "--resume", "never"),
        cwd=PROJECT_ROOT, env=settings, capture_output=True, text=True, check=True, timeout=LIMIT,
    ).stdout.strip()  # fmt: skip
    with slurm.told(job, output):
        processes = hold(path, 0)
        *_, minutes, _ = f"0:{slurm.run('squeue', '--noheader', '--jobs', job, '--format=%M').strip()}".split(":")
        slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(minutes) + 2}")

        def queued_again() -> bool:
            for process in processes:
                with contextlib.suppress(OSError):  # it has ended
                    if signalled(process, signal.SIGUSR1):
                        os.kill(int(process.name), signal.SIGCONT)
            return f"job {job} queues itself again" in output.read_text()

        def hold_again(restarts: int) -> None:
            done = iterations(path)
            slurm.wait_for_job(job, "RUNNING", restarts, LIMIT)
            hold(path, done)

        wait_for(queued_again, "requeue", LIMIT)
        slurm.wait_for_job(job, "PENDING", 1, LIMIT)
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        # What preempts or cancels a job sends SIGCONT and SIGTERM.
        hold_again(1)
        slurm.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        wait_for(lambda: not trainers(path), "preemption", LIMIT)
        hold_again(2)
        slurm.run("scancel", job)
        wait_for(lambda: not trainers(path), "end after scancel", LIMIT)
        slurm.wait_for_job(job, "CANCELLED", 2, LIMIT)
    assert output.read_text().count("queues itself again") == 1

    last = srun(slurm, data, path, "cpu")
    assert last.wait(LIMIT) == 0, last.stdout.read()
    assert (path / "train.log").read_text().count("continuing from ") == 3
    assert_same(load_checkpoint(whole), load_checkpoint(path))


def test_the_error_of_process_0_is_shown_and_its_status_kept(slurm, data, tmp_path):
    """srun ends it by SIGTERM as soon as the other process has ended because of it."""
    label = data.root / "labels/val0.png"
    content = label.read_bytes()
    label.unlink()
    try:
        process = srun(slurm, data, tmp_path, "cpu", "--set", "check_data=false", "epochs=1")
        early = srun(slurm, data, tmp_path / "early", "gpu", "--set", "epoch=1")  # before the processes have met
        outputs = [started.communicate(timeout=LIMIT)[0] for started in (process, early)]
    finally:
        label.write_bytes(content)
    assert [process.returncode, early.returncode] == [2, 2], outputs
    first, second = (re.findall(r"^error: (.*)", output, re.MULTILINE) for output in outputs)
    assert first == [f"{label}: no such label (listed paths are relative to data_root)"]
    (line,) = second
    assert "'epoch'" in line and not line.startswith("process")


def test_srun_alone_ends_all_processes_where_the_first_finds_a_fault(slurm, data, tmp_path):
    """Without --kill-on-bad-exit, which slurm_train.sh gives: the others wait for it, and it tells them."""
    program = [sys.executable, "unimatch.py", *data.arguments(tmp_path)]
    program[program.index("--labeled-id-path") + 1] = "gone.txt"
    words = slurm.command("srun", "--partition=cpu", "--ntasks=2", "--kill-on-bad-exit=0", *program, "--port", "29500")
    result = subprocess.run(
        words, cwd=PROJECT_ROOT, env=variables(data), capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert result.returncode == 2
    assert re.findall(r"^error: (.*)", result.stderr, re.MULTILINE) == ["gone.txt: no such list file"]


def test_where_process_0_is_killed_one_line_names_it(slurm, data, tmp_path):
    process = srun(slurm, data, tmp_path, "cpu", "--set", "epochs=50")
    wait_for(lambda: iterations(tmp_path) > 0 or process.poll() is not None, "first iteration", LIMIT)
    (first,) = [found for found in trainers(tmp_path) if b"\0SLURM_PROCID=0\0" in (found / "environ").read_bytes()]
    os.kill(int(first.name), signal.SIGKILL)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    (line,) = re.findall(r"^error: (.*)", output, re.MULTILINE)
    assert "process 0" in line and "Traceback" not in output


def test_in_a_shell_that_srun_opened_the_script_trains_on_what_that_has(slurm, data, tmp_path):
    shell = ["srun", "--partition=cpu", "--ntasks=1", "--cpus-per-task=2"]
    process = srun(slurm, data, tmp_path, "cpu", "--set", "epochs=1", shell=shell)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    assert load_checkpoint(tmp_path)["iteration"] == 4


@pytest.mark.parametrize(("option", "second"), [("--gpus-per-task=1", "cuda:0"), ("--gres=gpu:1", "refused")])
def test_a_task_that_sees_one_gpu_takes_it_if_srun_has_one_for_each(slurm, option, second):
    """torch finds none of these pretended GPUs."""
    code = """if True:
        import torch
        from util.distributed.launch import choose_device, find_processes
        from util.errors import ConfigError
        torch.cuda.device_count = lambda: 1
        try:
            print(choose_device("cuda", find_processes(29500)))
        except ConfigError as error:
            print("refused" if "process 2 on this machine has no GPU" in str(error) else error)
    """
    words = ("--partition=gpu", "--nodes=1", "--ntasks=2", "--label", option)
    assert sorted(slurm.run("srun", *words, sys.executable, "-c", code).splitlines()) == ["0: cuda:0", f"1: {second}"]
