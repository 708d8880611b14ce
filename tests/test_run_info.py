"""util/run_info.py: how a run was started is kept, and what heads it in the loggers is plain."""

from __future__ import annotations

import os

import pytest
import torch

from util.config import load_config
from util.run_info import hyperparameters, is_started_again, launch, read_info, write_info

CPU = torch.device("cpu")


def test_what_was_written_is_read_with_the_versions(tmp_path):
    write_info(tmp_path, {"method": "unimatch", "unlabeled_id_path": None}, CPU)
    values = read_info(tmp_path)
    assert values["method"] == "unimatch" and values["unlabeled_id_path"] is None
    assert values["torch"] and values["machine"]
    write_info(tmp_path, {"method": "fixmatch"}, CPU)
    assert read_info(tmp_path)["method"] == "fixmatch"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(("device", "machine"), [("cpu", " CPU, "), ("cuda:1", "GPU 1 x 2")])
def test_the_machine_is_the_device_in_use(tmp_path, monkeypatch, device, machine):
    """On a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda device=None: f"GPU {torch.device(device or 'cuda').index}"
    )
    write_info(tmp_path, {}, torch.device(device))
    values = read_info(tmp_path)
    assert machine in values["machine"] and values["device"] == device.partition(":")[0]


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff{"])
def test_a_file_that_is_missing_or_of_somebody_else_says_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    assert read_info(tmp_path) == {}


def test_a_launcher_is_known_again_after_a_restart(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert launch() is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = launch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch() == first and str(os.getppid()) in first
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert launch() == "job 77"


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_run_is_started_again_where_its_own_launcher_counts_a_restart(tmp_path, monkeypatch, name):
    for variable in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    assert not is_started_again(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_info(tmp_path, {"launch": launch()}, torch.device("cpu"))
    assert not is_started_again(tmp_path)  # a second run in the same job
    monkeypatch.setenv(name, "0")
    assert not is_started_again(tmp_path)
    monkeypatch.setenv(name, "2")
    assert is_started_again(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert not is_started_again(tmp_path)


def test_hyperparameters_are_the_config_without_long_lists(data):
    values = hyperparameters("unimatch", load_config(data.config), 4, 0.5)
    assert (values["method"], values["processes"], values["scaled_lr"]) == ("unimatch", 4, 0.5)
    assert values["criterion"] == "CELoss" and values["crop_size"] == 32
    assert not {"classes", "palette", "label_map"} & set(values)
