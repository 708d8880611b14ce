"""Whole training runs on a tiny data set: the real scripts, what they write, and that runs can be repeated."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fixmatch
import supervised
import unimatch
from dataset.lists import read_list
from dataset.loader import LoaderOptions, val_loader
from dataset.source import DataSource
from model import build_model
from tests.helpers import TinyData, load_checkpoint, make_dataset, run_script
from util.cli import run_main
from util.config import for_method, load_config, to_dict
from util.errors import EXIT_USER_ERROR
from util.evaluate import evaluate
from util.schedule import poly_lr

METHODS = {"unimatch": unimatch.main, "fixmatch": fixmatch.main, "supervised": supervised.main}
EPOCHS = 2
ITERATIONS = {"unimatch": 3, "fixmatch": 3, "supervised": 1}  # an epoch; the supervised run doubles its batch to 4 of 4


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyData]:
    root = tmp_path_factory.mktemp("training")
    data = make_dataset(root / "data")
    data.configure(epochs=EPOCHS, conf_thresh=0.4)  # some pseudo-labels count from the start
    yield data
    shutil.rmtree(root)  # checkpoints are large


@pytest.fixture(scope="module")
def runs(data: TinyData) -> dict[str, Path]:
    """The save path of a run of each method as a script of its own."""
    paths = {method: data.root.parent / method for method in METHODS}
    for method, path in paths.items():
        extra = ["--double-batch"] if method == "supervised" else []
        result = run_script(f"{method}.py", *data.arguments(path), *extra)
        assert result.returncode == 0, result.stderr
        assert "finished: mIoU" in result.stdout
    return paths


def _train(method: str, data: TinyData, name: str, *arguments: str) -> Path:
    """The save path of a run in this process."""
    path = data.root.parent / name
    METHODS[method]([*data.arguments(path), *arguments])
    return path


def _equal(first: Any, second: Any) -> bool:
    """Whether nested containers are equal, tensors bit for bit."""
    if isinstance(first, dict):
        return list(first) == list(second) and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(path)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _learning_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that do not depend on the machine."""
    machine = ("machine/", "eval/memory_gb")
    return {tag: values for tag, values in _curves(path).items() if not tag.startswith(machine)}


def _config(data: TinyData, method: str):
    # The doubled batch is in the config, with the reference that makes the recipe's rate the right one.
    changes = ["batch_size=4", "reference_batch=16"] if method == "supervised" else []
    return for_method(load_config(data.config, changes), method)


# --- what a run leaves behind


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_checkpoints_log_config_and_curves(data, runs, method):
    names = sorted(re.sub(r"tfevents\..*", "tfevents", path.name) for path in runs[method].iterdir())
    events, *others = sorted(names, key=lambda name: name != "events.out.tfevents")
    assert [events, *others] == [
        "events.out.tfevents", "best.pth", "config.yaml", "latest.pth", "previous.pth", "run.json", "train.log",
    ]  # fmt: skip
    assert load_config(runs[method] / "config.yaml") == _config(data, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_plain_and_complete(data, runs, method):
    state = load_checkpoint(runs[method])
    assert {"model", "optimizer", "epoch", "iteration", "previous_best", "config"} <= set(state)
    assert (state["epoch"], state["iteration"]) == (EPOCHS, EPOCHS * ITERATIONS[method])
    assert state["config"] == to_dict(_config(data, method))
    model = build_model(_config(data, method))
    assert list(state["model"]) == list(model.state_dict())
    assert state["optimizer"]["state"].keys() == set(range(len(list(model.parameters()))))


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_was_trained_and_is_finite(data, runs, method):
    torch.manual_seed(0)  # the seed of the run: its weights at the start
    start = build_model(_config(data, method)).state_dict()
    for name, tensor in load_checkpoint(runs[method])["model"].items():
        assert tensor.isfinite().all(), name
        assert not torch.equal(tensor, start[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_the_best_checkpoint_has_the_miou_that_was_told(data, runs, method):
    cfg = _config(data, method)
    model = build_model(cfg)
    model.load_state_dict(load_checkpoint(runs[method], "best.pth")["model"])
    loader = val_loader(read_list(data.val), DataSource(data.root), LoaderOptions())
    result = evaluate(model, loader, cfg.eval_mode, cfg.crop_size, cfg.nclass, "cpu")
    best = load_checkpoint(runs[method])["previous_best"]
    assert result.miou == best
    log = (runs[method] / "train.log").read_text()
    assert re.search(rf"finished: mIoU [\d.]+ at the last epoch, best {best:.2f} at epoch \d", log)
    assert max(value for _, value in _curves(runs[method])["eval/mIoU"]) == pytest.approx(best)


@pytest.mark.parametrize("method", METHODS)
def test_the_log_has_each_iteration_and_each_class(runs, method):
    lines = (runs[method] / "train.log").read_text().splitlines()
    steps = [line for line in lines if re.search(r"epoch \d/2  iteration \d/\d  loss \d", line)]
    assert len(steps) == EPOCHS * ITERATIONS[method]
    for line in steps:
        assert re.search(r"images/s  data \d+%  ETA \d:\d\d:\d\d$", line)
        assert ("mask_ratio" in line) == (method != "supervised")
    tables = "\n".join(lines)
    for name in ("class 0", "class 1", "class 2", "mIoU"):
        assert len(re.findall(rf"^  {name} +(\d+\.\d\d|absent)$", tables, re.MULTILINE)) == EPOCHS
    assert len(re.findall(r"peak memory \d+\.\d\d GB", tables)) == EPOCHS


@pytest.mark.parametrize("method", METHODS)
def test_the_curves_have_the_names_of_the_release(runs, method):
    own = {"unimatch": {"loss_s", "loss_w_fp", "mask_ratio"}, "fixmatch": {"loss_s", "mask_ratio"}, "supervised": set()}
    curves = _curves(runs[method])
    assert {tag for tag in curves if tag.startswith("train/")} == {
        f"train/{name}" for name in {"loss_all", "loss_x", "lr", "lr_head"} | own[method]
    }
    total = EPOCHS * ITERATIONS[method]
    for tag, points in curves.items():
        if tag.startswith("train/"):
            assert [step for step, _ in points] == list(range(total))
    assert [step + 1 for step, _ in curves["eval/mIoU"]] == [ITERATIONS[method] * epoch for epoch in (1, 2)]
    assert sum(tag.startswith("eval/class") for tag in curves) == 3
    assert {f"machine/{name}" for name in ("images_per_second", "data_wait", "memory_gb")} < set(curves)
    assert [value for _, value in curves["eval/best_mIoU"]] == list(
        itertools.accumulate((value for _, value in curves["eval/mIoU"]), max)
    )
    assert sum(
        value for tag, ((_, value), *_) in curves.items() if tag.startswith("predicted_share/")
    ) == pytest.approx(1)
    assert [lr for _, lr in curves["train/lr"]] == pytest.approx([poly_lr(0.001, i, total) for i in range(total)])


def test_a_run_may_evaluate_and_save_less_often(data):
    """After each second epoch, and after the last."""
    path = _train("supervised", data, "interval", "--set", "epochs=3", "eval_interval=2")
    assert [step + 1 for step, _ in _curves(path)["eval/mIoU"]] == [4, 6]
    assert load_checkpoint(path)["epoch"] == 3


def test_the_loss_is_the_weighted_sum_of_its_terms(runs):
    curves = {tag: [value for _, value in points] for tag, points in _curves(runs["unimatch"]).items()}
    terms = zip(*(curves[f"train/{name}"] for name in ("loss_x", "loss_s", "loss_w_fp")), strict=True)
    assert curves["train/loss_all"] == pytest.approx([(x + 0.5 * s + 0.5 * fp) / 2 for x, s, fp in terms], rel=1e-5)
    assert min(curves["train/loss_s"]) > 0 and min(curves["train/loss_w_fp"]) > 0


def test_training_learns(data, tmp_path):
    """Forty iterations on the tiny set, whose classes are colours."""
    many = tmp_path / "labeled.txt"
    many.write_text(data.labeled.read_text() * 20)
    argv = ["--config", str(data.config), "--labeled-id-path", str(many), "--save-path", str(tmp_path / "run")]
    supervised.main([*argv, "--set", "epochs=1", "lr=0.02"])
    losses = [value for _, value in _curves(tmp_path / "run")["train/loss_all"]]
    assert len(losses) == 40
    assert sum(losses[-20:]) / 20 < 0.8 * sum(losses[:5]) / 5
    assert load_checkpoint(tmp_path / "run")["previous_best"] > 50
    shutil.rmtree(tmp_path / "run")


# --- repeating a run


@pytest.mark.parametrize(
    "options",
    [
        "workers=2 prefetch=1 persistent_workers=false cache=disk",
        "workers=1 checkpoint_activations=all",
    ],
)
def test_a_run_with_the_same_seed_is_the_same_to_the_bit_with_every_option_that_promises_it(data, runs, options):
    """The run to compare with was another process, without workers."""
    cache = f"cache_dir={data.root.parent / 'cache'}"
    again = _train("unimatch", data, options.split()[0].replace("=", ""), "--set", cache, *options.split())
    first, second = load_checkpoint(runs["unimatch"]), load_checkpoint(again)
    for key in ("model", "optimizer", "previous_best"):
        assert _equal(first[key], second[key]), key
    assert _learning_curves(again) == _learning_curves(runs["unimatch"])


def test_another_seed_gives_another_run(data, runs):
    other = _train("fixmatch", data, "seed1", "--set", "seed=1")
    first, second = _curves(runs["fixmatch"])["train/loss_x"], _curves(other)["train/loss_x"]
    assert len(first) == len(second) and not any(a == b for a, b in zip(first, second, strict=True))


# --- batch and learning rate


def _header(path: Path) -> str:
    """What the log says of batch and rate."""
    return next(line for line in (path / "train.log").read_text().splitlines() if "  batch: " in line)


def test_the_log_tells_batch_reference_and_the_rate_of_the_linear_rule(runs):
    header = _header(runs["unimatch"])
    assert "batch: 2 labelled + 2 unlabelled images a step (2 x 1); the recipe's reference is 8 labelled" in header
    assert "lr 0.001 (the linear rule would give 0.00025: scale_lr: true applies it)" in header


def test_scale_lr_applies_the_linear_rule(data):
    path = _train("supervised", data, "scaled", "--set", "scale_lr=true", "epochs=1", "lr_multi=10")
    assert "lr 0.00025 (scaled by the linear rule from 0.001), head x 10" in _header(path)
    assert _curves(path)["train/lr"][0][1] == pytest.approx(0.00025)
    rates = [group["base_lr"] for group in load_checkpoint(path)["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.00025, 0.0025])


def test_double_batch_doubles_the_batch_and_says_so(runs):
    header = _header(runs["supervised"])
    assert "batch: 4 labelled images a step (4 x 1); the recipe's reference is 16 labelled; lr 0.001 " in header
    assert (
        "batch size: doubled, as the published supervised baseline does"
        in (runs["supervised"] / "train.log").read_text()
    )


def test_double_batch_leaves_a_batch_that_was_asked_for(data):
    path = _train("supervised", data, "asked", "--double-batch", "--set", "batch_size=3", "epochs=1")
    assert "batch: 3 labelled images a step (3 x 1); the recipe's reference is 8 labelled" in _header(path)
    log = (path / "train.log").read_text()
    assert "batch size: as --set says, not doubled" in log and "doubled, as the published" not in log


def test_unimatch_trains_with_one_image_and_a_partner_of_another_image(data):
    path = _train(
        "unimatch", data, "one", "--set", "batch_size=1", "cutmix_partner=other_image", "epochs=1", "log_interval=2"
    )
    assert load_checkpoint(path)["iteration"] == 6
    curves = _curves(path)
    assert [step for step, _ in curves["train/loss_all"]] == [1, 3, 5]  # means over two iterations
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)


@pytest.mark.parametrize("method", ["fixmatch", "supervised"])
def test_a_batch_norm_group_of_one_image_is_refused(data, method, capsys):
    line = _refused(METHODS[method], [*data.arguments(data.root.parent / "no"), "--set", "batch_size=1"], capsys)
    assert line.startswith(f"error: batch_size 1 on 1 process gives {method} a BatchNorm group of 1 image")
    assert not (data.root.parent / "no").exists()


def _refused(main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exited:
        run_main(lambda: main(argv))
    assert exited.value.code == EXIT_USER_ERROR == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- several processes


def test_two_processes_train_and_their_checkpoint_is_as_of_one(data, runs):
    path = data.root.parent / "two"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2")
    overrides = ("--set", "batch_size=1", "epochs=1")
    result = run_script(*launcher, "unimatch.py", *data.arguments(path), *overrides)
    assert result.returncode == 0, result.stderr
    # As one process with two images: the same images in each step and BatchNorm over both; dropout differs.
    assert "batch: 2 labelled + 2 unlabelled images a step (1 x 2)" in _header(path)
    assert "2 processes on cpu" in result.stdout
    assert result.stdout.count("finished: mIoU") == 1
    state = load_checkpoint(path)
    assert list(state["model"]) == list(load_checkpoint(runs["unimatch"])["model"])
    assert state["iteration"] == ITERATIONS["unimatch"]
    start = {tag: points[0][1] for tag, points in _curves(path).items()}
    expected = {tag: points[0][1] for tag, points in _curves(runs["unimatch"]).items()}
    assert start["train/mask_ratio"] == pytest.approx(expected["train/mask_ratio"], rel=0.2)
    assert start["train/loss_x"] == pytest.approx(expected["train/loss_x"], rel=0.2)
