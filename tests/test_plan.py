"""scripts/plan.py: every method's step without values, against measured memory, and what it prints."""

from dataclasses import replace

import pytest
import torch

import supervised
from scripts import plan
from scripts.benchmark.memory import peak_memory
from scripts.benchmark.step import prepare_step
from util.config import for_method, load_config
from util.errors import ConfigError

TINY = {
    "deeplabv3plus": ["backbone=resnet10", "crop_size=33"],
    "dpt": ["model=dpt", "backbone=dinov2_small", "crop_size=28", "cutmix_partner=reversed_batch"],
}


def config(method, model="deeplabv3plus", **changes):
    """The config of a small model on the toy set's recipe."""
    return replace(for_method(load_config("configs/toy.yaml", TINY[model]), method), **changes)


def test_live_bytes_are_those_of_tensors_that_still_exist():
    with plan.LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[10:]
        second = first + 1
        assert live.now == live.most == 8000
        del first
        assert live.now == 8000  # the view holds it
        del view
        assert live.now == 4000 and live.most == 8000
        second.add_(1)
        assert live.now == 4000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unimatch", "fixmatch", "supervised"])
def test_a_step_of_each_method_has_a_cost(method):
    cost = plan.step_cost(config(method), method, count_flops=True)
    assert cost.peak > 0 and cost.flops > 0 and cost.messages > 0
    weights = sum(p.numel() for p in plan.build_model(config(method), pretrained=False).parameters())
    assert 8 * weights <= cost.kept < 8.1 * weights + 10**5  # weights, momentum, running statistics
    stay = plan.step_cost(config(method), method, gradients_stay=True)
    assert cost.peak <= stay.peak <= cost.peak + 4 * weights


def test_a_step_on_images_of_five_channels_has_the_cost_of_their_batch():
    three, five = (plan.step_cost(config("supervised", channels=n), "supervised") for n in (3, 5))
    batch = 4 * 33 * 33 * 4  # bytes of a channel of four images
    assert five.peak >= three.peak + 2 * batch and five.kept > three.kept


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unimatch_v2", "fixmatch"])
def test_dpt_has_a_teacher_and_two_numbers_of_adamw_a_weight(method):
    cfg = config(method, "dpt")
    cost = plan.step_cost(cfg, method)
    weights = sum(p.numel() for p in plan.build_model(cfg, pretrained=False).parameters())
    assert cost.messages == 0 and 0.98 * 16 * weights < cost.kept < 1.02 * 16 * weights


@pytest.mark.slow
def test_the_planned_checkpoint_is_as_large_as_that_of_a_run(data, tmp_path):
    supervised.main(data.arguments(tmp_path / "run"))
    size = (tmp_path / "run/latest.pth").stat().st_size
    cfg = for_method(load_config(data.config, []), "supervised")
    assert plan.step_cost(cfg, "supervised").kept == pytest.approx(size, rel=0.02)


@pytest.mark.slow
def test_the_planned_memory_is_near_the_measured_one():
    measured = peak_memory(prepare_step, "float32", "resnet18", 193)
    keys = ["backbone=resnet18", "crop_size=193", "criterion=CELoss", "batch_size=2"]
    cfg = for_method(load_config("configs/cityscapes.yaml", keys), "unimatch")
    assert plan.step_cost(cfg, "unimatch").peak / 1e9 == pytest.approx(measured, rel=0.05)


def test_the_first_settings_that_fit_are_named():
    rows = [plan.Setting(2, 1, "none", "none", 9.5, "as published"), plan.Setting(1, 2, "all", "none", 4.0, "x")]
    assert list(plan.table(rows, 10))[-1].endswith(
        "--set batch_size=1 accumulate=2 checkpoint_activations=all amp=none"
    )
    assert list(plan.table(rows, 11))[-1].endswith(
        "--set batch_size=2 accumulate=1 checkpoint_activations=none amp=none"
    )
    assert list(plan.table(rows, 4))[-1].startswith("none of these fits 4 GB")
    assert "fits" not in "".join(plan.table(rows, None))


def test_the_plan_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(plan, "settings", lambda *_: iter([plan.Setting(2, 2, "none", "none", 1.0, "as published")]))
    arguments = ["--config", "configs/toy.yaml", "--gpus", "2", "--gpu-memory", "24", "--set", "batch_size=2"]
    plan.main([*arguments, *TINY["deeplabv3plus"]])
    printed = capsys.readouterr().out
    for text in (
        "parameters: ",
        "operations: ",
        "memory: ",
        "checkpoint: ",
        "communication: ",
        "images/s",
        "first that",
    ):
        assert text in printed


@pytest.mark.parametrize("option", [("--gpus", "0"), ("--gpu-memory", "-1"), ("--tflops", "nan")])
def test_impossible_numbers_are_refused_in_one_line(option):
    with pytest.raises(ConfigError, match=f"^{option[0]} .*: must be above 0$"):
        plan.main(["--config", "configs/toy.yaml", *option])
