"""scripts/benchmark: the whole of it on tiny images; what it compares must be equal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import loss, step, step_v2
from scripts.benchmark.inputs import CITYSCAPES, PASCAL, Inputs
from scripts.benchmark.memory import peak_memory

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_inputs(root: Path, rounds: int) -> Inputs:
    """Small images, crops, losses and a small model, so that a run takes seconds."""
    sizes = ((PASCAL, (60, 48)), (CITYSCAPES, (80, 40)))
    kinds = [replace(kind, size=size, count=4, crop=32).write(root) for kind, size in sizes]
    return Inputs(root, kinds, rounds, backbone="resnet10", crop=33, crop_v2=42, loss_size=81)


def one_step(prepare, *arguments) -> float:
    """Stands for peak_memory, whose processes take seconds to start."""
    _, take_step = prepare(*arguments)
    take_step()
    return 1.0


@pytest.mark.slow
def test_every_group_is_measured_and_what_must_be_equal_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "write_inputs", tiny_inputs)
    for module in (step, step_v2):
        monkeypatch.setattr(module, "peak_memory", one_step)
    benchmark.main(["all", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["name"]: row for row in figures["rows"]}
    out = capsys.readouterr().out
    assert all(name in out for name in rows) and len(rows) > 25
    assert not [row for row in rows.values() if "NOT EQUAL" in row["equality"]]
    for row in rows.values():
        assert min(row["naive"] + row["ours"]) > 0 and row["ratio"] > 0
        assert len(row["naive"]) == len(row["ours"]) == (1 if row["unit"] in ("MB", "GB") else 2)
    labeled = rows["labelled sample, pascal"]["equality"]
    assert labeled == "labels equal, 0.00% of pixels off by <= 0"  # such small pictures are resized whole
    assert rows["UniMatch's unlabelled sample, pascal, as it is sent"]["ratio"] > 3
    for name in ("UniMatch step, resnet10, crop 33, float32", "UniMatch V2 step, dinov2_small, crop 42, float32"):
        assert float(rows[name]["equality"].split(" by ")[1].split()[0]) < 1e-10


@pytest.mark.slow
def test_peak_memory_is_that_of_a_step_in_a_process_of_its_own():
    small, large = (peak_memory(step.prepare_step, "float32", "resnet10", crop) for crop in (65, 193))
    assert 0.005 < 3 * small < large < 1  # GB; nine times the pixels


def test_a_comparison_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "confusion_matrix", lambda guess, truth, nclass: torch.ones(19, 19))
    rows = list(loss.measure_loss(tiny_inputs(tmp_path, 1)))
    assert [row.name for row in rows if "NOT EQUAL" in row.equality] == ["confusion matrix, 19 classes, 1024 x 2048"]


def test_an_unknown_group_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["speed"])
    assert "speed" in capsys.readouterr().err
