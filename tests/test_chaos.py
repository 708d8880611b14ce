"""A short round of what `python -m scripts.chaos` does at length: real runs, real faults, ends equal to the bit."""

from __future__ import annotations

import pytest

from scripts.chaos import __main__ as chaos
from tests.helpers import run_script


def test_runs_that_were_harmed_end_as_one_that_was_not():
    faults = ["kill-in-save", "damage"]
    result = run_script("-m", "scripts.chaos", "--rounds", "2", "--faults", *faults)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [(name, "1", "1") for name in faults]


def test_a_difference_is_found_wherever_it_is():
    state = {"model": {"w": [1.0, 2.0]}, "losses": {("1", "2"): "loss 0.5"}}
    assert chaos.difference(state, {"model": {"w": [1.0, 2.0]}, "losses": {("1", "2"): "loss 0.5"}}) is None
    assert chaos.difference(state, {"model": {"w": [1.0, 2.5]}, "losses": {}}) == "['model']['w'][1]"
    assert chaos.difference(state, {**state, "losses": {}}) == "['losses'] keys"
    assert chaos.difference([1], [1, 2]) == " length" and chaos.difference(1, 1.0) == ""


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="--faults flood: there are kill, "):
        chaos.main(["--faults", "flood"])
