"""util/run.py: what the start of a run decides and says."""

import contextlib
import multiprocessing
import os
import pwd
import shutil

import pytest

from dataset import DataError
from tests.helpers import make_dataset
from util.cli import parse_args
from util.distributed.launch import Processes, find_processes
from util.errors import ConfigError
from util.run import open_run


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path / "data")


def start(data, tmp_path, capsys, *extra, method="unimatch"):
    """Open a run and end it at once: its config and what was printed."""
    arguments = parse_args(method, [*data.arguments(tmp_path / "run"), *extra])
    with open_run(method, arguments) as run:
        return run.cfg, capsys.readouterr().out


@pytest.mark.parametrize(
    ("batch_size", "reference", "expected", "said"),
    [
        (2, 2, 4, "batch size: doubled, as the published supervised baseline does"),
        (2, 8, 4, "batch size: doubled, as the published supervised baseline does"),
        # As the release says to write it by hand.
        (4, 2, 4, "batch size: not doubled, 4 images a step are already twice the recipe's 2"),
    ],
)
def test_a_batch_that_is_doubled_already_is_left_alone(data, tmp_path, capsys, batch_size, reference, expected, said):
    data.configure(batch_size=batch_size, reference_batch=reference)
    cfg, output = start(data, tmp_path, capsys, "--double-batch", method="supervised")
    assert (cfg.batch_size, cfg.reference_batch) == (expected, 2 * reference) and said in output


def test_the_batch_is_counted_over_all_processes_before_it_is_doubled(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("util.run.find_processes", lambda _: Processes(0, 2, 0))
    monkeypatch.setattr("util.run.process_group", lambda *_: contextlib.nullcontext())
    data.configure(batch_size=2, reference_batch=2)
    cfg, output = start(data, tmp_path, capsys, "--double-batch", method="supervised")
    assert cfg.batch_size == 2 and "not doubled, 4 images a step" in output


def test_hidden_images_of_a_list_are_warned_of(data, tmp_path, capsys):
    assert "are hidden" not in start(data, tmp_path, capsys)[1]
    (data.root / "images/.ipynb_checkpoints").mkdir()
    shutil.copy(data.root / "images/val0.jpg", data.root / "images/.ipynb_checkpoints/val0-checkpoint.jpg")
    with open(data.unlabeled, "a", encoding="utf-8") as file:
        file.write("images/.ipynb_checkpoints/val0-checkpoint.jpg\n")
    output = start(data, tmp_path, capsys)[1]
    assert "warning: 1 of 7 unlabelled images are hidden or in a hidden folder, such as images/.ipynb_checkp" in output


def test_a_folder_of_unlabelled_images_is_used_without_what_is_hidden(data, tmp_path, capsys):
    data.configure(unlabeled_id_path="images")
    before = start(data, tmp_path, capsys)[1]
    (data.root / "images/.ipynb_checkpoints").mkdir()
    shutil.copy(data.root / "images/val0.jpg", data.root / "images/.ipynb_checkpoints/val0-checkpoint.jpg")
    (data.root / "images/._val0.jpg").write_bytes(b"\0\5\x16\7")
    os.symlink("..", data.root / "images/up")
    after = start(data, tmp_path, capsys)[1]
    assert "8 unlabelled images" in before and "8 unlabelled images" in after


@pytest.mark.parametrize(("batch_size", "told"), [(1, True), (2, False)])
def test_a_batch_of_one_image_is_warned_of(data, tmp_path, capsys, batch_size, told):
    data.configure(batch_size=batch_size)
    assert ("warning: BatchNorm normalises over 2 images only" in start(data, tmp_path, capsys)[1]) is told


@pytest.mark.parametrize(
    ("variables", "fragment"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' in the environment is no number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT=''"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many'"),
    ],
)
def test_variables_that_are_left_over_are_named(monkeypatch, variables, fragment):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        find_processes()
    assert fragment in str(caught.value) and "unset RANK" in str(caught.value)
    for name in variables:
        monkeypatch.setenv(name, "")  # empty is not set
    assert find_processes() == Processes()


def test_weights_that_a_run_starts_from_are_not_moved_aside_by_it(data, tmp_path, capsys):
    path = tmp_path / "run/epoch-0001.pth"
    path.parent.mkdir()
    path.write_bytes(b"a checkpoint")
    with pytest.raises(
        ConfigError, match=r"init_from \S*weights\.pth: is \S*epoch-0001\.pth, which this run would repl"
    ):
        os.symlink(path, tmp_path / "weights.pth")
        start(data, tmp_path, capsys, "--resume", "never", "--set", f"init_from={tmp_path / 'weights.pth'}")
    assert [entry.name for entry in path.parent.glob("*.pth")] == ["epoch-0001.pth"]


def test_a_config_in_the_save_path_that_was_given_is_left_as_it_was_written(data, tmp_path, capsys):
    path = tmp_path / "run/config.yaml"
    path.parent.mkdir()
    text = "# my notes\n" + data.config.read_text()
    path.write_text(text)
    start(data, tmp_path, capsys, "--config", str(path))
    assert path.read_text() == text
    start(data, tmp_path, capsys)  # another file was given
    assert "nclass: 3" in path.read_text()


def test_without_a_home_and_an_account_a_run_starts_unless_it_needs_a_folder_there(data, tmp_path, capsys, monkeypatch):
    def unknown(_):
        raise KeyError("uid not found")

    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    start(data, tmp_path, capsys)
    with pytest.raises(
        ConfigError, match=r"^cache: disk: there is no home folder for ~/\.cache/unimatch: set cache_dir"
    ):
        start(data, tmp_path, capsys, "--set", "cache=disk")
    start(data, tmp_path, capsys, "--set", "cache=disk", f"cache_dir={tmp_path / 'cache'}")


def test_without_shared_memory_a_run_with_loading_processes_ends_before_it_joins_others(
    data, tmp_path, capsys, monkeypatch
):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(multiprocessing, "Lock", refuse)
    with pytest.raises(
        DataError, match=r"loading processes: they cannot be started: .*Read-only file system; lower workers"
    ):
        start(data, tmp_path, capsys, "--set", "workers=1")
    assert not list(tmp_path.glob("run/*"))
    start(data, tmp_path, capsys, "--set", "workers=0")
