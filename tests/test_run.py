"""util/run.py: what the start of a run decides and says."""

import contextlib
import multiprocessing
import os
import pwd
import shutil

import pytest
import yaml
from PIL import Image

from dataset import DataError
from tests.helpers import PROJECT_ROOT, make_dataset
from util.cli import parse_args, run_main
from util.distributed.launch import Processes, choose_device, find_processes, process_alone
from util.errors import ConfigError
from util.outputs import save_picture
from util.run import open_run


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
    monkeypatch.setattr("util.run.process_group", lambda *arguments: contextlib.nullcontext(arguments[-1]()))
    data.configure(batch_size=2, reference_batch=2)
    cfg, output = start(data, tmp_path, capsys, "--double-batch", method="supervised")
    assert cfg.batch_size == 2 and "not doubled, 4 images a step" in output


def test_the_file_of_unimatch_v2_s_release_is_doubled_on_its_four_processes(tmp_path, capsys, monkeypatch):
    data = make_dataset(tmp_path / "data", labeled=32)
    monkeypatch.setattr("util.run.find_processes", lambda _: Processes(0, 4, 0))
    monkeypatch.setattr("util.run.process_group", lambda *arguments: contextlib.nullcontext(arguments[-1]()))
    release = yaml.safe_load((PROJECT_ROOT / "tests/reference/release_configs/v2_pascal.yaml").read_text())
    kept = {key: value for key, value in data.settings().items() if key in ("data_root", "val_id_path", "pretrained")}
    data.config.write_text(yaml.safe_dump({**release, **kept, "scale_lr": True, "workers": 0, "device": "cpu"}))
    cfg, output = start(data, tmp_path, capsys, "--double-batch", method="supervised")
    assert (cfg.batch_size, cfg.reference_batch) == (8, 32)
    assert "32 labelled images a step (8 x 4); the recipe's reference is 32 labelled; lr 5e-06 (" in output


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
    for further in ([], ["--resume", "never"]):
        start(data, tmp_path, capsys, "--config", str(path), *further)
        assert path.read_text() == text
    assert (path.parent / "previous-1/config.yaml").read_text() == text
    with pytest.raises(ConfigError, match=r"config\.yaml exists there, and no run wrote it"):
        start(data, tmp_path, capsys)  # another file was given
    start(data, tmp_path, capsys, "--resume", "never")
    assert "nclass: 3" in path.read_text() and (path.parent / "previous-2/config.yaml").read_text() == text


STRANGERS = {
    "config.yaml": "dataset: mine\nclasses: [a, b]\nseed: 3\n",
    "train.log": "2026-01-02 10:00:00,123 INFO another program's\n",
    "run.json": '{"name": "mine"}',
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_file_in_the_save_path_is_not_replaced(data, tmp_path, capsys, name):
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.write_text(STRANGERS[name])
    with pytest.raises(ConfigError, match=rf"{name} exists there, and no run wrote it: choose another, or have it"):
        start(data, tmp_path, capsys)
    assert path.read_text() == STRANGERS[name]
    assert "earlier results were moved to" in start(data, tmp_path, capsys, "--resume", "never")[1]
    assert (path.parent / "previous-1" / name).read_text() == STRANGERS[name]


@pytest.mark.parametrize("gone", ["run.json", "train.log", "nothing"])
def test_a_folder_in_which_a_run_began_is_begun_in_again_also_one_of_an_older_version(data, tmp_path, capsys, gone):
    start(data, tmp_path, capsys)
    (tmp_path / "run" / gone).unlink(missing_ok=True)
    (tmp_path / "run/train.log").touch()
    data.configure(lr=0.5)
    start(data, tmp_path, capsys)
    assert "lr: 0.5" in (tmp_path / "run/config.yaml").read_text()


def test_a_config_that_is_a_link_to_a_file_of_the_run_is_not_written_to(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    os.link(data.config, tmp_path / "run/train.log")
    with pytest.raises(ConfigError, match=r"^--config \S*: is \S*run/train\.log, which this run would replace"):
        start(data, tmp_path, capsys)


def test_what_is_left_out_of_a_folder_of_unlabelled_images_is_counted(data, tmp_path, capsys):
    data.configure(unlabeled_id_path="images")
    (data.root / "images/notes.txt").write_text("mine")
    save_picture(Image.new("RGB", (40, 32)), data.root / "images/out/val0.png")
    output = start(data, tmp_path, capsys)[1]
    assert "8 unlabelled images" in output.replace("6 unlabelled", "?")
    assert "note: other files in images were left out: 1, such as images/notes.txt" in output
    assert "note: predictions by this project in images were left out: 1, such as images/out/val0.png" in output


@pytest.mark.parametrize(
    "variables", [{"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, {"SLURM_STEP_NUM_TASKS": "2"}]
)
def test_a_tool_of_one_process_is_refused_where_several_would_write_the_same_files(monkeypatch, variables):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert process_alone("predict") == Processes()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^predict is one process, and the environment names 2: .*unset RANK"):
        process_alone("predict")


def test_srun_without_a_port_and_a_gpu_too_few_tell_of_variables_that_may_be_left_over(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("MASTER_ADDR", "h")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"--port is needed under srun.*unset RANK"):
        find_processes()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"process 2 on this machine has no GPU: there are 1 .*unset RANK"):
        choose_device("auto", Processes(1, 2, 1))


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_a_rank_that_is_left_over_alone_neither_delays_an_error_nor_renames_it(monkeypatch, capsys, variable):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))

    def fail():
        raise ConfigError("wrong")

    with pytest.raises(SystemExit):
        run_main(fail)
    assert capsys.readouterr().err == "error: wrong\n"


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
