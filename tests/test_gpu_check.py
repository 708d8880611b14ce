"""scripts/gpu_check.py: the report of made-up results, limits that end a part, and the refusal without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from scripts import gpu_check
from scripts.benchmark import gpu
from tests.helpers import PROJECT_ROOT
from util.errors import ConfigError
from util.outputs import MARK, is_own
from util.train.graph import WARM_UP

OUTPUT = """\
collected 3 items
tests/gpu/test_a.py::test_one[cuda-two words] PASSED                 [ 33%]
tests/gpu/test_a.py::test_two FAILED                                 [ 66%]
tests/test_b.py::test_three SKIPPED (needs two GPUs)                 [100%]
FAILED tests/gpu/test_a.py::test_two - assert 1 == 2
ERROR tests/gpu/test_c.py - ModuleNotFoundError: No module named 'x'
"""
ROW = {"name": "a step", "naive": [0.2, 0.4, 0.3], "ours": [0.1, 0.15, 0.2], "unit": "s", "equality": "", "ratio": 2.0}


def _report(**changes: Any) -> dict[str, Any]:
    report = {
        "tool": MARK,
        "device": {"GPU": "Made-up 9000"},
        "notes": [],
        "checks": {"tests/t.py::test_a": "passed"},
        "rows": [ROW],
    }
    return report | changes


def test_each_check_is_read_once_with_its_result():
    assert gpu_check.read_checks(OUTPUT) == {
        "tests/gpu/test_a.py::test_one[cuda-two words]": "passed",
        "tests/gpu/test_a.py::test_two": "failed",
        "tests/test_b.py::test_three": "skipped",
        "tests/gpu/test_c.py": "error",
    }


def test_the_report_names_the_device_each_check_and_each_ratio(tmp_path):
    report = _report(checks=gpu_check.read_checks(OUTPUT))
    gpu_check.write_report(report, tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    text = (tmp_path / "out/report.md").read_text()
    assert "NOT all checks passed: 1 passed, 1 failed, 1 error, 1 skipped, 1 measured." in text
    assert "- GPU: Made-up 9000" in text and "| a step | 0.3 s | 0.15 s | 2.00 |  |" in text
    assert "- failed: `tests/gpu/test_a.py::test_two`" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"checks": {}}, False),
        ({"checks": {"a": "skipped"}}, False),
        ({"checks": {"a": "passed", "b": "error"}}, False),
        ({"notes": ["The tests were ended"]}, False),
        ({"rows": []}, False),
        ({"rows": [{**ROW, "equality": "FAILED: no"}]}, False),
    ],
)
def test_all_is_well_only_if_everything_ran_and_nothing_failed(changes, expected):
    report = _report(**changes)
    assert gpu_check.all_passed(report) is expected
    assert gpu_check.summary(report).startswith("all checks passed") is expected


def test_a_part_that_takes_too_long_is_ended_and_what_it_printed_is_kept():
    report, code = _report(), "import time; print('tests/t.py::test_a PASSED', flush=True); time.sleep(60)"
    output = gpu_check.run_part([sys.executable, "-c", code], 2, "tests", report)
    assert gpu_check.read_checks(output) == {"tests/t.py::test_a": "passed"}
    assert "ended after 2 s" in report["notes"][0]


@pytest.mark.parametrize(
    ("part", "status", "noted"),
    [
        ("tests", 0, ""),
        ("tests", 1, ""),
        ("tests", 2, "The tests broke off with exit status 2: "),
        ("tests", -signal.SIGSEGV, "The tests broke off with signal SIGSEGV: "),
        ("benchmark", 0, ""),
        ("benchmark", 1, "The benchmark broke off with exit status 1: "),
        ("benchmark", -signal.SIGKILL, "The benchmark broke off with signal SIGKILL: "),
    ],
)
def test_a_part_that_breaks_off_is_noted_whatever_it_had_done_by_then(part, status, noted, tmp_path, monkeypatch):
    rows, passed = tmp_path / "benchmark.json", "tests/t.py::test_a PASSED [10%]\ntests/t.py::test_b "

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        rows.write_text(json.dumps({"rows": [ROW]}))
        return subprocess.CompletedProcess(command, status, passed.encode())

    monkeypatch.setattr(subprocess, "run", run)
    report = _report()
    if part == "tests":
        gpu_check.run_tests(report)
    else:
        gpu_check.run_benchmark(report, rows)
    assert gpu_check.all_passed(report) is (not noted)
    assert [note.startswith(noted) for note in report["notes"]] == [True] * bool(noted)


def test_without_pytest_the_report_says_so(monkeypatch):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    report = _report(checks={})
    gpu_check.run_tests(report)
    assert report["notes"] == [f"The tests were not run: {sys.executable} has no pytest."]


def test_another_s_report_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"report.md: exists, and these tools did not write it"):
        gpu_check.main(["--out", str(tmp_path)])
    gpu_check.write_report(_report(), tmp_path)
    assert is_own(tmp_path / "report.md") and is_own(tmp_path / "report.json")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_ends_with_one_line_and_status_2(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["sh", str(PROJECT_ROOT / "scripts/gpu_check.sh"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: no GPU: torch ") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_row_of_the_benchmark_s_gpu_part_can_be_measured(device, monkeypatch):
    if device.type == "cpu":  # bf16 is the same code, and the network is large
        monkeypatch.setattr(gpu, "WAYS_V2", {"naive": {}, "float32": {}})
    rows = list(gpu.measure_gpu(device, 1, backbone="resnet18", crop=33, loss_size=41, crop_v2=28))
    assert len(rows) >= 13 and any(row.name.startswith("UniMatch V2 step 2 + 2, dinov2_small") for row in rows)
    for row in rows:
        assert not row.equality and len(row.naive) == len(row.ours) == 1, row


def test_the_memory_of_a_step_that_is_recorded_is_taken_while_it_is_made_and_recorded(monkeypatch):
    """As a CUDA graph: its first steps allocate, its replays do not."""
    allocated, peak, steps = [1e9], [0.0], []

    def allocate(amount: float) -> None:
        allocated[0] += amount
        peak[0] = max(peak[0], allocated[0])

    def make() -> Callable[[], None]:
        allocate(2e9)  # the model

        def step() -> None:
            steps.append(None)
            if len(steps) == WARM_UP + 1:
                allocate(5e9)

        return step

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.__setitem__(0, allocated[0]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak[0])
    _, gigabytes = gpu.warmed_up(torch.device("cuda"), make)
    assert gigabytes == 7


@pytest.mark.slow
def test_a_part_of_the_benchmark_that_fails_is_a_row_and_the_others_are_measured(monkeypatch):
    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu, "prepare_step_v2", fail)
    rows = list(gpu.measure_gpu(torch.device("cpu"), 1, backbone="resnet10", crop=33, loss_size=41, crop_v2=28))
    assert [row.equality for row in rows if row.equality] == ["FAILED: OutOfMemoryError: ['no memory']"]
    assert rows[-1].name.startswith("peak memory with the model: UniMatch step")
