"""util/loggers.py: each logger gets each point once, also of a continued run; wandb and mlflow are small fakes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import supervised
from util.cli import run_main
from util.errors import ConfigError, SavePathError
from util.log import RunLog
from util.loggers import check_loggers

FAKE_WANDB = """
calls = []

class Settings:
    def __init__(self, **given):
        calls.append(("settings", given))

class Image:
    def __init__(self, picture):
        self.size = picture.size

class Run:
    def define_metric(self, name, step_metric=None):
        calls.append(("define", name, step_metric))
    def log(self, values):
        calls.append(("log", values))
    def finish(self, exit_code):
        calls.append(("finish", exit_code))

def init(**given):
    calls.append(("init", given))
    return Run()
"""
FAKE_MLFLOW = """
from types import SimpleNamespace
calls, runs = [], []

def set_experiment(name):
    calls.append(("experiment", name))
def start_run(run_name=None, run_id=None):
    if run_id is None:
        run_id = f"run{len(runs)}"
        runs.append(run_id)
    calls.append(("start", run_id))
    return SimpleNamespace(info=SimpleNamespace(run_id=run_id))
def log_params(values):
    calls.append(("params", values))
def log_metrics(values, step):
    calls.append(("metrics", step, values))
def log_image(picture, name):
    calls.append(("image", name, picture.size))
def end_run(status):
    calls.append(("end", status))
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Modules `wandb` and `mlflow` that note what they are called with."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, text in (("wandb", FAKE_WANDB), ("mlflow", FAKE_MLFLOW)):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    yield lambda name: sys.modules[name].calls
    for name in ("wandb", "mlflow"):
        sys.modules.pop(name, None)


@pytest.fixture
def save(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def interrupted_run(save: Path, *loggers: str) -> None:
    """Points at the steps 0 to 4, of which 2 and 3 were written twice: a kill came after 3, the checkpoint before 2.

    Twice the log tells more at step 3: the evaluation, at which the run was killed the first time.
    """
    told = {"lr": 0.1, "classes": ("a", "b")}
    with RunLog(save, True, 0, loggers, told) as log:
        for step in range(4):
            log.scalars({"train/loss_all": step / 3}, step)
        log.pictures({"views/train": Image.new("RGB", (8, 4), "red")}, 1)
    with RunLog(save, True, 2, loggers, told) as log:
        for step in (2, 3, 4):
            log.scalars({"train/loss_all": step / 3}, step)
            if step == 3:
                log.scalars({"eval/mIoU": 50.0}, step)
        log.pictures({"views/train": Image.new("RGB", (8, 4), "blue")}, 3)
        log.finish()


def test_a_csv_file_has_each_point_of_a_continued_run_once(save):
    interrupted_run(save, "csv")
    points = [(0, "train/loss_all", 0), (1, "train/loss_all", 1 / 3), (2, "train/loss_all", 2 / 3)]
    points += [(3, "train/loss_all", 1), (3, "eval/mIoU", 50), (4, "train/loss_all", 4 / 3)]
    lines = [f"{step},{name},{float(value)!r}" for step, name, value in points]
    assert (save / "metrics.csv").read_text() == "\n".join(["step,name,value", *lines, ""])


def test_a_csv_line_that_a_kill_cut_short_is_not_kept(save):
    (save / "metrics.csv").write_text('step,name,value\n0,"a,b",1.0\n1,"a,b",2.0\n1,a')
    with RunLog(save, True, 2, ("csv",)) as log:
        log.scalars({"a,b": 3.0}, 2)
    assert (save / "metrics.csv").read_text() == 'step,name,value\n0,"a,b",1.0\n1,"a,b",2.0\n2,"a,b",3.0\n'


def test_a_csv_file_of_somebody_else_is_left_alone(save):
    (save / "metrics.csv").write_text("mine\n")
    with pytest.raises(SavePathError, match="no run wrote it"):
        RunLog(save, True, 0, ("csv",))
    assert (save / "metrics.csv").read_text() == "mine\n"


def test_tensorboard_has_pictures_curves_and_hyperparameters_once(save):
    interrupted_run(save, "tensorboard")
    events = EventAccumulator(str(save), size_guidance={"images": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss_all")] == [
        (step, pytest.approx(step / 3)) for step in range(5)
    ]
    pictures = events.Images("views/train")
    assert [(event.step, event.width, event.height) for event in pictures] == [(1, 8, 4), (3, 8, 4)]
    data = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    hparams = data.session_start_info.hparams
    assert hparams["lr"].number_value == 0.1 and hparams["classes"].string_value == "('a', 'b')"
    data = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    assert [info.name.tag for info in data.experiment.metric_infos] == ["eval/best_mIoU", "eval/mIoU"]
    assert "_hparams_/session_end_info" in events.summary_metadata


def test_wandb_goes_on_with_its_run_and_gets_what_it_has_not(save, fakes):
    interrupted_run(save, "wandb")
    calls = fakes("wandb")
    starts = [given for kind, *rest in calls if kind == "init" for given in rest]
    assert len(starts) == 2 and starts[0]["id"] == starts[1]["id"] and starts[1]["resume"] == "allow"
    assert starts[0]["project"] == "unimatch" and starts[0]["config"] == {"lr": 0.1, "classes": "('a', 'b')"}
    logged = [call[1] for call in calls if call[0] == "log"]
    assert [(row["step"], *(key for key in row if key != "step")) for row in logged] == [
        (0, "train/loss_all"), (1, "train/loss_all"), (2, "train/loss_all"), (3, "train/loss_all"), (1, "views/train"),
        (3, "eval/mIoU"), (4, "train/loss_all"), (3, "views/train"),
    ]  # fmt: skip
    assert ("define", "*", "step") in calls and calls[-1] == ("finish", 0)


def test_mlflow_goes_on_with_its_run_and_gets_what_it_has_not(save, fakes):
    interrupted_run(save, "mlflow")
    calls = fakes("mlflow")
    assert [call for call in calls if call[0] in ("experiment", "start", "params", "end")] == [
        ("experiment", "unimatch"), ("start", "run0"), ("params", {"lr": 0.1, "classes": "('a', 'b')"}),
        ("end", "FINISHED"), ("start", "run0"), ("end", "FINISHED"),
    ]  # fmt: skip
    steps = [(call[1], *call[2]) for call in calls if call[0] == "metrics"]
    assert steps == [*((step, "train/loss_all") for step in range(4)), (3, "eval/mIoU"), (4, "train/loss_all")]
    pictures = [call[1:] for call in calls if call[0] == "image"]
    assert pictures == [("views/train/00000001.png", (8, 4)), ("views/train/00000003.png", (8, 4))]


def test_mlflow_gets_names_that_it_takes(save, fakes):
    with RunLog(save, True, 0, ("mlflow",)) as log:
        log.scalars({"eval/a,(b)//c_IoU": 1.0}, 0)
    assert ("metrics", 0, {"eval/a__b_/c_IoU": 1.0}) in fakes("mlflow")


def test_a_server_that_fails_is_told_once_and_training_goes_on(save, fakes, monkeypatch, capsys):
    with RunLog(save, True, 0, ("mlflow", "csv")) as log:
        monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", lambda *_, **__: 1 / 0)
        for step in range(3):
            log.scalars({"a": 1.0}, step)
    assert capsys.readouterr().out == "warning: mlflow: division by zero: this run sends nothing more there\n"
    assert (save / "metrics.csv").read_text().count("\n") == 4


def test_a_server_that_cannot_be_reached_is_one_line_at_the_start(save, fakes, monkeypatch):
    check_loggers(["wandb"])

    def refuse(**_):
        raise OSError("no route\nto host")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ConfigError, match=r"^logger: wandb: cannot start: no route to host; or leave wandb out"):
        RunLog(save, True, 0, ("wandb",))


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_package_is_one_line_before_anything_starts(data, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    data.configure(logger=["csv", name])
    with pytest.raises(SystemExit) as end:
        run_main(lambda: supervised.main(data.arguments(tmp_path / "run")))
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == (
        f"error: logger: {name}: the package {name} is not installed: pip install {name}, or leave {name} out of "
        "`logger`\n"
    )


def test_nothing_is_imported_that_nobody_asked_for(save, monkeypatch):
    for name in ("wandb", "mlflow", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    check_loggers(["csv"])
    with RunLog(save, True, 0, ("csv",)) as log:
        log.scalars({"a": 1.0}, 0)
    with RunLog(save, True, 0, ()) as log:
        assert not log.has_loggers
        log.scalars({"a": 1.0}, 0)
    assert sorted(path.name for path in save.iterdir()) == ["metrics.csv", "train.log"]
