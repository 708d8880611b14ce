"""The launchers: checks, exit statuses, what reaches the training script, and the shell scripts around them.

The shell scripts run in a copy of `scripts/` beside stand-ins for the training scripts, in a folder whose name
has spaces. Most run with a stand-in for Python too, which only tells its arguments.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from scripts import launch

ROOT = Path(__file__).resolve().parent.parent
SHELL_SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))
OURS = ("dataset", "method", "exp", "split", "config", "labeled", "unlabeled", "double_batch", "gpus_per_node",
        "cpus_per_task", "gpu_type", "max_restarts", "seeds", "NNODES", "NODE_RANK",
        "SLURM_JOB_ID", "SLURM_STEP_ID", "PYTHON",
        "OMP_NUM_THREADS", "VIRTUAL_ENV", "CONDA_PREFIX", "MASTER_ADDR", "MASTER_PORT",
        "RANK", "WORLD_SIZE", "LOCAL_RANK")  # fmt: skip

RECORD = """
import json, os, sys
keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS", "SLURM_PROCID", "SLURM_NTASKS")
line = json.dumps({"argv": sys.argv, "cwd": os.getcwd(), **{key: os.environ.get(key) for key in keys}})
os.write(1, (line + "\\n").encode())  # in one piece, as several processes share stdout
"""


def run(*command, cwd=ROOT, timeout=120, **variables):
    """Run a command with none of the launchers' variables set but those given; stdout and stderr apart."""
    env = {key: value for key, value in os.environ.items() if key not in OURS} | variables
    command = [str(word) for word in command]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def run_launch(script, *arguments, processes=1, **kwargs):
    return run(sys.executable, "-m", "scripts.launch", "--processes", processes, script, *arguments, **kwargs)


def records(result):
    """What the stand-ins wrote, by rank."""
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return sorted(found, key=lambda record: record["RANK"] or record["SLURM_PROCID"])


def write(path, text, mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def listening_port():
    server = socket.socket()
    server.bind(("", 0))
    server.listen()
    return server, server.getsockname()[1]


@pytest.fixture
def project(tmp_path):
    """A project of stand-ins around the real scripts."""
    root = tmp_path / "a clone with spaces"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__", "distributed/__init__", "distributed/network"):
        write(root / f"util/{name}.py", (ROOT / f"util/{name}.py").read_text())
    for method in ("unimatch", "fixmatch", "supervised"):
        write(root / f"{method}.py", RECORD)
    for path in ("configs/pascal.yaml", "configs/coco.yaml", "configs/toy.yaml", "configs/my own.yaml",
                 "splits/pascal/732/labeled.txt", "splits/pascal/92/labeled.txt", "splits/coco/1_512/labeled.txt",
                 "lists/my list.txt"):  # fmt: skip
        write(root / path, "")
    return root


def sh(project, script, *arguments, cwd="/", **variables):
    """Run one of the project's shell scripts, with a Python that prints its arguments, one a line, unless given."""
    if "PYTHON" not in variables:
        variables["PYTHON"] = str(write(project.parent / "echo", "#!/bin/sh\nprintf '%s\\n' \"$@\"\n", 0o755))
    return run("sh", project / "scripts" / script, *arguments, cwd=cwd, **variables)


def arguments_of(result):
    """The arguments that a shell script gave to Python."""
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def assert_usage_error(result, *expected):
    """Exit status 2, usage, and the error on the last line."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("usage: ")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for text in expected:
        assert text in last
    assert "Traceback" not in result.stderr


# scripts.launch


@pytest.mark.slow
def test_every_process_gets_its_rank_the_arguments_and_a_share_of_the_cores(tmp_path):
    script = write(tmp_path / "a script.py", RECORD)
    result = run_launch(script, "--set", "epochs=2", "name=two words", processes=2)
    assert result.returncode == 0
    assert result.stderr == ""
    found = records(result)
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"]) for r in found] == [("0", "0", "2"), ("1", "1", "2")]
    assert all(r["argv"] == [str(script), "--set", "epochs=2", "name=two words"] for r in found)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert all(int(r["OMP_NUM_THREADS"]) == max(1, cores // 2) for r in found)


@pytest.mark.slow
def test_the_given_port_and_number_of_threads_are_kept(tmp_path):
    server, port = listening_port()
    server.close()
    script = write(tmp_path / "script.py", RECORD)
    result = run(sys.executable, "-m", "scripts.launch", "--processes=2", f"--port={port}", script, OMP_NUM_THREADS="7")
    assert result.returncode == 0, result.stderr
    assert [(r["MASTER_PORT"], r["OMP_NUM_THREADS"]) for r in records(result)] == [(str(port), "7")] * 2


@pytest.mark.slow
def test_the_exit_status_and_the_words_of_a_failing_process_pass_through_and_nothing_is_added(tmp_path):
    script = write(
        tmp_path / "script.py",
        """
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(60)
print("out", flush=True)
print("error: in my own words", file=sys.stderr)
sys.exit(3)
""",
    )
    result = run_launch(script, processes=2)
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "error: in my own words\n")


@pytest.mark.slow
def test_a_killed_process_is_reported_in_one_line_and_as_128_plus_the_signal(tmp_path):
    script = write(
        tmp_path / "script.py",
        """
import os, signal, time
if os.environ["RANK"] == "0":
    time.sleep(60)
os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    result = run_launch(script, processes=2)
    assert result.returncode == 128 + signal.SIGKILL
    assert result.stderr == "error: process 1 was ended by signal 9 (SIGKILL); out of memory is the usual cause\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_all_processes_without_a_traceback(tmp_path, number):
    script = write(
        tmp_path / "script.py",
        """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
started = pathlib.Path(sys.argv[1], os.environ["RANK"] + ".part")
started.write_text(str(os.getpid()))
started.rename(started.with_suffix(".pid"))
time.sleep(100)
""",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.launch", "--processes", "2", str(script), str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started = [tmp_path / "0.pid", tmp_path / "1.pid"]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr == ""
    for path in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_ends_neither_launcher_nor_processes(tmp_path):
    script = write(
        tmp_path / "script.py",
        """
import os, pathlib, sys, time
from util.signals import StopSignals
with StopSignals() as signals:
    started = pathlib.Path(sys.argv[1], os.environ["RANK"] + ".part")
    started.write_text(str(os.getpid()))
    started.rename(started.with_suffix(".pid"))
    while not pathlib.Path(sys.argv[1], "go").exists():
        time.sleep(0.05)
    print("lived on" if not signals.received else "ended", flush=True)
""",
    )
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "scripts.launch", "--processes", "2", str(script), str(tmp_path)],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    started = [tmp_path / "0.pid", tmp_path / "1.pid"]
    deadline = time.monotonic() + 100
    while not all(path.exists() for path in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(1)
    (tmp_path / "go").touch()
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "lived on\nlived on\n", "")


@pytest.mark.slow
def test_after_a_failure_all_processes_start_again_as_often_as_allowed(tmp_path):
    script = write(
        tmp_path / "script.py",
        """
import os, sys, time
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
os.write(1, f"{os.environ['RANK']}:{attempt}\\n".encode())
if attempt == "0":
    sys.exit(5) if os.environ["RANK"] == "1" else time.sleep(60)
""",
    )
    result = run(sys.executable, "-m", "scripts.launch", "--processes=2", "--max-restarts=1", script)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(result.stdout.split()) == ["0:0", "0:1", "1:0", "1:1"]


NODES = ["--processes=1", "--nodes=2", "--port=29500"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--processes", "1", "--max-restarts", "-1", "scripts/launch.py"], "--max-restarts -1"),
        (["--processes", "0", "unimatch.py"], "--processes 0"),
        (["--processes", "two", "unimatch.py"], "'two'"),
        (["unimatch.py"], "--processes"),
        (["--processes", "1"], "METHOD.py"),
        (["--processes=1", "--nodes=2", "--node-rank=2", "scripts/launch.py"], "--node-rank 2: must be from 0 to 1"),
        (["--processes=1", "--nodes=2", "scripts/launch.py"], "several machines need --master-addr and --port"),
        ([*NODES, "--master-addr=a.invalid", "scripts/launch.py"], "--master-addr a.invalid: "),
        ([*NODES, "--master-addr=127.0.0.1", "--max-restarts=1", "scripts/launch.py"], "on one machine only"),
        (["--processes", "1", "no/such.py"], "no/such.py: no such file"),
        (["--processes", "1", "--port", "80", "scripts/launch.py"], "port 80 is out of range"),
        (["--processes", "1", "--port", "65536", "scripts/launch.py"], "port 65536 is out of range"),
    ],
)
def test_a_launch_that_cannot_work_is_one_line_and_status_2(words, expected, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert launch.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


@pytest.mark.slow
def test_without_a_folder_for_temporary_files_a_launch_is_one_line(tmp_path):
    script = write(tmp_path / "script.py", RECORD)
    program = "import sys, tempfile; tempfile._candidate_tempdir_list = list\nimport scripts.launch as l\n"
    program += "sys.exit(l.main(sys.argv[1:]))"
    result = run(sys.executable, "-c", program, "--processes", 1, script)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no folder for temporary files (") and "set TMPDIR to one that can be writ" in line


def test_a_taken_port_is_refused_with_the_way_out(capsys):
    server, port = listening_port()
    with server:
        assert launch.main(["--processes", "1", "--port", str(port), __file__]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: port {port} is taken; choose another")


@pytest.mark.slow
def test_a_port_taken_after_the_check_is_one_line_too(tmp_path):
    script = write(tmp_path / "script.py", RECORD)
    program = "import sys, scripts.launch as l; l.check_port = lambda port: None; sys.exit(l.main(sys.argv[1:]))"
    server, port = listening_port()
    with server:
        result = run(sys.executable, "-c", program, "--processes", 1, "--port", port, script)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: the processes cannot meet at port {port}")


@pytest.fixture
def start_machine(tmp_path):
    """Start scripts.launch as one of several machines, which are this one; its waiting times are short.

    Returns the process, the file with what it says, its folder for temporary files, and where the machines meet.
    """
    started = []

    def start(script, rank, nodes, port, wait=3):
        folder = tmp_path / f"{len(started)}"
        folder.mkdir()
        program = f"import sys, scripts.launch as l; l.WAIT, l.NOTE_AFTER, l.PART = {wait}, 1, 1\n"
        program += "sys.exit(l.main(sys.argv[1:]))"
        words = [
            "--processes=1",
            f"--nodes={nodes}",
            f"--node-rank={rank}",
            "--master-addr=127.0.0.1",
            f"--port={port}",
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", program, *words, str(script)],
            cwd=ROOT, stderr=(tmp_path / f"said{len(started)}").open("w"), env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip
        machine = SimpleNamespace(process=process, said=Path(f"{tmp_path}/said{len(started)}"), temporary=folder)
        machine.place = f"127.0.0.1:{port}"
        started.append(machine)
        return machine

    yield start
    for machine in started:
        machine.process.kill()


def free_port():
    server, port = listening_port()
    server.close()
    return port


@pytest.mark.slow
def test_a_machine_that_waits_in_vain_for_the_others_says_so_and_how_many_came(tmp_path, start_machine):
    script = write(tmp_path / "script.py", RECORD)
    port = free_port()
    places = [(0, 2, free_port()), (1, 2, free_port()), (0, 3, port), (1, 3, port)]
    machines = [start_machine(script, *place) for place in places]
    errors = []
    for machine, (_, nodes, _) in zip(machines, places, strict=True):
        assert machine.process.wait(60) == 2
        note, error = machine.said.read_text().splitlines()
        assert note.startswith(f"note: waiting for the other machines at {machine.place} (NNODES={nodes}; start ")
        assert error.startswith("error: ") and machine.place in error and "with its own NODE_RANK" in error
        errors.append(error)
    assert errors[0].startswith(f"error: 1 of 2 machines came to {machines[0].place} within 0.05 minutes: start the ")
    assert errors[1].startswith(f"error: no answer from the first machine (NODE_RANK=0) at {machines[1].place} within ")
    assert errors[2].startswith("error: 2 of 3 machines came to ")


@pytest.mark.slow
def test_a_machine_that_waits_for_the_others_ends_at_a_signal_and_leaves_nothing(tmp_path, start_machine):
    script = write(tmp_path / "script.py", RECORD)
    machines = [start_machine(script, rank, 2, free_port(), wait=300) for rank in range(2)]
    for machine, number in zip(machines, (signal.SIGINT, signal.SIGTERM), strict=True):
        deadline = time.monotonic() + 60
        while "\n" not in (note := machine.said.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert note.startswith("note: waiting for ")
        machine.process.send_signal(number)
        assert (machine.process.wait(60), machine.said.read_text()) == (128 + number, note)
        assert not list(machine.temporary.iterdir())


@pytest.mark.slow
def test_a_machine_that_has_finished_does_not_wait_long_for_one_that_has_not(tmp_path, start_machine):
    script = write(
        tmp_path / "script.py",
        """
import os, pathlib, time
while os.environ["RANK"] == "1" and not pathlib.Path(__file__).with_name("go").exists():
    time.sleep(0.05)
""",
    )
    port = free_port()
    first, second = (start_machine(script, rank, 2, port, wait=60) for rank in range(2))
    assert first.process.wait(60) == 0
    assert second.process.poll() is None
    (tmp_path / "go").touch()
    assert second.process.wait(60) == 0


def test_a_free_port_is_accepted():
    server, port = listening_port()
    server.close()
    launch.check_port(port)


def test_more_processes_than_gpus_are_refused_with_both_numbers_and_the_way_out():
    with pytest.raises(launch.LaunchError, match=r"^8 processes, but only 2 .* at most 2, .*--set device=cpu$"):
        launch.check_gpus(8, 2, [])
    with pytest.raises(launch.LaunchError):
        launch.check_gpus(8, 2, ["--set", "device=cpu", "device=cuda"])


@pytest.mark.parametrize(
    ("processes", "gpus", "arguments"),
    [(2, 2, []), (8, 0, []), (8, 2, ["--set", "device=cpu"]), (8, 2, ["--set=device=cpu"]), (1, 8, ["--set", "lr=1"])],
)
def test_as_many_processes_as_gpus_or_any_number_on_the_cpu_are_accepted(processes, gpus, arguments):
    launch.check_gpus(processes, gpus, arguments)


@pytest.mark.parametrize(
    ("exits", "expected"),
    [
        ({0: (-15, 5), 1: (3, 5)}, (1, 3)),  # torchrun's own SIGTERM
        ({0: (1, 5), 1: (-9, 5)}, (1, -9)),  # lost its peer
        ({0: (1, 5), 1: (2, 5)}, (1, 2)),
        ({0: (1, 4), 1: (2, 5)}, (0, 1)),  # a second earlier
        ({2: (1, 5), 0: (1, 5)}, (2, 1)),
        ({0: (-15, 5)}, (0, -15)),
    ],
)
def test_the_failure_reported_is_the_first_that_others_did_not_cause(exits, expected):
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=second) for rank, (code, second) in exits.items()}
    assert launch.first_failure(failures) == expected


# train.sh


@pytest.mark.slow
def test_train_runs_in_the_project_from_any_folder(project, tmp_path):
    result = sh(project, "train.sh", 2, "--set", "name=two words", cwd=tmp_path, PYTHON=sys.executable)
    assert (result.returncode, result.stderr) == (0, "")
    assert [r["RANK"] for r in records(result)] == ["0", "1"]
    for record in records(result):
        assert record["cwd"] == str(project)
        assert record["argv"] == [
            "unimatch.py", "--config", "configs/pascal.yaml", "--labeled-id-path", "splits/pascal/732/labeled.txt",
            "--save-path", "exp/pascal/unimatch/r101/732", "--set", "name=two words",
        ]  # fmt: skip


@pytest.mark.slow
def test_trains_exit_status_is_that_of_the_training(project):
    write(project / "unimatch.py", "raise SystemExit(5)")
    result = sh(project, "train.sh", 1, PYTHON=sys.executable)
    assert (result.returncode, result.stdout, result.stderr) == (5, "", "")


def test_train_is_also_run_by_bash_from_its_own_folder(project):
    result = run("bash", "train.sh", 1, cwd=project / "scripts", PYTHON="echo", CDPATH="/usr")
    assert arguments_of(result)[0].startswith(
        "-m scripts.launch --processes 1 unimatch.py --config configs/pascal.yaml "
    )


def test_train_takes_a_port_and_variables_from_the_environment(project):
    variables = {"dataset": "coco", "method": "fixmatch", "exp": "xc65", "split": "1_512", "unlabeled": "train 2017"}
    assert arguments_of(sh(project, "train.sh", 4, 29500, "--resume", "never", **variables)) == [
        "-m", "scripts.launch", "--processes", "4", "--port", "29500",
        "fixmatch.py", "--config", "configs/coco.yaml", "--labeled-id-path", "splits/coco/1_512/labeled.txt",
        "--unlabeled-id-path", "train 2017", "--save-path", "exp/coco/fixmatch/xc65/1_512", "--resume", "never",
    ]  # fmt: skip


def test_train_takes_config_and_labelled_list_of_any_dataset(project):
    result = sh(project, "train.sh", 1, dataset="mine", config="configs/my own.yaml", labeled="lists/my list.txt")
    assert arguments_of(result)[5:] == [
        "--config", "configs/my own.yaml", "--labeled-id-path", "lists/my list.txt",
        "--save-path", "exp/mine/unimatch/r101/732",
    ]  # fmt: skip


def test_train_on_several_machines_passes_their_number_and_the_meeting_place_on(project):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node 1"}
    assert arguments_of(sh(project, "train.sh", 4, 29500, **nodes))[:13] == [
        "-m", "scripts.launch", "--processes", "4", "--port", "29500",
        "--nodes", "2", "--node-rank", "1", "--master-addr", "node 1", "unimatch.py",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["2", "29500"], {"NNODES": "x"}, "NNODES must be a positive number, not 'x'"),
        (["2", "29500"], {"NNODES": "2"}, "NODE_RANK must be a number from 0 to 1, not ''"),
        (["2", "29500"], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK must be a number from 0 to 1, not '2'"),
        (["2", "29500"], {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is missing"),
        (["2"], {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, "port is missing"),
    ],
)
def test_train_on_several_machines_called_wrong_says_what(project, arguments, variables, expected):
    assert_usage_error(sh(project, "train.sh", *arguments, **variables), expected)


def test_train_restarts_as_often_as_told(project):
    assert arguments_of(sh(project, "train.sh", 2, max_restarts="3"))[:7] == [
        "-m", "scripts.launch", "--processes", "2", "--max-restarts", "3", "unimatch.py",
    ]  # fmt: skip
    assert "--max-restarts" not in arguments_of(sh(project, "train.sh", 2, max_restarts="0"))
    assert_usage_error(sh(project, "train.sh", 2, max_restarts="often"), "max_restarts", "'often'")


@pytest.mark.slow
def test_train_runs_each_seed_in_its_own_folder_and_stops_at_the_first_failure(project):
    write(project / "unimatch.py", RECORD + "sys.exit(5 * ('seed=1' in sys.argv))")
    result = sh(project, "train.sh", 1, "--set", "epochs=2", seeds="4 0 1 2", PYTHON=sys.executable)
    assert (result.returncode, result.stderr) == (5, "")
    told, ran = [line for line in result.stdout.splitlines() if line.startswith("seed ")], []
    save = "exp/pascal/unimatch/r101/732"
    for line in result.stdout.splitlines():
        if not line.startswith("seed "):
            ran.append(json.loads(line)["argv"][-6:])
    assert told == [f"seed {n}, in {save}/seed{n}" for n in (4, 0, 1)]
    assert ran == [
        ["--save-path", f"{save}/seed{n}", "--set", "epochs=2", "--set", f"seed={n}"] for n in (4, 0, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_script_ends_the_seed_that_runs_and_no_other_starts(project, tmp_path, number):
    started = tmp_path / "started"
    write(
        tmp_path / "python",
        f"#!/bin/sh\ntrap 'exit 7' TERM USR1 HUP\necho run >>'{started}'\nwhile :; do sleep 0.1; done\n",
        0o755,
    )
    env = {key: value for key, value in os.environ.items() if key not in OURS}
    process = subprocess.Popen(
        ["sh", str(project / "scripts/train.sh"), "1"], env=env | {"seeds": "0 1", "PYTHON": str(tmp_path / "python")},
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == 7
        assert started.read_text() == "run\n"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_seeds_that_are_finished_are_left_alone_and_the_others_go_on(tmp_path):
    """With the real training script, on four small pictures."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        Image.fromarray(rng.integers(0, 2, (32, 32), dtype=np.uint8)).save(tmp_path / f"{index}-label.png")
        lines.append(f"{index}.png {index}-label.png\n")
    labeled = write(tmp_path / "labeled.txt", "".join(lines))
    config = write(
        tmp_path / "tiny.yaml",
        f"{{dataset: tiny, nclass: 2, data_root: '{tmp_path}', val_id_path: '{labeled}', crop_size: 32, epochs: 1, "
        "batch_size: 2, lr: 0.01, backbone: resnet10, pretrained: false, workers: 0, device: cpu}",
    )
    name = f"test-seeds-{os.getpid()}"
    saved = ROOT / "exp" / name
    variables = {"dataset": name, "method": "supervised", "config": str(config), "labeled": str(labeled)}
    try:
        results = [
            run("sh", "scripts/train.sh", 1, timeout=600, seeds=seeds, PYTHON=sys.executable, **variables)
            for seeds in ("1", "1 2")
        ]
        assert [(r.returncode, r.stderr) for r in results] == [(0, ""), (0, "")]
        folder = saved / "supervised/r101/732"
        assert sorted(path.name for path in folder.iterdir()) == ["seed1", "seed2"]
        log = (folder / "seed1/train.log").read_text()
        assert log.count("epoch 1/1: IoU") == 1 and "1 of 1 epochs are done" in log
        assert "seed: 2\n" in (folder / "seed2/config.yaml").read_text()
    finally:
        shutil.rmtree(saved, ignore_errors=True)


def test_train_doubles_the_supervised_batch_unless_told_otherwise(project):
    assert "--double-batch" in arguments_of(sh(project, "train.sh", 1, method="supervised"))
    assert "--double-batch" not in arguments_of(sh(project, "train.sh", 1, method="supervised", double_batch="0"))
    assert "--double-batch" not in arguments_of(sh(project, "train.sh", 1, method="unimatch"))


def test_train_finds_the_toy_sets_list_or_says_how_to_make_it(project):
    assert_usage_error(
        sh(project, "train.sh", 1, dataset="toy"), "data/toy/labeled.txt", "scripts.make_toy --root data/toy"
    )
    write(project / "data/toy/labeled.txt", "")
    assert "data/toy/labeled.txt" in arguments_of(sh(project, "train.sh", 1, dataset="toy"))


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ([], {}, ["num_gpu is missing"]),
        (["four"], {}, ["num_gpu", "'four'"]),
        (["0"], {}, ["num_gpu", "'0'"]),
        (["-1"], {}, ["num_gpu", "'-1'"]),
        (["1", "http"], {}, ["port", "'http'"]),
        (["1"], {"method": "fixmach"}, ["method=fixmach", "unimatch unimatch_v2 fixmatch supervised"]),
        (["1"], {"dataset": "pascla"}, ["configs/pascla.yaml", "coco my own pascal toy"]),
        (["1"], {"split": "733"}, ["splits/pascal/733/labeled.txt", "one of: 732 92,"]),
        (["1"], {"dataset": "my own"}, ["splits/my own/732/labeled.txt", "labeled=PATH"]),
        (["1"], {"labeled": "no.txt"}, ["labeled=no.txt: no such file"]),
        (["1"], {"config": "no.yaml"}, ["config=no.yaml: no such file"]),
        (["1"], {"PYTHON": "no/python"}, ["PYTHON=no/python"]),
        (["1"], {"seeds": "0, 1"}, ["seeds must be numbers", "'0, 1'"]),
        (["1"], {"seeds": " "}, ["seeds must be numbers"]),
    ],
)
def test_train_called_wrong_says_what_and_which_choices_exist(project, arguments, variables, expected):
    assert_usage_error(sh(project, "train.sh", *arguments, **variables), *expected)


def test_train_help_is_usage_on_stdout(project):
    result = sh(project, "train.sh", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ")


def stand_in_python(path, name):
    """An interpreter, said to have torch, that only tells its name."""
    write(path, f'#!/bin/sh\n[ "$1" = -c ] || echo {name}\n', 0o755)


def test_train_prefers_the_named_python_then_the_active_one_then_the_projects(project, tmp_path):
    stand_in_python(project / ".venv/bin/python", "project")
    stand_in_python(tmp_path / "bin/python", "active")
    stand_in_python(tmp_path / "named", "named")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert sh(project, "train.sh", 1, PYTHON=str(tmp_path / "named"), PATH=path).stdout == "named\n"
    assert sh(project, "train.sh", 1, PYTHON="", PATH=path).stdout == "project\n"
    assert sh(project, "train.sh", 1, PYTHON="", PATH=path, VIRTUAL_ENV="/env").stdout == "active\n"
    write(tmp_path / "bin/python", "#!/bin/sh\nexit 1\n", 0o755)  # without torch, as conda's base
    assert sh(project, "train.sh", 1, PYTHON="", PATH=path, CONDA_PREFIX="/env").stdout == "project\n"


# slurm_train.sh


@pytest.fixture
def srun(tmp_path):
    """PATH with an srun that records its arguments and runs as many processes as told, as SLURM does."""
    write(
        tmp_path / "bin/srun",
        """#!/bin/sh
printf '%s\\n' "$@" >"$RECORDED"
while [ "${1#--}" != "$1" ]; do
    case $1 in --ntasks=*) tasks=${1#*=} ;; esac
    shift
done
rank=0 status=0 started=
while [ "$rank" -lt "$tasks" ]; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=$tasks "$@" &
    started="$started $!"
    rank=$((rank + 1))
done
for process in $started; do
    wait "$process" || status=$?
done
exit $status
""",
        0o755,
    )
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORDED": str(tmp_path / "recorded")}


def test_slurm_train_starts_the_processes_with_ranks_port_and_arguments(project, srun):
    result = sh(project, "slurm_train.sh", 3, 29500, "gpu", "--set", "name=two words", PYTHON=sys.executable, **srun)
    assert result.returncode == 0, result.stderr
    found = records(result)
    assert [(r["SLURM_PROCID"], r["SLURM_NTASKS"], r["MASTER_PORT"]) for r in found] == [
        (str(rank), "3", "29500") for rank in range(3)
    ]
    assert found[0]["cwd"] == str(project)
    assert found[0]["argv"] == [
        "unimatch.py", "--config", "configs/pascal.yaml", "--labeled-id-path", "splits/pascal/732/labeled.txt",
        "--save-path", "exp/pascal/unimatch/r101/732", "--port", "29500", "--set", "name=two words",
    ]  # fmt: skip
    assert Path(srun["RECORDED"]).read_text().splitlines()[:10] == [
        "--partition=gpu", "--job-name=unimatch-pascal-r101-732", "--nodes=1", "--ntasks=3", "--ntasks-per-node=3",
        "--gres=gpu:3", "--cpus-per-task=5", "--kill-on-bad-exit=1", "--export=ALL", sys.executable,
    ]  # fmt: skip


def test_slurm_train_holds_sigterm_back_while_a_process_imports(project, srun):
    write(project / "unimatch.py", "import os, signal; os.kill(os.getpid(), 15); print(signal.sigpending())")
    result = sh(project, "slurm_train.sh", 1, 29500, "gpu", PYTHON=sys.executable, **srun)
    assert (result.returncode, result.stdout) == (0, "{<Signals.SIGTERM: 15>}\n"), result.stderr


def test_slurm_train_spreads_over_nodes(project, srun):
    variables = {"method": "supervised", "gpus_per_node": "4", "cpus_per_task": "7", **srun}
    result = sh(project, "slurm_train.sh", 8, 29500, "gpu", **variables)
    assert result.returncode == 0, result.stderr
    words = Path(srun["RECORDED"]).read_text().splitlines()
    assert words[2:7] == ["--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--gres=gpu:4", "--cpus-per-task=7"]
    assert "--double-batch" in words


def sinfo(folder, *nodes, partitions="gpu"):
    """A stand-in for sinfo: `cores gres` of each node of the partition `gpu`, and the names of all partitions."""
    listed = "\n".join(nodes)
    write(
        folder / "bin/sinfo",
        f"#!/bin/sh\ncase \"$*\" in *%R*) echo '{partitions}';; *'-p gpu '*) echo '{listed}';; esac\n",
        0o755,
    )


@pytest.mark.parametrize(
    ("node", "variables", "arguments", "gres"),
    [
        ("64 gpu:8", {}, [], "--gres=gpu:2"),
        ("64+ gpu:a100:8(S:0-1)", {}, [], "--gres=gpu:2"),
        ("64 gpu:a100:4(S:0,1),gpu:v100:4(S:1)", {"gpu_type": "v100"}, [], "--gres=gpu:v100:2"),
        ("64 (null)", {}, [], None),
        ("64 craynetwork:4", {}, [], None),
        ("64 gpu:8", {}, ["--set", "device=cpu"], None),
        ("64 gpu:8", {}, ["--set", "device=cpu", "--set", "device=cuda"], "--gres=gpu:2"),
        ("64 gpu:8", {}, ["--set=device=cuda", "--set=device=cpu"], None),
        ("64 gpu:8", {"gpu_type": "v100"}, ["--set", "device=cpu"], None),
    ],
)
def test_slurm_train_asks_for_the_gpus_that_the_partition_declares(
    project, srun, tmp_path, node, variables, arguments, gres
):
    sinfo(tmp_path, node)
    result = sh(project, "slurm_train.sh", 2, 29500, "gpu", *arguments, **variables, **srun)
    assert result.returncode == 0, result.stderr
    words = Path(srun["RECORDED"]).read_text().splitlines()
    assert [word for word in words if word.startswith("--gres")] == ([gres] if gres else [])
    assert "--overlap" not in words


JOB = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_CPUS_PER_NODE": "10(x2)", "SLURM_JOB_NUM_NODES": "1"}


@pytest.mark.parametrize(
    ("num_gpu", "variables", "expected"),
    [
        (4, {}, "need 20 CPU cores; partition gpu has 16 on a node with 3 GPUs: lower cpus_per_task or gpus_per_node"),
        (4, {"cpus_per_task": "1"}, "has 3 GPUs at most, not 4: set gpus_per_node=3"),
        (2, {"gpu_type": "a100"}, "gpu_type=a100: partition gpu has no such GPUs"),
        (
            3,
            {**JOB, "SLURM_GPUS_ON_NODE": "3"},
            "need 15: ask for --ntasks-per-node=3 --cpus-per-task=5",
        ),
        (2, {**JOB, "SLURM_GPUS_ON_NODE": "1"}, "job 7 has 1 GPUs on a node, not 2: ask for --gres=gpu:2"),
        (6, {"gpus_per_node": "2"}, "need 3 nodes; partition gpu has 2"),
        (4, {**JOB, "gpus_per_node": "2", "cpus_per_task": "1"}, "has 1 nodes, not the 2 that 4 processes need"),
    ],
)
def test_slurm_train_says_what_a_node_or_a_job_has_too_few_of(project, srun, tmp_path, num_gpu, variables, expected):
    sinfo(tmp_path, "8 gpu:2", "16 gpu:v100:3")
    result = sh(project, "slurm_train.sh", num_gpu, 29500, "gpu", **variables, **srun)
    assert_usage_error(result, expected)
    assert not Path(srun["RECORDED"]).exists()


@pytest.mark.parametrize(
    ("num_gpu", "variables", "expected"),
    [
        (2, {}, "with cpus_per_task=5 need 10 CPU cores; partition gpu has 8 on a node with 2 GPUs: lower"),
        (2, {"cpus_per_task": "4"}, None),
        (4, {"cpus_per_task": "8", "gpus_per_node": "1"}, None),
        (
            4,
            {"cpus_per_task": "4", "gpus_per_node": "2"},
            "need 2 nodes with 8 CPU cores and 2 GPUs; partition gpu has 1",
        ),
        (
            5,
            {"cpus_per_task": "8", "gpus_per_node": "1"},
            "need 5 nodes with 8 CPU cores and 1 GPUs; partition gpu has 4",
        ),
        (4, {"cpus_per_task": "1"}, "has 2 GPUs at most, not 4: set gpus_per_node=2"),
    ],
)
def test_slurm_train_wants_cores_and_gpus_on_the_same_nodes(project, srun, tmp_path, num_gpu, variables, expected):
    sinfo(tmp_path, "64 (null)", "8 gpu:2", "64 (null)", "32 gpu:1", "8 gpu:1", "16 gpu:1", "4 gpu:2")
    result = sh(project, "slurm_train.sh", num_gpu, 29500, "gpu", **variables, **srun)
    if expected is None:
        assert result.returncode == 0, result.stderr
    else:
        assert_usage_error(result, expected)


def test_slurm_train_wants_cores_alone_for_processes_on_the_cpu(project, srun, tmp_path):
    sinfo(tmp_path, "64 (null)", "8 gpu:2")
    words = (project, "slurm_train.sh", 4, 29500, "gpu", "--set", "device=cpu")
    assert sh(*words, gpus_per_node="4", cpus_per_task="16", **srun).returncode == 0
    result = sh(*words, gpus_per_node="2", **srun)
    assert_usage_error(result, "4 processes need 2 nodes with 10 CPU cores; partition gpu has 1")


def test_slurm_train_names_the_partitions_that_there_are(project, srun, tmp_path):
    sinfo(tmp_path, "8 gpu:2", partitions="gpu long")
    result = sh(project, "slurm_train.sh", 2, 29500, "gpus", **srun)
    assert_usage_error(result, "partition gpus: no such partition; there are: gpu long")


def test_slurm_train_in_a_shell_that_srun_started_shares_its_resources(project, srun):
    variables = {**JOB, "SLURM_GPUS_ON_NODE": "2"}
    assert sh(project, "slurm_train.sh", 2, 29500, "gpu", **variables, **srun).returncode == 0
    assert "--overlap" in Path(srun["RECORDED"]).read_text().splitlines()


def test_slurm_trains_exit_status_is_that_of_srun(project, srun):
    write(project / "unimatch.py", "import os, sys\nsys.exit(4 * int(os.environ['SLURM_PROCID']))\n")
    assert sh(project, "slurm_train.sh", 2, 29500, "gpu", PYTHON=sys.executable, **srun).returncode == 4


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ([], {}, ["num_gpu is missing"]),
        (["x", "29500", "gpu"], {}, ["num_gpu", "'x'"]),
        (["4"], {}, ["port is missing"]),
        (["4", "80", "gpu"], {}, ["port", "'80'"]),
        (["4", "70000", "gpu"], {}, ["port", "'70000'"]),
        (["4", "29500"], {}, ["partition is missing"]),
        (["4", "29500", "--set", "a=b"], {}, ["partition is missing"]),
        (["12", "29500", "gpu"], {}, ["12 GPUs", "nodes of 8", "gpus_per_node"]),
        (["4", "29500", "gpu"], {"gpus_per_node": "0"}, ["gpus_per_node", "'0'"]),
        (["4", "29500", "gpu"], {"split": "733"}, ["splits/pascal/733/labeled.txt"]),
        (["4", "29500", "gpu"], {"method": "none"}, ["method=none"]),
    ],
)
def test_slurm_train_called_wrong_says_what(project, srun, arguments, variables, expected):
    assert_usage_error(sh(project, "slurm_train.sh", *arguments, **srun, **variables), *expected)
    assert not Path(srun["RECORDED"]).exists()


def test_slurm_train_without_slurm_names_the_other_launcher(project, tmp_path):
    tools = tools_only(tmp_path, "sh", "dirname", "cat")
    result = sh(project, "slurm_train.sh", 1, 29500, "gpu", PATH=tools)
    assert_usage_error(result, "srun not found", "scripts/train.sh")


SAVES = """
import pathlib, sys, time
time.sleep(0.05)  # file times have the kernel's ticks
path = pathlib.Path(sys.argv[len(sys.argv) - sys.argv[::-1].index("--save-path")])
path.mkdir(parents=True, exist_ok=True)
(path / "midway.pth").write_text("")
raise SystemExit(138)
"""


@pytest.fixture
def job(project, srun, tmp_path):
    """Run slurm_train.sh as a batch job, in which each process ends with a status; what was told to scontrol."""
    told = tmp_path / "scontrol.told"
    write(tmp_path / "bin/scontrol", f"#!/bin/sh\necho \"$*\" >>'{told}'\n", 0o755)
    shutil.copy(project / "scripts/slurm_train.sh", tmp_path / "slurm_script")  # sbatch runs a copy

    def job(body, arguments=(), **variables):
        write(project / "unimatch.py", body)
        result = run(
            "sh", tmp_path / "slurm_script", 2, 29500, "gpu", *arguments, cwd=tmp_path, PYTHON=sys.executable,
            SLURM_JOB_ID="77", SLURM_GPUS_ON_NODE="2", SLURM_SUBMIT_DIR=str(project), **srun, **variables,
        )  # fmt: skip
        return result, told.read_text() if told.exists() else ""

    return job


def test_a_batch_job_that_was_saved_before_its_time_limit_queues_itself_again(job):
    result, told = job(SAVES)
    assert (result.returncode, told) == (138, "requeue 77\n")
    assert "job 77 queues itself again" in result.stderr


@pytest.mark.parametrize("failures", [1, 9])
def test_a_batch_job_tries_again_where_the_controller_does_not_answer(job, tmp_path, failures):
    write(tmp_path / "bin/scontrol", f"""#!/bin/sh
echo "$*" >>'{tmp_path}/scontrol.told'
[ "$(wc -l <'{tmp_path}/scontrol.told')" -gt {failures} ] || {{ echo "Socket timed out" >&2; exit 1; }}
""", 0o755)  # fmt: skip
    write(tmp_path / "bin/sleep", "#!/bin/sh\nexit 0\n", 0o755)
    result, told = job(SAVES)
    assert (result.returncode, told) == (138, "requeue 77\n" * min(failures + 1, 5))
    assert ("error: job 77 could not queue itself again" in result.stderr) == (failures == 9)


def test_a_batch_job_that_saved_nothing_before_its_time_limit_does_not(job, project):
    saved = write(project / "exp/pascal/unimatch/r101/732/latest.pth", "of an earlier job")
    os.utime(saved, (1, 1))
    result, told = job("raise SystemExit(138)")
    assert (result.returncode, told) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: job 77 was signalled before training had saved anything: its time limit")
    assert [path.name for path in saved.parent.iterdir()] == ["latest.pth"]


def test_a_batch_job_looks_for_checkpoints_in_the_save_path_that_its_arguments_name(job, tmp_path):
    result, told = job(SAVES, arguments=["--save-path", tmp_path / "else where", "--set", "a=b"])
    assert (result.returncode, told) == (138, "requeue 77\n")


@pytest.mark.parametrize("status", [0, 2, 3, 143])
def test_a_batch_job_that_ends_otherwise_does_not(job, status):
    result, told = job(f"raise SystemExit({status})")
    assert (result.returncode, told) == (status, "")


def test_a_step_of_a_job_is_not_queued_again(job):
    result, told = job(SAVES, SLURM_STEP_ID="0")
    assert (result.returncode, told) == (138, "")


def test_a_signal_to_the_batch_script_reaches_srun(job, tmp_path):
    """As sbatch --signal=B:USR1@120 sends it."""
    write(tmp_path / "bin/srun", """#!/bin/sh
trap 'exit 138' USR1
for save; do case $last in --save-path) mkdir -p "$save" && echo >"$save/midway.pth" ;; esac; last=$save; done
kill -USR1 "$PPID"
while :; do sleep 0.1; done
""", 0o755)  # fmt: skip
    result, told = job("")
    assert (result.returncode, told) == (138, "requeue 77\n")


# setup_env.sh, quickstart.sh, test.sh


def tools_only(tmp_path, *names):
    """A PATH on which nothing but these programs is found."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.mark.slow
def test_setup_makes_the_environment_once_and_again_when_a_list_changes(project):
    write(project / "requirements.txt", "# nothing\n")
    write(project / "requirements-dev.txt", "-r requirements.txt\n")
    first = sh(project, "setup_env.sh", "requirements-dev.txt")
    assert first.returncode == 0, first.stderr
    assert "Installing requirements-dev.txt" in first.stdout
    for arguments in (["requirements-dev.txt"], ["requirements.txt"], []):
        again = sh(project, "setup_env.sh", *arguments)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    write(project / "requirements.txt", "# changed\n")
    assert "Installing requirements.txt" in sh(project, "setup_env.sh").stdout
    write(project / "requirements.txt", "-e ./no-such-folder\n")
    assert sh(project, "setup_env.sh").returncode != 0
    assert "Installing" in sh(project, "setup_env.sh").stdout, "a failed installation counted as done"


def test_setup_says_which_python_it_needs(project, tmp_path):
    write(project / "requirements.txt", "")
    tools = tools_only(tmp_path, "sh", "dirname", "cat")
    write(Path(tools) / "python3", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.10 || exit 1\n', 0o755)
    result = sh(project, "setup_env.sh", PATH=tools)
    assert result.returncode == 2
    assert result.stderr == "error: Python 3.10 or newer is needed; python3 here: Python 3.8.10\n"


def test_setup_says_what_to_install_where_venv_is_missing(project, tmp_path):
    write(project / "requirements.txt", "")
    tools = tools_only(tmp_path, "sh", "dirname", "cat")
    write(Path(tools) / "python3", "#!/bin/sh\ncase $2 in *ensurepip*) exit 1 ;; esac\n", 0o755)
    result = sh(project, "setup_env.sh", PATH=tools)
    assert result.returncode == 2
    assert result.stderr.startswith("error: python3 lacks its venv module")
    assert len(result.stderr.splitlines()) == 1


def test_quickstart_makes_the_set_trains_evaluates_and_predicts_in_this_order(project, tmp_path):
    python = write(tmp_path / "python", '#!/bin/sh\necho "ran: $*"\n', 0o755)
    result = sh(project, "quickstart.sh", PYTHON=str(python))
    assert (result.returncode, result.stderr) == (0, "")
    ran = [line.removeprefix("ran: ") for line in result.stdout.splitlines() if line.startswith("ran: ")]
    save = "exp/toy/unimatch/quickstart"
    assert ran == [
        "-m scripts.make_toy --root data/toy",
        f"unimatch.py --config configs/toy.yaml --labeled-id-path data/toy/labeled.txt --save-path {save}",
        f"-m scripts.evaluate --config configs/toy.yaml --checkpoint {save}/best.pth",
        f"-m scripts.predict --config configs/toy.yaml --checkpoint {save}/best.pth --images data/toy/val.txt "
        f"--output {save}/predictions --panel {save}/examples.png",
    ]
    assert f"In {save}:\n  examples.png" in result.stdout


def test_quickstart_stops_at_the_first_failure_with_its_status(project, tmp_path):
    python = write(tmp_path / "python", '#!/bin/sh\necho "ran: $*"\n[ "$1" != unimatch.py ] || exit 3\n', 0o755)
    result = sh(project, "quickstart.sh", PYTHON=str(python))
    assert result.returncode == 3
    assert "scripts.evaluate" not in result.stdout


def test_the_test_script_runs_pytest_and_returns_its_status(project, tmp_path):
    python = write(tmp_path / "python", '#!/bin/sh\necho "ran: $*"\nexit 6\n', 0o755)
    result = sh(project, "test.sh", "-k", "two words", PYTHON=str(python))
    assert (result.returncode, result.stdout) == (
        6,
        "ran: -m pytest --color=no --numprocesses=3 --dist=worksteal -k two words\n",
    )


def test_the_service_only_runs_the_test_script(project):
    shutil.copytree(ROOT / ".ci", project / ".ci")
    write(project / "scripts/test.sh", 'echo "$(pwd) $#"; exit 6\n')
    result = run(project / ".ci/run", cwd="/")
    assert (result.returncode, result.stdout) == (6, f"{project} 0\n")


# All shell scripts


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shell_scripts_parse_as_posix_and_are_executable_unless_sourced(name):
    path = ROOT / "scripts" / name
    result = run("sh", "-n", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert os.access(path, os.X_OK) == path.read_text().startswith("#!/bin/sh\n")


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    paths = [*(f"scripts/{name}" for name in SHELL_SCRIPTS), ".ci/run"]
    result = run(shellcheck, "-x", *paths)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
