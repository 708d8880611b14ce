"""Checkpoints are whole at every moment, whatever interrupts their writing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import PROJECT_ROOT, run_script
from util.checkpoint import (
    copy_checkpoint,
    load_optimizer,
    save_checkpoint,
    save_epoch,
    set_aside,
    tidy,
)
from util.config import Config, to_dict
from util.errors import CheckpointError, Interrupted
from util.resume import find_checkpoint
from util.schedule import build_optimizer
from util.signals import outside_training


def _state(value: float, numel: int = 10) -> dict[str, object]:
    return {"model": {"weight": torch.full((numel,), value)}, "epoch": 1}


def _value(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["model"]["weight"][0])


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_a_plain_dict_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "latest.pth"
    save_checkpoint(_state(1), path)
    save_checkpoint(_state(2), path)
    state = torch.load(path, weights_only=True)
    assert type(state) is dict and state["epoch"] == 1 and _value(path) == 2
    assert _names(tmp_path) == ["latest.pth"]


def test_during_writing_the_old_checkpoint_is_in_place(tmp_path, monkeypatch):
    path = tmp_path / "latest.pth"
    save_checkpoint(_state(1), path)
    seen = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def watch(*args, name=name, original=original):
            seen.append((name, _value(path)))
            return original(*args)

        monkeypatch.setattr(os, name, watch)
    save_checkpoint(_state(2), path)
    # The content reaches the disk before the name does, and the name (the folder) last.
    assert seen == [("fsync", 1), ("replace", 1), ("fsync", 2)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("unexpected pos 64 vs 0"), "unexpected pos 64 vs 0"),
    ],
)
def test_a_failure_in_the_middle_of_writing_leaves_the_old_checkpoint_alone(tmp_path, monkeypatch, error, reason):
    path = tmp_path / "latest.pth"
    save_checkpoint(_state(1), path)

    def fail(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(_state(2), path)
    assert str(caught.value) == f"{path}: cannot be written ({reason}); earlier ones are intact"
    assert _names(tmp_path) == ["latest.pth"] and _value(path) == 1


def test_an_interruption_leaves_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "latest.pth"
    save_checkpoint(_state(1), path)

    def interrupt(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(_state(2), path)
    assert _names(tmp_path) == ["latest.pth"] and _value(path) == 1


def test_what_a_killed_run_left_behind_does_not_matter(tmp_path):
    path = tmp_path / "latest.pth"
    for name in ("latest.pth.tmp", "best.pth.01ab23cd.tmp"):
        (tmp_path / name).write_bytes(b"half of a longer file" * 10_000)
    tidy(tmp_path, [])
    save_checkpoint(_state(1), path)
    copy_checkpoint(path, tmp_path / "best.pth")
    assert _names(tmp_path) == ["best.pth", "latest.pth"]
    assert _value(path) == _value(tmp_path / "best.pth") == 1


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from util.checkpoint import CheckpointError, save_checkpoint

path = Path(sys.argv[1])
save_checkpoint({"model": {"weight": torch.ones(10)}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    save_checkpoint({"model": {f"weight{i}": torch.zeros(10_000) for i in range(20)}}, path)
except CheckpointError as error:
    print(error)
"""


def test_a_file_system_that_takes_no_more_leaves_the_old_checkpoint_alone(tmp_path):
    """A limit on the size of files stands in for a full disk: the real writer of torch fails in its middle."""
    (tmp_path / "full.py").write_text(FULL_DISK)
    folder = tmp_path / "run"
    folder.mkdir()
    result = run_script(tmp_path / "full.py", folder / "latest.pth", env={"PYTHONPATH": str(PROJECT_ROOT)})
    assert result.returncode == 0, result.stderr
    reason = os.strerror(errno.EFBIG)
    assert result.stdout == f"{folder / 'latest.pth'}: cannot be written ({reason}); earlier ones are intact\n"
    assert _names(folder) == ["latest.pth"] and _value(folder / "latest.pth") == 1


def test_a_copy_shares_the_disk_space_and_stays_when_the_original_moves_on(tmp_path):
    latest, best = tmp_path / "latest.pth", tmp_path / "best.pth"
    save_checkpoint(_state(1), latest)
    copy_checkpoint(latest, best)
    assert best.samefile(latest)
    copy_checkpoint(latest, best)  # the same again
    assert _names(tmp_path) == ["best.pth", "latest.pth"]
    save_checkpoint(_state(2), latest)
    assert (_value(best), _value(latest)) == (1, 2)
    copy_checkpoint(latest, best)
    assert _value(best) == 2 and _names(tmp_path) == ["best.pth", "latest.pth"]


def test_without_hard_links_the_copy_is_a_file_of_its_own(tmp_path, monkeypatch):
    latest, best = tmp_path / "latest.pth", tmp_path / "best.pth"
    save_checkpoint(_state(1), latest)

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    copy_checkpoint(latest, best)
    assert not best.samefile(latest) and best.read_bytes() == latest.read_bytes()

    def fail(source, target):
        Path(target).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    save_checkpoint(_state(2), latest)
    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(CheckpointError, match=r"best\.pth: cannot be written \(.*No space left"):
        copy_checkpoint(latest, best)
    assert _value(best) == 1 and _names(tmp_path) == ["best.pth", "latest.pth"]


def test_a_file_system_that_became_read_only_gives_the_same_error(tmp_path, monkeypatch):
    """Even removing the temporary file fails there."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        save_checkpoint(_state(1), tmp_path / "latest.pth")


def test_earlier_results_are_set_aside_under_the_next_free_number(tmp_path):
    assert set_aside(tmp_path) is None
    names = ["best.pth", "latest.pth", "train.log", "config.yaml", "events.out.tfevents.1.host.2.0"]
    for number in (1, 2):
        for name in [*names, "notes.txt"]:
            (tmp_path / name).write_text(f"{name} {number}")
        assert set_aside(tmp_path) == tmp_path / f"previous-{number}"
        assert _names(tmp_path / f"previous-{number}") == sorted(names)
        assert (tmp_path / f"previous-{number}" / "best.pth").read_text() == f"best.pth {number}"
    assert _names(tmp_path) == ["notes.txt", "previous-1", "previous-2"]


# --- which one a run continues from

CFG = Config(
    dataset="tiny",
    data_root="data",
    val_id_path="val.txt",
    classes=("a", "b"),
    crop_size=32,
    epochs=9,
    batch_size=2,
    lr=0.1,
    backbone="resnet18",
)
RUN = {"method": "unimatch"}


def _run_state(epoch: int, position: int | None = None, processes: int = 1) -> dict[str, object]:
    """A checkpoint after `epoch` epochs of 10 steps, or `position` steps later."""
    state = {"model": {"weight": torch.full((1000,), float(epoch))}, "optimizer": {}, "previous_best": 1.0}
    state |= {"epoch": epoch, "iteration": 10 * epoch + (position or 0), "config": to_dict(CFG), "run": RUN}
    return state if position is None else state | {"position": position, "metrics": {}, "processes": processes}


def _find(folder: Path, processes: int = 1) -> tuple[str | None, int]:
    found = find_checkpoint(folder, CFG, RUN, processes)
    return found.path and found.path.name, found.first_step


def _flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_the_newest_checkpoint_is_continued_and_one_within_an_epoch_before_its_start(tmp_path):
    assert _find(tmp_path) == (None, 0)
    save_checkpoint(_run_state(0, 3), tmp_path / "midway.pth")
    assert _find(tmp_path) == ("midway.pth", 2)  # the last step's curves are still to be written
    save_checkpoint(_run_state(1), tmp_path / "latest.pth")
    assert _find(tmp_path) == ("latest.pth", 10)  # a run killed before it removed the other one
    save_checkpoint(_run_state(1, 4), tmp_path / "midway.pth")
    assert _find(tmp_path) == ("midway.pth", 13)


def test_another_number_of_processes_starts_at_the_epochs_beginning_and_says_so(tmp_path):
    save_checkpoint(_run_state(0, 3, processes=2), tmp_path / "midway.pth")
    found = find_checkpoint(tmp_path, CFG, RUN, 1)
    assert found.path is None and found.notes == (
        f"note: {tmp_path}/midway.pth is of 2 process(es), and there are 1 now, with other "
        "images in a step: going on from the start of epoch 1",
    )
    save_checkpoint(_run_state(4), tmp_path / "latest.pth")
    save_checkpoint(_run_state(4, 3, processes=2), tmp_path / "midway.pth")
    found = find_checkpoint(tmp_path, CFG, RUN, 4)
    assert found.path.name == "latest.pth" and found.notes[0].endswith("going on from the start of epoch 5")
    assert _find(tmp_path, 2) == ("midway.pth", 42)


def test_as_many_images_a_step_go_on_within_the_epoch_on_another_number_of_processes(tmp_path):
    """CFG has 2 images a process; 1 process of 4 takes as many as 2 of 2, or 1 of 2 that accumulates 2 batches."""
    state = _run_state(0, 3, processes=2) | {"steps": 10}
    save_checkpoint(state, tmp_path / "midway.pth")
    for changes in ({"batch_size": 4}, {"accumulate": 2}):
        cfg = dataclasses.replace(CFG, **changes)
        found = find_checkpoint(tmp_path, cfg, RUN, 1, 10)
        assert (found.path, found.steps, found.notes) == (tmp_path / "midway.pth", 10, ())
        found = find_checkpoint(tmp_path, cfg, RUN, 1, 9)
        assert (found.path, found.steps) == (tmp_path / "midway.pth", 10)
        assert found.notes == ("note: an epoch keeps its 10 steps; one begun on 1 process(es) has 9",)
        with pytest.raises(CheckpointError, match="was trained with other settings"):
            find_checkpoint(tmp_path, cfg, RUN, 2, 10)
    save_checkpoint(_run_state(4) | {"steps": 10}, tmp_path / "latest.pth")
    found = find_checkpoint(tmp_path, CFG, RUN, 1, 20)  # half as many images a step
    assert (found.path.name, found.steps) == ("latest.pth", 20)


def test_after_an_epoch_the_one_before_is_kept_and_what_lies_within_is_removed(tmp_path):
    for epoch in (1, 2, 3):
        save_checkpoint(_run_state(epoch - 1, 5), tmp_path / "midway.pth")
        save_epoch(_run_state(epoch), tmp_path, improved=epoch == 1, keep_last=2)
    values = {path.name: _value(path) for path in tmp_path.iterdir()}
    assert values == {"latest.pth": 3, "previous.pth": 2, "best.pth": 1, "epoch-0002.pth": 2, "epoch-0003.pth": 3}


def test_a_checkpoint_that_a_person_named_alike_is_neither_removed_nor_continued_from(tmp_path):
    mine = tmp_path / "epoch-0-of-last-week.pth"
    save_checkpoint(_run_state(9), mine)
    for epoch in (1, 2):
        save_epoch(_run_state(epoch), tmp_path, improved=False, keep_last=1)
    assert mine.exists() and _names(tmp_path) == sorted([mine.name, "epoch-0002.pth", "latest.pth", "previous.pth"])
    for path in tmp_path.glob("[!e]*"):
        path.unlink()
    assert _find(tmp_path) == ("epoch-0002.pth", 20)


def test_a_signal_while_a_checkpoint_is_read_does_not_make_it_a_damaged_one(tmp_path, monkeypatch):
    def read(path):
        os.kill(os.getpid(), signal.SIGTERM)

    save_epoch(_run_state(1), tmp_path, improved=True)
    monkeypatch.setattr("util.resume.read_checkpoint", read)
    with pytest.raises(Interrupted), outside_training(0, under_srun=False):
        find_checkpoint(tmp_path, CFG, RUN)


def test_any_flipped_bit_of_the_weights_is_noticed_though_torch_load_does_not(tmp_path):
    path = tmp_path / "latest.pth"
    save_checkpoint(_run_state(1), path)
    whole = path.read_bytes()
    start = whole.index(torch.full((1000,), 1.0).numpy().tobytes())
    for place in range(start, start + 4000, 397):
        path.write_bytes(whole)
        _flip(path, place, place % 8)
        assert not torch.equal(torch.load(path, weights_only=True)["model"]["weight"], torch.ones(1000))
        with pytest.raises(CheckpointError, match=r"latest\.pth: damaged or not a checkpoint, and there is no earlier"):
            find_checkpoint(tmp_path, CFG, RUN)


def test_wherever_a_bit_flips_the_content_is_the_same_or_it_is_noticed(tmp_path):
    path = tmp_path / "latest.pth"
    state = _run_state(1)
    state["model"] = {"weight": torch.ones(4)}
    save_checkpoint(state, path)
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 5):
        path.write_bytes(whole)
        _flip(path, place, place % 8)
        try:
            find_checkpoint(tmp_path, CFG, RUN)
        except CheckpointError:
            noticed += 1
        else:
            again = torch.load(path, weights_only=True)
            assert torch.equal(again.pop("model")["weight"], torch.ones(4))
            assert again == {key: value for key, value in state.items() if key != "model"}
    assert noticed > 100


@pytest.mark.parametrize("length", [0, 1, 100, -1, -100])
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_it_continued(tmp_path, length):
    save_epoch(_run_state(1), tmp_path, improved=True)
    save_epoch(_run_state(2), tmp_path, improved=True)
    path = tmp_path / "latest.pth"
    content = path.read_bytes()[:length]
    path.write_bytes(content)  # the best one, which is the same file, too
    found = find_checkpoint(tmp_path, CFG, RUN)
    assert (found.path.name, found.first_step) == ("previous.pth", 10)
    assert found.notes == (
        f"warning: {path} is damaged or incomplete: it is kept as latest.pth.damaged-1, and training goes on from "
        "previous.pth",
    )
    assert path.read_bytes() == content  # finding changes nothing
    tidy(tmp_path, found.damaged)
    assert (tmp_path / "latest.pth.damaged-1").read_bytes() == content and not path.exists()


def test_a_damaged_checkpoint_within_an_epoch_costs_that_epoch(tmp_path):
    save_checkpoint(_run_state(0, 3), tmp_path / "midway.pth")
    _flip(tmp_path / "midway.pth", 3000)
    found = find_checkpoint(tmp_path, CFG, RUN)
    assert found.path is None and found.notes[0].endswith("training goes on from the beginning")
    save_checkpoint(_run_state(1), tmp_path / "latest.pth")
    assert _find(tmp_path) == ("latest.pth", 10)


def test_kept_epochs_and_the_best_one_serve_where_nothing_newer_is_whole(tmp_path):
    for epoch in (1, 2, 3):
        save_epoch(_run_state(epoch), tmp_path, improved=epoch == 1, keep_last=2)
    for name in ("latest.pth", "previous.pth"):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b"")
    assert _find(tmp_path) == ("epoch-0003.pth", 30)
    for path in tmp_path.glob("epoch-*"):
        path.unlink()
    assert _find(tmp_path) == ("best.pth", 10)


@pytest.mark.parametrize(("now", "allowed"), [("here.pth", True), (True, True), (False, False)])
def test_pretrained_weights_that_moved_do_not_keep_a_run_from_going_on(tmp_path, now, allowed):
    """They are read at the start only. To have started without is another matter."""
    state = _run_state(1)
    state["config"]["pretrained"] = "there.pth"
    save_checkpoint(state, tmp_path / "latest.pth")
    refused = pytest.raises(CheckpointError, match=r"pretrained: there\.pth -> False")
    with contextlib.nullcontext() if allowed else refused:
        found = find_checkpoint(tmp_path, dataclasses.replace(CFG, pretrained=now), RUN)
        assert found.path == tmp_path / "latest.pth"


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path):
    (tmp_path / "midway.pth.tmp").write_bytes(b"half of it")
    tidy(tmp_path, [])
    assert _names(tmp_path) == []


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True])
def test_momenta_saved_in_another_memory_format_are_taken_up_value_for_value(tmp_path, kind, fused):
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 5, 3, 3, 3, generator=generator)

    def optimizer(memory_format: torch.memory_format) -> torch.optim.Optimizer:
        weight = torch.nn.Parameter(start.clone().contiguous(memory_format=memory_format))
        if kind == "adamw":
            return torch.optim.AdamW([weight], lr=0.1, fused=fused)
        return torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=fused)

    def step(optimizer: torch.optim.Optimizer, gradient: torch.Tensor) -> None:
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = torch.empty_like(weight).copy_(gradient)
        optimizer.step()

    through, first, second = (
        optimizer(f) for f in (torch.contiguous_format, torch.channels_last, torch.contiguous_format)
    )
    for gradient in gradients:
        step(through, gradient)
    step(first, gradients[0])
    with torch.no_grad():
        second.param_groups[0]["params"][0].copy_(first.param_groups[0]["params"][0])
    load_optimizer(second, first.state_dict(), tmp_path / "latest.pth")
    for gradient in gradients[1:]:
        step(second, gradient)
    torch.testing.assert_close(second.param_groups[0]["params"][0], through.param_groups[0]["params"][0])


@pytest.mark.parametrize(
    "broken",
    [
        {"exp_avg": torch.zeros(3)},
        {"exp_avg_sq": None},
        {"step": torch.zeros(2, 2)},
    ],
)
def test_a_state_that_is_not_adamws_is_refused(tmp_path, broken):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    load_optimizer(optimizer, state, tmp_path / "latest.pth")
    state["state"][0] = {**state["state"][0], **broken}
    with pytest.raises(CheckpointError, match="its optimizer is not the state of this model's"):
        load_optimizer(optimizer, state, tmp_path / "latest.pth")


@pytest.mark.parametrize(("saved_on", "device"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_adamws_count_of_steps_lies_where_the_kernel_that_goes_on_needs_it(tmp_path, saved_on, device):
    """A GPU has the fused kernel, which takes all of it on the GPU. Tensors without values need none."""

    def optimizer(device: str) -> torch.optim.Optimizer:
        with torch.device(device):
            return build_optimizer(torch.nn.Linear(3, 2), 0.1, 1, "adamw")

    with FakeTensorMode():
        first, second = optimizer(saved_on), optimizer(device)
        for parameter in first.param_groups[1]["params"]:
            first.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            first.state[parameter]["step"] = torch.ones((), device=saved_on)
        load_optimizer(second, first.state_dict(), tmp_path / "latest.pth")
    assert len(second.state) == 2 and second.param_groups[1]["fused"] is (True if device == "cuda" else None)
    for values in second.state.values():
        assert {(value.device.type, value.dtype) for value in values.values()} == {(device, torch.float32)}
