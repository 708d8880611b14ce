"""dataset/handover.py: loading processes that cannot send their batches end the run in one line."""

import errno
import multiprocessing
import pickle
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dataset import DataError
from dataset.handover import handover_fault
from dataset.loader import LoaderOptions


class Unsendable:
    """What no queue can take."""

    def __reduce__(self):
        raise pickle.PicklingError("too many open files")


class Batches(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.item()


def same(batch):
    return batch


class SlowBatches(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(2.5)
        return index


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_batch_that_cannot_be_sent_is_one_error_not_a_wait_without_end(method, capfd, monkeypatch):
    monkeypatch.setattr("dataset.loader.CHECK", 3)
    context = multiprocessing.get_context(method)
    loader = LoaderOptions(1).build(Batches(Unsendable), collate_fn=same, multiprocessing_context=context)
    with pytest.raises(DataError, match=r"^loading processes: one could not hand its batch over.*; lower workers"):
        next(iter(loader))
    assert "note: a loading process cannot hand its batch over: too many open files\n" in capfd.readouterr().err


def test_a_dead_loading_process_is_noticed_without_the_signal_of_its_end(monkeypatch):
    monkeypatch.setattr("dataset.loader.CHECK", 1)
    loader = iter(LoaderOptions(1).build(Batches(Unsendable), collate_fn=same))
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would tell
    try:
        with pytest.raises(DataError, match=r"^loading processes: one could not hand its batch over"):
            next(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.slow
def test_slow_loading_processes_that_live_are_waited_for_up_to_the_limit(monkeypatch, capsys):
    monkeypatch.setattr("dataset.loader.CHECK", 1)
    assert list(LoaderOptions(1).build(SlowBatches(), collate_fn=same)) == [[0], [1]]
    (line,) = capsys.readouterr().err.splitlines()  # once, though both batches were waited for
    assert line == "note: no batch came for 1 s: still waiting for the loading processes, 1800 s at most"
    monkeypatch.setattr("dataset.handover.SECONDS", 2)
    with pytest.raises(DataError, match=r"none gave a batch for 2 s"):
        next(iter(LoaderOptions(1).build(SlowBatches(), collate_fn=same)))


def test_a_pinning_thread_that_has_ended_is_noticed_at_the_next_time_out(monkeypatch, capsys):
    def start(loader):
        batches = begin(loader)
        batches._pin_memory_thread = thread = threading.Thread()
        batches._pin_memory_thread_done_event = threading.Event()
        thread.start()
        return batches

    begin = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", start)
    monkeypatch.setattr("dataset.loader.CHECK", 0.1)
    with pytest.raises(DataError, match=r"^loading processes: the thread that .* pins them ended .*; lower workers"):
        next(iter(LoaderOptions(1).build(Batches(lambda: time.sleep(1)), collate_fn=same)))
    assert "still waiting" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)", "/dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible ...", "/dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "memory ran out"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly with exit code 1.", "hand its batch over"),
        ("DataLoader timed out after 1800 seconds", "none gave a batch"),
        ("Too many open files. Communication with the workers is no longer possible.", "open files"),
        ("received 0 items of ancillary data", "open files"),
        ("shapes differ", None),
    ],
)
def test_each_way_of_failing_between_the_processes_is_named(text, fragment):
    found = handover_fault(RuntimeError(text))
    assert found is None if fragment is None else fragment in found


@pytest.mark.parametrize(
    ("error", "fragment"),
    [
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "broke off"),
        (EOFError(), "broke off"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "folder for temporary files is gone"),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback ..."), None),
    ],
)
def test_a_way_between_the_processes_that_breaks_off_is_one_line(monkeypatch, error, fragment):
    def broken(*_):
        raise type(error)(*error.args)  # a new one: its traceback would keep the processes until the very end

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", broken)
    with pytest.raises(DataError if fragment else FileNotFoundError, match=fragment):
        next(iter(LoaderOptions(1).build(Batches(_one), collate_fn=same)))


def test_where_no_shared_memory_is_the_error_is_one_line_and_without_processes_none(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(multiprocessing, "Lock", refuse)
    monkeypatch.setattr("dataset.handover.SHARED_MEMORY", "/nowhere")
    with pytest.raises(
        DataError, match=r"they cannot be started: /nowhere cannot be written to: Read-only.*workers: 0$"
    ):
        next(iter(LoaderOptions(1).build(Batches(_one), collate_fn=same)))
    assert len(list(LoaderOptions(0).build(Batches(_one), collate_fn=same))) == 2


def test_other_errors_pass_as_they_are():
    def broken():
        raise RuntimeError("of our own")

    with pytest.raises(RuntimeError, match="of our own"):
        next(iter(LoaderOptions(0).build(Batches(broken), collate_fn=same)))
    assert torch.equal(next(iter(LoaderOptions(1).build(Batches(_one), collate_fn=same)))[0], torch.ones(2))


def _one():
    return torch.ones(2)
