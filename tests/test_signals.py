"""Signals outside training, and while an error is on its way to the user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import PROJECT_ROOT
from util.errors import EXIT_CONSEQUENCE, Interrupted, Silenced
from util.signals import StopSignals, keep_error, outside_training


@pytest.fixture(autouse=True)
def restored():
    """The handlers of before, and no signal noted."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    yield
    StopSignals.last = 0
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("rank", "number", "expected"),
    [
        (0, signal.SIGTERM, Interrupted),
        (1, signal.SIGTERM, Silenced),
        (1, signal.SIGUSR1, Interrupted),
        (0, signal.SIGHUP, Interrupted),
    ],
)
def test_outside_training_a_signal_ends_the_process_and_under_srun_process_0_says_so(rank, number, expected):
    before = signal.getsignal(number)
    with pytest.raises(expected), outside_training(rank, under_srun=True):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.slow
@pytest.mark.parametrize("held_back", [False, True], ids=["while it waits for process 0 to speak", "while it imports"])
def test_a_process_that_srun_ends_because_of_an_error_of_all_leaves_srun_the_status_of_process_0(held_back):
    program = """
import os, signal, sys, threading
def end():
    os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "True":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    end()
from util.cli import run_main
from util.errors import ConfigError
def main():
    threading.Timer(0.5, end).start()
    raise ConfigError("unknown key")
run_main(main)
"""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-c", program, str(held_back)], capture_output=True, text=True, cwd=PROJECT_ROOT,
        env={**env, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout + result.stderr) == (EXIT_CONSEQUENCE, "")


def test_an_error_that_is_to_be_shown_is_not_hidden_by_the_launchers_sigterm():
    """srun sends it to the first process while that still waits for the others to read its error."""
    with pytest.raises(ValueError, match="the error"), outside_training(0, under_srun=True):
        try:
            raise ValueError("the error")
        except ValueError:
            keep_error()
            os.kill(os.getpid(), signal.SIGTERM)
            raise
    os.kill(os.getpid(), signal.SIGTERM)  # while it is printed
    assert StopSignals.last == signal.SIGTERM


def test_a_signal_within_a_finaliser_where_python_drops_what_is_raised_ends_the_run_after_its_first_step(monkeypatch):
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)

    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with outside_training(0, under_srun=False):
        Finalised()
        with StopSignals() as signals:
            assert signals.received == signal.SIGTERM
    with StopSignals() as signals:
        assert signals.received == 0


def test_a_closed_terminal_is_ignored_outside_training_where_it_was_before():
    """As nohup has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with outside_training(0, under_srun=False):
        os.kill(os.getpid(), signal.SIGHUP)
        keep_error()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and StopSignals.last == 0
