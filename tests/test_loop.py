"""The training loop: metrics, seeds, what the log tells, and how a run stops that cannot go on."""

from __future__ import annotations

import io
import itertools
import math
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import supervised
from tests.helpers import TinyData, make_dataset, run_script
from util.cli import run_main
from util.errors import EXIT_STOPPED, SavePathError, TrainingStopped
from util.log import RunLog
from util.train import clock
from util.train.loop import step_seed
from util.train.step_metrics import StepMetrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path) -> TinyData:
    """Two iterations an epoch for the supervised baseline."""
    data = make_dataset(tmp_path / "data", labeled=4, unlabeled=1, val=1)
    data.configure(epochs=2)
    return data


# --- metrics and seeds


def _metrics(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_metrics_are_means_over_the_steps_since_the_last_reading():
    metrics = StepMetrics()
    for step in range(3):
        metrics.append(step, _metrics(loss=float(step), mask_ratio=0.5))
    assert metrics.read() == {"loss": 1.0, "mask_ratio": 0.5}
    metrics.append(3, _metrics(loss=7.0, mask_ratio=0.25))
    assert metrics.read() == {"loss": 7.0, "mask_ratio": 0.25}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_is_not_finite_is_named_with_its_terms(bad):
    metrics = StepMetrics()
    metrics.append(0, _metrics(loss=1.0, loss_x=1.0, loss_s=1.0))
    metrics.read()
    metrics.append(1, _metrics(loss=1.0, loss_x=1.0, loss_s=1.0))
    metrics.append(2, _metrics(loss=bad, loss_x=1.0, loss_s=bad))
    metrics.append(3, _metrics(loss=math.nan, loss_x=math.nan, loss_s=math.nan))
    with pytest.raises(TrainingStopped) as stopped:
        metrics.read()
    assert f"not finite at iteration 3: loss {bad}, loss_s {bad};" in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_every_step_has_a_seed_of_its_own():
    places = list(itertools.product(range(2), range(3), range(20)))
    seeds = [step_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [step_seed(*place) for place in places]
    drawn = set()
    for seed in seeds:
        torch.manual_seed(seed)
        drawn.add(float(torch.rand((), dtype=torch.float64)))
    assert len(drawn) == len(places)


# --- what the log tells


def test_speed_waiting_and_time_left_follow_from_the_clock(monkeypatch):
    now = iter(float(second) for second in itertools.count())  # every look at the clock takes a second
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    timer = clock.Clock(done=4, total=12)  # at 0
    batches = timer.time_waits("abcd")
    assert [next(batches), next(batches)] == ["a", "b"]  # 1 to 2 and 3 to 4
    # At 5: 6 of 12 iterations are done, 2 of them in these 5 s, of which 2 were waiting; 6 are left at 2.5 s each.
    assert str(timer.lap(6, images=10)) == "4.0 images/s  data 40%  ETA 0:00:15"
    assert list(batches) == ["c", "d"]  # 6 to 7, 8 to 9, and a last look at 10
    # At 11: 2 iterations in 6 s; 4 are left at 11 / 4 s each.
    assert str(timer.lap(8, images=10)) == "3.3 images/s  data 33%  ETA 0:00:11"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_a_bar_and_lines_go_to_the_file_only(tmp_path, monkeypatch, capsys):
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with RunLog(tmp_path, active=True) as log, log.bar(2, "epoch 1/1") as bar:
        bar.update()
        log.progress("iteration 1")
        log.info("epoch 1 is done")
    assert "epoch 1/1" in terminal.getvalue()
    assert capsys.readouterr().out.split("\n") == ["epoch 1 is done", ""]
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["iteration 1", "epoch 1 is done"]


def test_elsewhere_progress_is_plain_lines(tmp_path, capsys):
    with RunLog(tmp_path, active=True) as log, log.bar(2, "epoch 1/1") as bar:
        bar.update()
        log.progress("iteration 1")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("iteration 1\n", "")


def test_the_log_of_another_process_than_the_main_one_is_mute(tmp_path, capsys):
    with RunLog(tmp_path, active=False) as log:
        log.info("text")
        log.progress("text")
        log.scalars({"loss": 1.0}, 0)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_the_log_keeps_the_reason_why_a_run_stopped(tmp_path, capsys):
    with pytest.raises(TrainingStopped), RunLog(tmp_path, active=True):
        raise TrainingStopped("the loss is not finite")
    assert (tmp_path / "train.log").read_text().endswith("  stopped: the loss is not finite\n")
    assert capsys.readouterr() == ("", "")  # the entry script says it there


def test_curves_of_a_continued_run_have_each_point_once(tmp_path):
    """Epoch 1 had the steps 0 and 1 and its evaluation at 1; epoch 2 was interrupted after step 2."""
    with RunLog(tmp_path, active=True) as log:
        for step in range(3):
            log.scalars({"train/loss_all": float(step)}, step)
        log.scalars({"eval/mIoU": 50.0}, 1)
    with RunLog(tmp_path, active=True, first_step=2) as log:
        for step in (2, 3):
            log.scalars({"train/loss_all": 10.0 + step}, step)
        log.scalars({"eval/mIoU": 60.0}, 3)
    curves = EventAccumulator(str(tmp_path)).Reload()
    points = {tag: [(event.step, event.value) for event in curves.Scalars(tag)] for tag in curves.Tags()["scalars"]}
    assert points == {
        "train/loss_all": [(0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0)],
        "eval/mIoU": [(1, 50.0), (3, 60.0)],
    }


@pytest.mark.parametrize("write", ["info", "scalars"])
def test_a_full_disk_is_one_line_for_the_log_and_the_curves_too(tmp_path, write):
    """A limit on the size of files stands in for it."""
    name = "train.log" if write == "info" else "TensorBoard's file"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(SavePathError) as caught, RunLog(tmp_path, active=True) as log:
        log.scalars({"loss": 1.0}, 0)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
            log.info("text") if write == "info" else log.scalars({"loss": 1.0}, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(caught.value) == f"{tmp_path}: {name} cannot be written (File too large); checkpoints are intact"


# --- runs that cannot go on


def _run_and_stop(data: TinyData, save_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a supervised run that stops itself."""
    with pytest.raises(SystemExit) as exited:
        run_main(lambda: supervised.main(data.arguments(save_path)))
    assert exited.value.code == EXIT_STOPPED == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert (save_path / "train.log").read_text().endswith(f"stopped: {line.removeprefix('error: ')}\n")
    return line


def _in_call(number: int, change: Callable[..., object]) -> Callable[..., object]:
    """`supervised_step`, whose call `number` (from 1) ends with `change(model, metrics)`."""
    step, calls = supervised.supervised_step, itertools.count(1)

    def changed(model, *args):
        metrics = step(model, *args)
        if next(calls) == number:
            change(model, metrics)
        return metrics

    return changed


def _assert_good_after_one_epoch(save_path: Path) -> None:
    for name in ("latest.pth", "best.pth"):
        state = torch.load(save_path / name, weights_only=True)
        assert state["epoch"] == 1
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert not list(save_path.glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(data, tmp_path, monkeypatch, capsys):
    broken = _in_call(4, lambda model, metrics: metrics.update(loss_x=torch.tensor(math.nan)))
    monkeypatch.setattr(supervised, "supervised_step", broken)
    line = _run_and_stop(data, tmp_path / "run", capsys)
    assert line.startswith("error: the loss is not finite at iteration 4: loss_x nan; checkpoints of earlier epochs ")
    _assert_good_after_one_epoch(tmp_path / "run")


def test_weights_broken_by_the_last_update_of_an_epoch_are_not_saved(data, tmp_path, monkeypatch, capsys):
    """The losses were finite up to there, but the gradients were not."""

    def break_gradient(model, metrics):
        model.classifier.bias.grad[0] = math.inf

    monkeypatch.setattr(supervised, "supervised_step", _in_call(4, break_gradient))
    line = _run_and_stop(data, tmp_path / "run", capsys)
    assert line.startswith("error: weights are not finite after the last iteration of epoch 2: classifier.bias; ")
    _assert_good_after_one_epoch(tmp_path / "run")


@pytest.mark.slow
def test_a_diverging_script_ends_with_one_line_and_its_status(data, tmp_path):
    result = run_script("supervised.py", *data.arguments(tmp_path / "run"), "--set", "lr=1e30")
    assert result.returncode == EXIT_STOPPED
    assert "error: the loss is not finite at iteration 2: loss nan, loss_x nan; " in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "latest.pth").exists()
