"""scripts/benchmark.py: the whole of it on tiny images; what it compares must be equal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from scripts.benchmark import __main__ as benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    """Small images, crops, losses and a small model, so that a run takes seconds."""
    for name, size in (("PASCAL", (60, 48)), ("CITYSCAPES", (80, 40))):
        monkeypatch.setattr(benchmark, name, replace(getattr(benchmark, name), size=size, count=4, crop=32))
    monkeypatch.setattr(benchmark, "BACKBONE", "resnet18")
    monkeypatch.setattr(benchmark, "CROP", 33)
    monkeypatch.setattr(benchmark, "LOSS_SIZE", 81)


def test_every_group_is_measured_and_what_must_be_equal_is(tiny, tmp_path, capsys):
    benchmark.main(["all", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["name"]: row for row in figures["rows"]}
    out = capsys.readouterr().out
    assert all(name in out for name in rows) and len(rows) > 25
    assert not [row for row in rows.values() if "NOT EQUAL" in row["equality"]]
    for row in rows.values():
        assert min(row["plain"] + row["ours"]) > 0 and row["ratio"] > 0
        assert len(row["plain"]) == len(row["ours"]) == (1 if row["unit"] in ("MB", "GB") else 2)
    labeled = rows["labelled sample, pascal"]["equality"]
    assert labeled == "labels equal, 0.00% of pixels off by <= 0"  # such small pictures are resized whole
    assert rows["UniMatch's unlabelled sample, pascal, as it is sent"]["ratio"] > 3
    assert float(rows["UniMatch step, resnet18, crop 33, float32"]["equality"].split(" by ")[1].split()[0]) < 1e-10


def test_a_comparison_that_fails_is_told(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "confusion_matrix", lambda guess, truth, nclass: benchmark.torch.ones(19, 19))
    rows = list(benchmark.measure_loss(tmp_path, [], 1))
    assert [row.name for row in rows if "NOT EQUAL" in row.equality] == ["confusion matrix, 19 classes, 1024 x 2048"]


def test_an_unknown_group_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["speed"])
    assert "speed" in capsys.readouterr().err
