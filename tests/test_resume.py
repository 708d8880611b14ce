"""A run that was interrupted and started again ends as if nothing had happened; what cannot be continued is said."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fixmatch
import supervised
import unimatch
from dataset.sampler import EpochSampler, Key
from tests.helpers import PROJECT_ROOT, TinyData, assert_same, load_checkpoint, make_dataset, run_script
from util import checkpoint, evaluate
from util.cli import run_main
from util.errors import EXIT_SIGNAL, EXIT_USER_ERROR, CheckpointError, Interrupted
from util.schedule import poly_lr
from util.signals import StopSignals
from util.train import loop, saving

# Two epochs of three iterations.
KILLED_IN_THE_SECOND_EPOCH = """
import os, signal
import unimatch
from util.train import loop
from util.cli import run_main

set_poly_lr = loop.set_poly_lr

def killed_at_iteration_4(optimizer, iteration, total):
    if iteration == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    set_poly_lr(optimizer, iteration, total)

loop.set_poly_lr = killed_at_iteration_4
run_main(unimatch.main)
"""


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyData]:
    root = tmp_path_factory.mktemp("resume")
    data = make_dataset(root / "data")
    data.configure(epochs=2, conf_thresh=0.4, scale_lr=True, reference_batch=2, logger=["tensorboard", "csv"])
    yield data
    shutil.rmtree(root)  # checkpoints are large


@pytest.fixture(scope="module")
def whole(data: TinyData) -> Path:
    """A run that nothing interrupts."""
    path = data.root.parent / "whole"
    unimatch.main(data.arguments(path))
    return path


@pytest.fixture(scope="module")
def killed(data: TinyData) -> Path:
    """The same run as another process, killed in its second epoch."""
    path, script = data.root.parent / "killed", data.root / "killed.py"
    script.write_text(KILLED_IN_THE_SECOND_EPOCH)
    result = run_script(script, *data.arguments(path), env={"PYTHONPATH": str(PROJECT_ROOT)})
    assert result.returncode == -signal.SIGKILL
    assert load_checkpoint(path)["epoch"] == 1
    return path


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the killed run, to continue."""
    path = tmp_path / "run"
    shutil.copytree(killed, path)
    yield path
    shutil.rmtree(path)


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(path)).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {tag: points for tag, points in curves.items() if tag != "eval/memory_gb" and not tag.startswith("machine/")}


def _rows(path: Path) -> list[str]:
    """The lines of the CSV file, of which those about the machine have no values."""
    lines = (path / "metrics.csv").read_text().splitlines()
    return [line if ",machine/" not in line and "memory" not in line else line.rpartition(",")[0] for line in lines]


def _content(path: Path) -> dict[str, tuple[int, int]]:
    """Names, times of writing and sizes of a run's files."""
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.iterdir()}


def _refused(main: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a script that refuses to start."""
    with pytest.raises(SystemExit) as exited:
        run_main(lambda: main(argv))
    assert exited.value.code == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# --- continuing


def test_an_interrupted_run_continues_to_the_same_end_to_the_bit(data, whole, interrupted):
    """Also with other workers and another place of the data, which do not shape training."""
    (interrupted.parent / "moved").symlink_to(data.root)
    unimatch.main([*data.arguments(interrupted), "--set", "workers=1", f"data_root={interrupted.parent / 'moved'}"])
    for name in ("latest.pth", "best.pth"):
        expected, state = load_checkpoint(whole, name), load_checkpoint(interrupted, name)
        del expected["config"], state["config"]
        assert_same(expected, state)
    assert load_checkpoint(interrupted)["config"]["workers"] == 1
    assert not list(interrupted.glob("*.tmp"))


def test_the_curves_of_a_continued_run_are_those_of_one_that_was_not_interrupted(data, whole, interrupted):
    unimatch.main(data.arguments(interrupted))
    assert len(list(interrupted.glob("events.out.tfevents.*"))) == 2
    assert _curves(interrupted) == _curves(whole)
    assert _rows(interrupted) == _rows(whole) and len(_rows(whole)) > 60


def test_a_continued_run_says_where_it_stands_and_keeps_the_log(data, interrupted):
    before = (interrupted / "train.log").read_text()
    unimatch.main(data.arguments(interrupted))
    log = (interrupted / "train.log").read_text()
    assert log.startswith(before)
    assert re.search(
        rf"continuing from {interrupted}/latest.pth: 1 of 2 epochs are done, best mIoU \d+\.\d\d\n",
        log.removeprefix(before),
    )
    assert "epoch 1/2" not in log.removeprefix(before)


def test_a_run_killed_between_writing_its_two_checkpoints_ends_the_same(data, tmp_path, monkeypatch):
    """The best one is written first; the epoch is repeated."""
    supervised.main(data.arguments(tmp_path / "whole"))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "copy_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        supervised.main(data.arguments(tmp_path / "run"))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["best.pth"]
    supervised.main(data.arguments(tmp_path / "run"))
    for name in ("latest.pth", "best.pth"):
        assert_same(load_checkpoint(tmp_path / "whole", name), load_checkpoint(tmp_path / "run", name))
    assert _curves(tmp_path / "run") == _curves(tmp_path / "whole")
    for name in ("run", "whole"):
        shutil.rmtree(tmp_path / name)


def test_a_finished_run_started_again_says_so_and_changes_nothing(data, whole, capsys):
    before = {name: _content(whole)[name] for name in ("latest.pth", "best.pth")}
    state, curves = load_checkpoint(whole), _curves(whole)
    capsys.readouterr()
    unimatch.main(data.arguments(whole))
    assert re.search(r"2 of 2 epochs are done.*\n.*finished: mIoU ", capsys.readouterr().out)
    assert {name: _content(whole)[name] for name in before} == before
    assert_same(load_checkpoint(whole), state)
    assert _curves(whole) == curves


def test_a_run_may_continue_on_another_number_of_processes(data, interrupted):
    """The schedule goes on from the same epoch, and the linear rule follows the new batch."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2")
    result = run_script(*launcher, "unimatch.py", *data.arguments(interrupted))
    assert result.returncode == 0, result.stderr
    assert "an epoch had 3 iterations and has 1 now, since the number of processes changed" in result.stdout
    assert "lr 0.002 (scaled by the linear rule from 0.001)" in result.stdout
    # The second epoch's only iteration is number 1 of 2.
    assert _curves(interrupted)["train/lr"][-1][1] == pytest.approx(poly_lr(0.002, 1, 2))
    state = load_checkpoint(interrupted)
    assert (state["epoch"], state["iteration"]) == (2, 2)
    assert not any(name.startswith("module.") for name in state["model"])


# --- within an epoch


@pytest.fixture(scope="module")
def unread(data: TinyData) -> Iterator[tuple[list[str], Path]]:
    """Arguments of a run that reads its metrics every second of three steps, and its end without interruption."""
    path = data.root.parent / "unread"
    arguments = ["--set", "log_interval=2"]
    unimatch.main([*data.arguments(path), *arguments])
    yield arguments, path
    shutil.rmtree(path)


def _signal_at(monkeypatch: pytest.MonkeyPatch, iteration: int, number: int) -> None:
    """Send this process a signal at the start of a step."""
    set_poly_lr = loop.set_poly_lr

    def hit(optimizer, step, total):
        if step == iteration:
            os.kill(os.getpid(), number)
        set_poly_lr(optimizer, step, total)

    monkeypatch.setattr(loop, "set_poly_lr", hit)


def _losses(path: Path) -> dict[str, str]:
    """Epoch and iteration, with the values logged there; a repeated one has to be the same."""
    found: dict[str, str] = {}
    for line in (path / "train.log").read_text().splitlines():
        if progress := re.search(r"(epoch \S+  iteration \S+)  (.*)  lr ", line):
            assert found.setdefault(progress[1], progress[2]) == progress[2]
    return found


def _keys_read(monkeypatch) -> list[Key]:
    """The keys of the samples that training reads from now on, in this process."""
    keys, order = [], EpochSampler.__iter__
    monkeypatch.setattr(EpochSampler, "__iter__", lambda self: (keys.append(key) or key for key in order(self)))
    return keys


def _assert_same_end(expected: Path, path: Path) -> None:
    for name in ("latest.pth", "best.pth"):
        assert_same(load_checkpoint(expected, name), load_checkpoint(path, name))
    assert _curves(path) == _curves(expected)
    assert _losses(path) == _losses(expected)
    assert not (path / "midway.pth").exists()


@pytest.mark.parametrize(
    ("iteration", "number", "where"),
    [
        (0, signal.SIGTERM, "1/3 of epoch 1"),
        (1, signal.SIGHUP, "2/3 of epoch 1"),
        (2, signal.SIGUSR1, "3/3 of epoch 1"),
        (4, signal.SIGINT, "2/3 of epoch 2"),
    ],
)
def test_a_signal_ends_the_run_after_its_step_and_nothing_is_lost(
    data, unread, tmp_path, monkeypatch, capsys, iteration, number, where
):
    arguments, expected = unread
    path = tmp_path / "run"
    _signal_at(monkeypatch, iteration, number)
    with pytest.raises(SystemExit) as exited:
        run_main(lambda: unimatch.main([*data.arguments(path), *arguments]))
    assert exited.value.code == EXIT_SIGNAL + number
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: ended by {signal.Signals(number).name} after iteration {where}, saved in {path}/midway.pth: "
        "the same command continues from there"
    )
    state = load_checkpoint(path, "midway.pth")
    assert (state["iteration"], state["processes"]) == (iteration + 1, 1)
    monkeypatch.undo()
    keys = _keys_read(monkeypatch)
    unimatch.main([*data.arguments(path), *arguments])
    assert len(keys) == 2 * (5 - iteration)  # no image is read again to find the place
    _assert_same_end(expected, path)
    shutil.rmtree(path)


def test_within_an_epoch_half_the_batch_accumulated_twice_goes_on_with_the_same_images(data, tmp_path, monkeypatch):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        _signal_at(patch, 0, signal.SIGTERM)
        with pytest.raises(Interrupted):
            unimatch.main(data.arguments(path))
    with monkeypatch.context() as patch:
        keys = _keys_read(patch)
        unimatch.main([*data.arguments(path), "--set", "batch_size=1", "accumulate=2"])
    sampler = EpochSampler(4, 6, 2, seed=0)
    expected = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch, 2 * (epoch == 0))
        expected += sampler
    assert keys == expected and len(keys) == 10
    assert (load_checkpoint(path)["iteration"], load_checkpoint(path)["epoch"]) == (6, 2)
    assert [step for step, _ in _curves(path)["train/lr"]] == list(range(6))
    shutil.rmtree(path)


def test_a_signal_during_evaluation_ends_it_and_it_is_repeated(data, unread, tmp_path, monkeypatch):
    arguments, expected = unread
    path, seen = tmp_path / "run", []
    class_scores = evaluate.class_scores

    def signalled(*args):
        seen.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return class_scores(*args)

    monkeypatch.setattr(evaluate, "class_scores", signalled)
    written = []
    for _ in range(2):
        with pytest.raises(Interrupted, match=r"after iteration 3/3 of epoch 1"):
            unimatch.main([*data.arguments(path), *arguments])
        written.append((path / "midway.pth").stat().st_mtime_ns)
    assert len(seen) == 2  # one of two images each time
    assert written[0] == written[1]  # no progress, so nothing newer, for which slurm_train.sh would queue again
    monkeypatch.undo()
    unimatch.main([*data.arguments(path), *arguments])
    _assert_same_end(expected, path)
    shutil.rmtree(path)


def test_where_the_first_process_alone_finds_a_checkpoint_the_line_says_what_the_save_path_must_be(
    data, interrupted, monkeypatch
):
    monkeypatch.setattr(saving, "gather", lambda tensor: torch.stack([torch.tensor(3), tensor]))
    monkeypatch.setattr(saving, "read_checkpoint", None)  # another process than the first, which does not see the file
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "latest.pth" and os.path.exists(path))
    with pytest.raises(CheckpointError, match=r"see different checkpoints .*must be one folder on all machines"):
        unimatch.main(data.arguments(interrupted))


def test_a_run_killed_between_saves_repeats_the_steps_since_the_last(data, unread, tmp_path):
    """Saved at each step; a step is logged before the next one is killed."""
    arguments, expected = unread
    path, script = tmp_path / "run", tmp_path / "killed.py"
    script.write_text(KILLED_IN_THE_SECOND_EPOCH)
    arguments = [*data.arguments(path), *arguments, "checkpoint_minutes=1e-9"]
    assert run_script(script, *arguments, env={"PYTHONPATH": str(PROJECT_ROOT)}).returncode == -signal.SIGKILL
    assert load_checkpoint(path, "midway.pth")["iteration"] == 4
    unimatch.main(arguments)
    state, whole = load_checkpoint(path), load_checkpoint(expected)
    assert state["config"].pop("checkpoint_minutes") == 1e-9 and whole["config"].pop("checkpoint_minutes") == 15
    assert_same(state, whole)
    assert _curves(path) == _curves(expected) and _losses(path) == _losses(expected)
    shutil.rmtree(path)


def test_every_epoch_is_saved_also_where_it_is_not_evaluated(data, tmp_path, monkeypatch):
    path = tmp_path / "run"
    arguments = [*data.arguments(path), "--set", "epochs=4", "eval_interval=2", "keep_last=3"]
    _signal_at(monkeypatch, 3, signal.SIGTERM)  # an epoch has two steps
    with pytest.raises(Interrupted):
        supervised.main(arguments)
    assert (load_checkpoint(path)["epoch"], load_checkpoint(path)["best_epoch"]) == (1, 0)
    assert (path / "midway.pth").exists() and not (path / "best.pth").exists()
    monkeypatch.undo()
    supervised.main(arguments)
    assert [step + 1 for step, _ in _curves(path)["eval/mIoU"]] == [4, 8]
    names = {file.name: load_checkpoint(path, file.name)["epoch"] for file in path.glob("*.pth")}
    assert names.pop("best.pth") in (2, 4)
    assert names == {"latest.pth": 4, "previous.pth": 3, "epoch-0002.pth": 2, "epoch-0003.pth": 3, "epoch-0004.pth": 4}
    shutil.rmtree(path)


def test_a_second_ctrl_c_ends_the_run_at_once():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignals() as signals:
        for _ in range(2):  # as Slurm may send it
            os.kill(os.getpid(), signal.SIGTERM)
        assert list(signals.cut("abc")) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_closed_terminal_asks_to_end_unless_it_is_ignored():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)  # from the terminal, and passed on by a launcher
        assert signals.received == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


IN_FLOAT64 = """
import os, signal
import torch
import unimatch
import util.lists, util.run
from util.cli import run_main
from util.train import loop

torch.set_default_dtype(torch.float64)
if os.environ.get("RANK", "0") != "0":  # the main process reads for all
    util.lists.read_list = util.lists.find_unlabeled = util.run.find_checkpoint = None
set_poly_lr = loop.set_poly_lr

def signalled(optimizer, iteration, total):
    if str(iteration) == os.environ.get("SIGNAL_AT"):
        os.kill(os.getpid(), signal.SIGTERM)
    set_poly_lr(optimizer, iteration, total)

loop.set_poly_lr = signalled
run_main(unimatch.main)
"""


def test_one_process_goes_on_within_an_epoch_of_two_to_the_same_weights(tmp_path):
    """No pixel is ignored, so each process divides its losses by as many; then only the sums' last digits differ.

    Lists and the choice of the checkpoint come from the main process: no other one could make them.
    """
    data = make_dataset(tmp_path / "data", unlabeled=8, size=(80, 72))  # half the size still needs no padding
    for path in (data.root / "labels").glob("*.png"):
        label = np.array(Image.open(path))
        label[0] = label[1]
        Image.fromarray(label).save(path)
    data.configure(batch_size=1, epochs=2, conf_thresh=0.4)
    script = tmp_path / "double.py"
    script.write_text(IN_FLOAT64)
    two = ("-m", "scripts.launch", "--processes", "2", script)
    variables = {"PYTHONPATH": str(PROJECT_ROOT)}
    result = run_script(*two, *data.arguments(tmp_path / "two"), env=variables)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "run"
    result = run_script(*two, *data.arguments(path), env={**variables, "SIGNAL_AT": "0"})
    assert result.returncode == EXIT_SIGNAL + signal.SIGTERM, result.stderr
    assert 1 <= load_checkpoint(path, "midway.pth")["iteration"] < 4
    result = run_script(script, *data.arguments(path), "--set", "batch_size=2", env=variables)
    assert result.returncode == 0, result.stderr
    assert re.search(r"0 of 2 epochs are done and [123] of 4", result.stdout)
    expected, found = load_checkpoint(tmp_path / "two"), load_checkpoint(path)
    assert (found["epoch"], found["iteration"]) == (expected["epoch"], expected["iteration"]) == (2, 8)
    for name, weights in expected["model"].items():
        torch.testing.assert_close(found["model"][name], weights, rtol=1e-9, atol=1e-12, msg=name)
    assert expected["model"]["classifier.weight"].dtype == torch.float64


# --- what cannot be continued


def test_settings_that_shape_training_may_not_change(data, interrupted, capsys):
    before = _content(interrupted)
    changes = ["lr=0.002", "crop_size=48", "criterion=OHEM", "workers=3", "log_interval=7"]
    line = _refused(unimatch.main, [*data.arguments(interrupted), "--set", *changes], capsys)
    ohem = "{'name': 'OHEM', 'thresh': 0.7, 'min_kept': 200000}"
    assert line.startswith(
        f"error: {interrupted}/latest.pth: was trained with other settings "
        f"(criterion: CELoss -> {ohem}; crop_size: 32 -> 48; lr: 0.001 -> 0.002) "
    )
    for choice in ("set them back", "another --save-path", "--resume never"):
        assert choice in line
    assert before.pop("run.lock")  # of the killed process
    assert _content(interrupted) == before


@pytest.mark.parametrize("changed", ["labelled", "unlabelled", "validation"])
def test_lists_with_other_content_are_refused_whatever_their_name(data, interrupted, changed, capsys, tmp_path):
    original = {"labelled": data.labeled, "unlabelled": data.unlabeled, "validation": data.val}[changed]
    shorter = tmp_path / original.name
    shorter.write_text("\n".join(original.read_text().splitlines()[:-1]))
    options = {
        "labelled": ["--labeled-id-path", str(shorter)],
        "unlabelled": ["--unlabeled-id-path", str(shorter)],
        "validation": ["--set", f"val_id_path={shorter}"],
    }[changed]
    line = _refused(unimatch.main, [*data.arguments(interrupted), *options], capsys)
    count = {"labelled": 4, "unlabelled": 6, "validation": 2}[changed]
    assert re.search(rf"\({changed} list: {count} images, \w+ -> {count - 1} images, \w+\) - set them back", line)


def test_the_same_lists_at_another_place_are_the_same_lists(data, interrupted, tmp_path):
    moved = {}
    for name in ("labeled", "unlabeled", "val"):
        moved[name] = tmp_path / f"moved-{name}.txt"
        shutil.copyfile(getattr(data, name), moved[name])
    options = ["--labeled-id-path", str(moved["labeled"]), "--unlabeled-id-path", str(moved["unlabeled"])]
    unimatch.main([*data.arguments(interrupted), *options, "--set", f"val_id_path={moved['val']}"])
    assert load_checkpoint(interrupted)["epoch"] == 2


def test_another_method_is_refused(data, interrupted, capsys):
    line = _refused(fixmatch.main, data.arguments(interrupted), capsys)
    assert "(method: unimatch -> fixmatch)" in line


def test_a_damaged_checkpoint_without_an_earlier_one_is_refused(data, interrupted, capsys):
    latest = interrupted / "latest.pth"
    content = latest.read_bytes()
    (interrupted / "best.pth").unlink()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint", b"\x80\x02."):
        latest.write_bytes(damaged)
        line = _refused(unimatch.main, data.arguments(interrupted), capsys)
        assert line.startswith(f"error: {latest}: damaged or not a checkpoint, and there is no earlier one ")
        assert latest.read_bytes() == damaged


@pytest.mark.parametrize(
    ("state", "missing"),
    [
        ({"module.weight": torch.ones(1)}, "model, optimizer, epoch, iteration, previous_best, config"),
        ([1, 2], "model, optimizer, epoch, iteration, previous_best, config"),
    ],
    ids=["a bare state dict", "a list"],
)
def test_a_checkpoint_of_another_format_is_refused(data, tmp_path, state, missing, capsys):
    torch.save(state, tmp_path / "latest.pth")
    line = _refused(unimatch.main, data.arguments(tmp_path), capsys)
    assert line.startswith(f"error: {tmp_path}/latest.pth: cannot be resumed: it has no {missing}")
    assert "--resume never" in line


# --- starting anew


def test_resume_never_starts_anew_and_keeps_what_was_there(data, tmp_path, capsys):
    path = tmp_path / "run"
    path.mkdir()
    (path / "latest.pth").write_bytes(b"damaged")
    arguments = [*data.arguments(path), "--resume", "never", "--set", "epochs=1"]
    supervised.main(arguments)
    assert f"earlier results were moved to {path}/previous-1" in capsys.readouterr().out
    assert [file.name for file in (path / "previous-1").iterdir()] == ["latest.pth"]
    assert (path / "previous-1" / "latest.pth").read_bytes() == b"damaged"
    first = load_checkpoint(path)
    supervised.main([*arguments, "seed=1"])
    assert f"earlier results were moved to {path}/previous-2" in capsys.readouterr().out
    assert_same(load_checkpoint(path / "previous-2"), first)
    moved = {"best.pth", "latest.pth", "train.log", "config.yaml"}
    names = {file.name for file in (path / "previous-2").iterdir()}
    assert moved < names and sum(name.startswith("events.out.tfevents.") for name in names - moved) == 1
    assert load_checkpoint(path)["config"]["seed"] == 1
    shutil.rmtree(path)


@pytest.mark.parametrize(("job", "restarts", "goes_on"), [("77", "1", True), ("78", "1", False), ("77", None, False)])
def test_resume_never_is_not_repeated_by_the_launcher_that_starts_the_run_again(
    data, tmp_path, monkeypatch, capsys, job, restarts, goes_on
):
    """A job that Slurm queues again has the arguments that it had the first time. In a job's shell they are meant."""
    path = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with monkeypatch.context() as patch:
        _signal_at(patch, 1, signal.SIGTERM)
        with pytest.raises(Interrupted):
            unimatch.main([*data.arguments(path), "--resume", "never"])
    monkeypatch.setenv("SLURM_JOB_ID", job)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    capsys.readouterr()
    unimatch.main([*data.arguments(path), "--resume", "never"])
    output = capsys.readouterr().out
    assert ("started again by its launcher" in output) == goes_on
    assert ("0 of 2 epochs are done and 2 of 3 iterations" in output) == goes_on
    assert (path / "previous-1").exists() != goes_on
    shutil.rmtree(path)


def test_resume_never_on_a_new_path_just_starts(data, tmp_path):
    supervised.main([*data.arguments(tmp_path / "run"), "--resume", "never", "--set", "epochs=1"])
    assert not list((tmp_path / "run").glob("previous-*"))
    assert load_checkpoint(tmp_path / "run")["epoch"] == 1
    shutil.rmtree(tmp_path / "run")
