"""A short round of what `python -m scripts.chaos` does at length: real runs, real faults, ends equal to the bit."""

from __future__ import annotations

import random

import pytest
import torch

from scripts.chaos.__main__ import Table, main, play
from scripts.chaos.compare import difference, distance
from scripts.chaos.faults import FAULTS
from scripts.chaos.run import Run, Unanswered
from tests.helpers import run_script

pytestmark = pytest.mark.slow


def test_runs_that_were_harmed_end_as_one_that_was_not():
    faults = ["kill-in-save"]
    result = run_script("-m", "scripts.chaos", "--rounds", "1", "--faults", *faults, "--methods", "unimatch")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[-1:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [(name, "1", "1") for name in faults]


def test_a_difference_is_found_wherever_it_is():
    state = {"model": {"w": [1.0, 2.0]}, "losses": {("1", "2"): "loss 0.5"}}
    assert difference(state, {"model": {"w": [1.0, 2.0]}, "losses": {("1", "2"): "loss 0.5"}}) is None
    assert difference(state, {"model": {"w": [1.0, 2.5]}, "losses": {}}) == "['model']['w'][1]"
    assert difference(state, {**state, "losses": {}}) == "['losses'] keys"
    assert difference([1], [1, 2]) == " length" and difference(1, 1.0) == ""


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="--faults flood: there are kill, "):
        main(["--faults", "flood"])


def test_the_distance_of_two_models_is_relative():
    weights = {"w": torch.tensor([3.0, 4.0])}
    assert distance(weights, weights) == 0
    assert distance(weights, {"w": torch.tensor([3.0, 4.5])}) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "name",
    ["kill", "kill-in-save", "signal", "early-signal", "kill-one-of-two", "signal-two", "suspended", "one-for-two"],
)
def test_a_fault_that_finds_the_run_finished_is_missed(tmp_path, monkeypatch, name):
    end = {"model": {"w": torch.ones(2)}, "iteration": 9}
    monkeypatch.setattr(Run, "command", lambda *_: ["true"])
    monkeypatch.setattr("scripts.chaos.__main__.end_state", lambda _: end)
    for expected, verdict in ((end, "missed"), ({**end, "iteration": 8}, "DIFFERS")):
        found = play(Run(tmp_path, tmp_path, 1), FAULTS[name], random.Random(0), expected)
        assert found.startswith((verdict, "skipped: a machine of another name"))


def test_a_run_that_a_fault_ended_is_not_missed(tmp_path):
    run = Run(tmp_path, tmp_path, 1)
    run.process = run.popen(["sh", "-c", "exit 143"])
    run.end_by(143)
    run.process = run.popen(["sh", "-c", "exit 1"])
    with pytest.raises(Unanswered, match=r"status 1, not \(143, 0\)"):
        run.end_by(143)


def test_the_table_counts_rounds_losses_and_verdicts():
    table = Table()
    for lost, verdict in ((2, "equal"), (5, "equal"), (0, "skipped: no root"), (0, "missed")):
        table.add("kill", lost, verdict)
    assert str(table).splitlines()[-1].split() == ["kill", "4", "7", "(5)", "1", "1", "2"]
    assert not table.wrong
    table.add("label", 0, "DIFFERS in ['model']: x")
    assert table.wrong
