"""PyTorch's process-wide switches: what the config asks for is on, is said, and is off again while evaluating."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import supervised
from tests.helpers import make_dataset, make_model
from util.backends import describe_backends, set_backends, without_benchmark
from util.config import Config
from util.train import loop
from util.trained import Trained

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FUSED = ("flash", "mem_efficient", "cudnn")  # kernels of attention


def _config(**values: object) -> Config:
    common = {"dataset": "tiny", "data_root": "d", "val_id_path": "v", "classes": ("a", "b"), "crop_size": 32}
    return Config(**common, epochs=1, batch_size=2, lr=0.1, backbone="resnet18", **values)


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the switches back as they were."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    fused = _fused_attention()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    for name, enabled in zip(FUSED, fused, strict=True):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)


def _fused_attention() -> list[bool]:
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in FUSED]


def test_by_default_cudnn_chooses_kernels_and_pytorchs_precision_stays(monkeypatch):
    for convolutions, matmuls in ((True, False), (False, True)):
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, matmuls
        set_backends(_config(), CUDA)
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (convolutions, matmuls)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert describe_backends(_config(), CUDA) == [
        "TF32 convolutions off, matmuls on",
        "cudnn.benchmark on while training",
    ]
    assert describe_backends(_config(), CPU) == []


def test_deterministic_fixes_every_choice_and_the_next_run_is_free_again(monkeypatch):
    set_backends(_config(deterministic=True), CUDA)
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert describe_backends(_config(deterministic=True), CUDA)[0] == "deterministic algorithms"
    set_backends(_config(), CUDA)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark


def test_only_deterministic_runs_on_a_gpu_leave_attentions_fused_kernels_out():
    """They add up gradients in any order there unless a missing deterministic kernel is to be an error."""
    before = _fused_attention()
    for cfg, device in ((_config(), CUDA), (_config(deterministic=True), CPU)):
        set_backends(cfg, device)
        assert _fused_attention() == before
    set_backends(_config(deterministic=True), CUDA)
    assert not any(_fused_attention()) and torch.backends.cuda.math_sdp_enabled()
    dpt = _config(deterministic=True, model="dpt")
    assert describe_backends(dpt, CUDA)[:2] == ["deterministic algorithms", "attention by its math kernel"]
    assert describe_backends(dpt, CPU) == ["deterministic algorithms"]


@pytest.mark.parametrize("value", [True, False])
def test_tf32_is_set_for_convolutions_and_matmuls(value):
    set_backends(_config(tf32=value), CUDA)
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is value


def test_cudnn_tries_no_kernels_within_an_evaluation_even_if_that_fails():
    set_backends(_config(), CUDA)
    with pytest.raises(KeyError), without_benchmark():
        assert not torch.backends.cudnn.benchmark
        raise KeyError
    assert torch.backends.cudnn.benchmark


def test_a_trained_model_computes_as_in_training_but_for_cudnns_trials():
    for cfg in (_config(tf32=False), _config(tf32=True, deterministic=True)):
        set_backends(_config(tf32=not cfg.tf32), CUDA)
        trained = Trained(Path("best.pth"), cfg, {}, "model", ())
        trained.ready(make_model(), CPU)
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is cfg.tf32
        assert torch.are_deterministic_algorithms_enabled() is cfg.deterministic
        assert not torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("one_thread")
def test_a_run_trains_with_and_evaluates_without_cudnns_trials(tmp_path: Path, monkeypatch, capsys):
    data = make_dataset(tmp_path / "data", labeled=2, unlabeled=1, val=1)
    seen = []
    for module, name in ((supervised, "supervised_step"), (loop, "evaluate"), (loop.Monitor, "report")):
        original = getattr(module, name)

        def watched(*args, name=name, original=original, **options):
            seen.append((name, torch.backends.cudnn.benchmark))
            return original(*args, **options)

        monkeypatch.setattr(module, name, watched)
    supervised.main(data.arguments(tmp_path / "run"))
    assert seen == [("supervised_step", True), ("evaluate", False), ("report", False)]
    supervised.main([*data.arguments(tmp_path / "again"), "--set", "deterministic=true"])
    assert seen[3:] == [("supervised_step", False), ("evaluate", False), ("report", False)]
    assert "deterministic algorithms" in capsys.readouterr().out
    first, second = (torch.load(tmp_path / name / "latest.pth", weights_only=True) for name in ("run", "again"))
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
