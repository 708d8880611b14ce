"""Several processes: how they are found, and that N of them compute what one does.

Processes are forked from a server that has torch imported already, meet over gloo, and use one thread each.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from dataset import DataError
from dataset.lists import list_digest, read_list
from dataset.loader import LoaderOptions, val_loader
from dataset.source import DataSource
from dataset.views import UnlabeledViews
from model.backbone.resnet import BasicBlock, ResNet
from model.semseg.deeplabv3plus import DeepLabV3Plus
from scripts.benchmark.naive import paste_partner
from supervised import supervised_step
from tests.helpers import make_dataset
from tests.reference import formulas
from tests.steps import run_step
from util.cli import run_main
from util.distributed import watchdog as faults
from util.distributed.batchnorm import SyncBatchNormCPU
from util.distributed.collectives import DelayedMax, all_reduce_sum, from_main, process_count
from util.distributed.ddp import distribute, unwrap
from util.distributed.group import process_group
from util.distributed.launch import Processes, choose_device, find_processes
from util.distributed.network import port_fault
from util.errors import ConfigError, TrainingStopped
from util.evaluate import evaluate
from util.losses import CrossEntropy
from util.schedule import build_optimizer
from util.teacher import Teacher
from util.train.optimizer_step import OptimizerStep
from util.train.step_metrics import StepMetrics

CPU = torch.device("cpu")
NCLASS, SIZE, IMAGES = 5, 33, 4
STEPS = {"unimatch": 2, "fixmatch": 1, "fixmatch with a teacher": 1, "unimatch_v2": 2, "supervised": 1}
WITH_TEACHER = ("fixmatch with a teacher", "unimatch_v2")


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def _run(job: Callable[..., Any], count: int, folder: Path, *args: Any) -> list[Any]:
    """`job(rank, count, *args)` on `count` processes of a group: what each returns (tensors, numbers, texts)."""
    if count == 1:
        return [job(0, 1, *args)]
    multiprocessing.set_forkserver_preload(["tests.test_distributed", "torch.multiprocessing.spawn"])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(
        _process, (job, count, port, folder, args), nprocs=count, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _process(rank: int, job: Callable[..., Any], count: int, port: int, folder: Path, args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with process_group(Processes(rank, count, rank), CPU):
        torch.save(job(rank, count, *args), folder / f"{rank}.pt")


def _model(nclass: int = NCLASS) -> DeepLabV3Plus:
    """The smallest ResNet that has everything: strides, a dilated stage, shortcuts with and without a convolution."""
    torch.manual_seed(0)
    backbone = ResNet(BasicBlock, (2, 1, 1, 1), (False, False, True), stem=(8, 8, 16))
    return DeepLabV3Plus(backbone, nclass, dilations=(1, 2, 3))


def _digest(model: nn.Module) -> str:
    """A fingerprint of every bit of the parameters and buffers."""
    content = hashlib.sha256()
    for name, tensor in unwrap(model).state_dict().items():
        content.update(name.encode() + tensor.numpy().tobytes())
    return content.hexdigest()


# --- training steps


def _share(method: str, step: int, rank: int, count: int) -> Any:
    """A process's images of one step: every `count`-th of four. Each image has as many valid pixels as another.

    With a teacher CutMix pastes from the reversed batch, and the second half is that of EpochSampler for this.
    """
    rows = torch.arange(IMAGES).view(-1, count)
    half, second = len(rows) // 2, count - 1 - rank if method in WITH_TEACHER else rank
    own = torch.cat([rows[:half, rank], rows[half:, second]])

    def views(seed: int) -> UnlabeledViews:
        *images, _, box1, box2 = (torch.from_numpy(part) for part in formulas.unlabeled(seed, IMAGES, SIZE))
        ignore_mask = torch.zeros(IMAGES, SIZE, SIZE, dtype=torch.uint8)
        if method not in WITH_TEACHER:  # there boxes would paste ignored pixels into other images
            ignore_mask[::2, -5:] = 255
            ignore_mask[1::2, :, -5:] = 255
        parts = (*(image.double() for image in images), ignore_mask, box1, box2)
        return UnlabeledViews(*(part[own] for part in parts))

    image, label = (torch.from_numpy(part) for part in formulas.labeled(10 + step, IMAGES, SIZE, NCLASS))
    labeled, u, u_mix = (image[own].double(), label[own]), views(100 + step), views(200 + step)
    if method == "supervised":
        return labeled
    return (labeled, u) if method in WITH_TEACHER else (labeled, paste_partner(u, u_mix), u_mix)


def _train(rank: int, count: int) -> dict[str, Any]:
    """Steps of each method in float64: metrics over all processes, gradients, and the weights after each step."""
    results = {}
    for method, steps in STEPS.items():
        model = _model().double()
        model = distribute(model, CPU)
        teacher, optimizer = Teacher(model), build_optimizer(model, lr=0.01, lr_multi=2)
        results[method] = []
        for step in range(steps):
            batch = _share(method, step, rank, count)
            optimizer.zero_grad()
            torch.manual_seed(step)  # of dropout, which each process draws for all
            conf_thresh = (
                0.2195 if method in WITH_TEACHER else 0.3
            )  # of 5 classes, by a network that has hardly learned
            metrics = run_step(method, model, batch, CrossEntropy(), teacher=teacher, conf_thresh=conf_thresh)
            means = all_reduce_sum(torch.stack(list(metrics.values()))) / process_count()
            gradients = {name: p.grad.clone() for name, p in unwrap(model).named_parameters()} if rank == 0 else {}
            optimizer.step()
            teacher.update(model)
            results[method].append(
                {
                    "metrics": dict(zip(metrics, means.tolist(), strict=True)),
                    "gradients": gradients,
                    "weights": _digest(model),
                    "teacher": _digest(teacher.model),
                }
            )
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """For one and two processes, what each process found in training."""
    return {count: _run(_train, count, tmp_path_factory.mktemp(f"train{count}")) for count in (1, 2)}


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("count", [2])
def test_several_processes_give_the_losses_of_one(trained, method, count):
    for one, several in zip(trained[1][0][method], trained[count][0][method], strict=True):
        expected, found = dict(one["metrics"]), dict(several["metrics"])
        if method != "supervised":
            ratio = expected.pop("mask_ratio")
            assert 0.1 < ratio < 0.9  # some pixels count, some do not
            assert found.pop("mask_ratio") == pytest.approx(ratio, rel=1e-6)  # a ratio of counts, in float32
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("count", [2])
def test_several_processes_give_the_gradients_of_one(trained, method, count):
    for one, several in zip(trained[1][0][method], trained[count][0][method], strict=True):
        assert list(several["gradients"]) == list(one["gradients"])
        for name, expected in one["gradients"].items():
            assert expected.abs().max() > 0, name
            difference = (several["gradients"][name] - expected).abs().max()
            assert difference <= 1e-9 * expected.abs().max(), name


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("count", [2])
@pytest.mark.parametrize("network", ["weights", "teacher"])
def test_after_a_step_every_process_has_the_same_weights_to_the_bit(trained, method, count, network):
    start = _digest(_model().double())
    for step in range(STEPS[method]):
        (digest,) = {result[method][step][network] for result in trained[count]}
        assert digest != start


def _without_batch_norm() -> DeepLabV3Plus:
    model = _model()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return model


def _supervised_steps(rank: int, count: int) -> str:
    """Steps of two images with one on each of two processes, or one after the other; the weights at the end."""
    cfg = SimpleNamespace(accumulate=2 // count, cuda_graphs=False, on_nonfinite="stop", amp="none")
    model = distribute(_without_batch_norm(), CPU)
    optimizer = build_optimizer(model, lr=0.01, lr_multi=2)
    step = OptimizerStep(
        SimpleNamespace(cfg=cfg, device=CPU, log=None),
        model,
        optimizer,
        lambda batch, backward: supervised_step(model, batch, CrossEntropy(), backward),
    )
    for number in range(3):
        image, label = (torch.from_numpy(part) for part in formulas.labeled(number, 2, SIZE, NCLASS))
        label[1, :9] = 255  # other numbers of valid pixels change nothing: each image's loss is a mean of its own
        own = range(rank, 2, count)
        step.run((image[k : k + 1], label[k : k + 1]) for k in own)
    return _digest(model)


def test_where_gradients_are_sums_of_two_terms_one_process_gives_the_bits_of_two(tmp_path):
    """Two batches accumulated, or one on each of two processes. Not with BatchNorm, whose statistics would differ."""
    (expected,) = _run(_supervised_steps, 1, tmp_path)
    assert expected != _digest(_without_batch_norm())
    assert _run(_supervised_steps, 2, tmp_path) == [expected, expected]


def _reductions(rank: int, count: int) -> dict[str, int]:
    """How many buckets of gradients each method's step sends."""
    sent = dict.fromkeys(STEPS, 0)
    for method in STEPS:
        model = distribute(_model().double(), CPU)

        def hook(state, bucket, method=method):
            sent[method] += 1
            return allreduce_hook(None, bucket)

        model.register_comm_hook(None, hook)
        run_step(method, model, _share(method, 0, rank, count), CrossEntropy())
    return sent


def test_gradients_are_sent_once_a_step(tmp_path):
    """Not with the first of the two backward passes of UniMatch and FixMatch."""
    for sent in _run(_reductions, 2, tmp_path):
        (number,) = set(sent.values())
        assert number > 0


# --- synchronised BatchNorm


def _images() -> torch.Tensor:
    return torch.from_numpy(formulas.image(1, 5, 6, 7, 4)).double() * 3 + 1


def _outer_gradient() -> torch.Tensor:
    return torch.from_numpy(formulas.image(2, 5, 6, 7, 4)).double()


def _batch_norm(kind: type[nn.BatchNorm2d], part: slice) -> dict[str, torch.Tensor]:
    """Two training passes over the images in `part` and one in eval mode."""
    torch.manual_seed(0)
    norm = kind(4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = _images()[part].requires_grad_()
    norm(2 * x.detach())
    out = norm(x)
    (out * _outer_gradient()[part]).sum().backward()
    evaluated = norm.eval()(x)
    return {
        "out": out.detach(),
        "x": x.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "evaluated": evaluated.detach(),
        **norm.state_dict(prefix="state."),
    }


def _unequal_shares(rank: int, count: int) -> dict[str, torch.Tensor]:
    return _batch_norm(SyncBatchNormCPU, slice(0, 3) if rank == 0 else slice(3, 5))


def test_synchronised_batch_norm_equals_batch_norm_of_the_joined_batch(tmp_path):
    """The shares differ: three images on one process, two on the other."""
    expected = _batch_norm(nn.BatchNorm2d, slice(None))
    first, second = _run(_unequal_shares, 2, tmp_path)
    for name in ("out", "x", "evaluated"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), expected[name], rtol=1e-10, atol=1e-12)
    for name in ("weight", "bias"):
        torch.testing.assert_close(first[name] + second[name], expected[name], rtol=1e-10, atol=1e-12)
    for name in ("state.running_mean", "state.running_var", "state.num_batches_tracked"):
        torch.testing.assert_close(first[name], expected[name], rtol=1e-12, atol=0)
        assert torch.equal(first[name], second[name])


def test_alone_the_synchronised_batch_norm_is_batch_norm():
    expected, alone = _batch_norm(nn.BatchNorm2d, slice(None)), _batch_norm(SyncBatchNormCPU, slice(None))
    assert all(torch.equal(alone[name], value) for name, value in expected.items())


def _converted(rank: int, count: int) -> dict[str, Any]:
    model = distribute(_model(), CPU)
    norms = [type(module).__name__ for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return {"names": list(unwrap(model).state_dict()), "norms": sorted(set(norms)), "processes": process_count()}


def test_distributing_a_model_synchronises_every_batch_norm_and_keeps_the_names(tmp_path):
    for result in _run(_converted, 2, tmp_path):
        assert result == {"names": list(_model().state_dict()), "norms": ["SyncBatchNormCPU"], "processes": 2}


def test_a_model_on_one_process_is_not_wrapped():
    model = _model()
    assert distribute(model, CPU) is model
    assert unwrap(model) is model


# --- what the main process sends


def _received(rank: int, count: int, list_path: Path) -> dict[str, Any]:
    value = (read_list(list_path), None, list_path) if rank == 0 else "is ignored"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples, nothing, path = from_main(value)
    same = samples == read_list(list_path) and samples[1:] == read_list(list_path)[1:]
    return {"same": same, "digest": samples.digest, "nothing": nothing, "path": str(path)}


@pytest.mark.parametrize("count", [1, 3])
def test_every_process_gets_the_lists_of_the_main_one(tmp_path, count):
    path = make_dataset(tmp_path, labeled=3, unlabeled=1, val=1).labeled
    expected = {"same": True, "digest": list_digest(read_list(path)), "nothing": None, "path": str(path)}
    assert _run(_received, count, tmp_path, path) == [expected] * count


# --- evaluation


def _evaluate(rank: int, count: int, list_path: Path) -> dict[str, Any]:
    model = _model(nclass=3)
    nn.init.normal_(model.classifier.weight)  # spreads the predictions over the classes
    loader = val_loader(read_list(list_path), DataSource(list_path.parent), LoaderOptions(), rank, count)
    result = evaluate(model.eval(), loader, "original", 32, 3, CPU)
    return {"miou": result.miou, "iou": result.iou, "confusion": result.confusion, "images": len(loader)}


@pytest.mark.parametrize("images", [5, 2])
def test_evaluation_is_the_same_for_one_two_and_three_processes(tmp_path, images):
    """Each image counts once, also where shares are unequal or one is empty."""
    val = make_dataset(tmp_path, labeled=1, unlabeled=1, val=images, size=(40, 32)).val
    (expected,) = _run(_evaluate, 1, tmp_path, val)
    assert int(expected["confusion"].sum()) == images * 40 * 31  # a row of each label is ignored
    assert int((expected["confusion"].sum(0) > 0).sum()) > 1
    for count in (2, 3):
        results = _run(_evaluate, count, tmp_path, val)
        assert sum(result["images"] for result in results) == images
        for result in results:
            assert torch.equal(result["confusion"], expected["confusion"])
            assert torch.equal(result["iou"], expected["iou"]) and result["miou"] == expected["miou"]


# --- a fault on one process


def _nan_on_the_last(rank: int, count: int) -> str:
    metrics = StepMetrics()
    metrics.append(7, {"loss": torch.tensor(1.0), "loss_x": torch.tensor(2.0)})
    metrics.append(8, {"loss": torch.tensor(1.0), "loss_x": torch.tensor(float("nan") if rank else 2.0)})
    try:
        metrics.read()
    except TrainingStopped as error:
        return str(error)
    return "went on"


def test_a_nan_on_one_process_stops_all_with_the_same_line(tmp_path):
    first, second = _run(_nan_on_the_last, 2, tmp_path)
    assert first == second
    assert "not finite at iteration 9: loss_x nan" in first and "\n" not in first


def _metric_means(rank: int, count: int) -> dict[str, float]:
    metrics = StepMetrics()
    metrics.append(0, {"loss": torch.tensor(1.0 + rank)})
    metrics.append(1, {"loss": torch.tensor(4.0 + rank)})
    return metrics.read()


def test_metrics_are_means_over_all_processes(tmp_path):
    assert _run(_metric_means, 2, tmp_path) == [{"loss": 3.0}] * 2


def _bug() -> None:
    raise KeyError("oops")


def _unreadable() -> None:
    raise DataError("images/7.jpg: truncated")


FAULTS: dict[str, Callable[[], Any]] = {
    "early unreadable": _unreadable,
    "unreadable": _unreadable,
    "bug": _bug,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hanging": lambda: time.sleep(100),
}


def _member(rank: int, victim: int, fault: str, port: int, folder: Path) -> None:
    """One of two processes as a launcher starts them, of which one fails between two operations."""
    os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    faults.PATIENCE = 3.0

    def prepare() -> None:
        if rank == victim and fault.startswith("early"):
            FAULTS[fault]()

    def main() -> None:
        with process_group(Processes(rank, 2, rank), CPU, 4, (folder / f"{rank}.told").write_text, prepare):
            all_reduce_sum(torch.ones(1))
            if rank == victim:
                FAULTS[fault]()
            all_reduce_sum(torch.ones(1))

    run_main(main)


@pytest.mark.parametrize(
    ("fault", "victim", "expected", "statuses"),
    [
        ("early unreadable", 1, "error: process 1: images/7.jpg: truncated", [1, 2]),
        ("early unreadable", 0, "error: images/7.jpg: truncated", [2, 1]),
        ("unreadable", 1, "error: process 1: images/7.jpg: truncated", [1, 2]),
        ("unreadable", 0, "error: images/7.jpg: truncated", [2, 1]),
        ("bug", 1, "error: process 1: KeyError: 'oops'", [1, 1]),
        ("killed", 1, "error: process 1 hangs or is gone: the others waited for it in vain", [None, -9]),
        ("killed", 0, "process 0, which held the processes together at port ", [-9, None]),
        ("stopped", 1, "error: process 1 sent no heartbeat for 4 s (dist_timeout): it was killed ", [3, -9]),
        ("hanging", 1, "error: process 1 hangs or is gone: the others waited for it in vain", [3, 1]),
    ],
)
def test_a_fault_of_one_process_ends_the_others_and_one_tells_why(tmp_path, fault, victim, expected, statuses):
    multiprocessing.set_forkserver_preload(["tests.test_distributed", "torch.multiprocessing.spawn"])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    start = multiprocessing.get_context("forkserver").Process
    members = [start(target=_member, args=(rank, victim, fault, port, tmp_path)) for rank in range(2)]
    for member in members:
        member.start()
    survivor = members[1 - victim]
    survivor.join(60)
    members[victim].join(0 if fault in ("stopped", "hanging") else 60)
    for member in members:
        if member.is_alive():
            assert member is not survivor, "the survivor waits on"
            member.kill()
            member.join()
    told = "".join((tmp_path / f"{rank}.err").read_text() for rank in range(2))
    (line,) = [line for line in told.splitlines() if "rror: " in line and not line.startswith("KeyError")]
    if fault == "stopped":  # whether its thread or the operation that waits finds it first
        assert line.startswith((expected, "error: process 1 hangs or is gone"))
    elif (fault, victim) == ("killed", 0):  # whether the store or the connection is found gone first
        assert line.removeprefix("error: process 1: ").startswith((expected, "process 0 hangs or is gone"))
    else:
        assert line.startswith(expected)
    assert told.count("Traceback") == (fault == "bug")
    for member, status in zip(members, statuses, strict=True):
        assert member.exitcode == status or status is None


class OneReport:
    """A store in which the first report stays."""

    report = None

    def set_first(self, key: str, value: str) -> str:
        self.report = self.report or value
        return self.report


def _watchdog(rank: int, machine: str, local_rank: int = 0) -> faults.Watchdog:
    watchdog = object.__new__(faults.Watchdog)  # without a store of its own
    watchdog._rank, watchdog._machine, watchdog._prefix = rank, machine, ""
    watchdog._speaks_here, watchdog._telling = local_rank == 0, threading.Lock()
    return watchdog


def test_a_machine_shows_the_failure_of_a_process_elsewhere(capsys):
    """Under torchrun each has a terminal of its own; of its processes one speaks."""
    for machine, local_rank in (("1", 0), ("1", 1), ("0", 0)):
        _watchdog(9, machine, local_rank)._tell_here(faults.Report(0, "0", "process 0: images/7.jpg: truncated"))
    assert capsys.readouterr().err == "error: process 0: images/7.jpg: truncated\n"


def test_of_three_machines_that_miss_a_fourth_each_shows_a_line_once(capsys):
    """All of them notice it; the first one's report is the one to show."""
    store = OneReport()
    first, same, second, third = (_watchdog(*place) for place in ((0, "a"), (1, "a", 1), (2, "b"), (3, "c")))
    assert first._report("process 4 is gone", store)  # and shows it itself
    for watchdog in (same, second, second, third):  # by its thread, and by the operation that waits
        assert not watchdog._report("process 4 hangs", store)
    assert capsys.readouterr().err == "error: process 0: process 4 is gone\n" * 2


def test_machines_are_told_apart_by_their_names_without_torchrun_and_srun(environment, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    assert faults._machine() == "0"  # srun, which has one terminal
    environment["RANK"] = "1"
    assert faults._machine() == "node7"
    environment.update(TORCHELASTIC_USE_AGENT_STORE="True", GROUP_RANK="3")
    assert faults._machine() == "3"


def _maxima(rank: int, count: int) -> list[int]:
    requests = DelayedMax()
    maxima = [requests.reduce(number if rank == step % count else 0) for step, number in enumerate((0, 0, 15, 1, 0))]
    maxima.append(requests.finish())
    return [*maxima, requests.finish()]


def test_all_processes_get_the_greatest_request_one_step_later(tmp_path):
    assert _run(_maxima, 2, tmp_path) == [[0, 0, 0, 15, 1, 0, 0]] * 2
    assert _maxima(0, 1) == [0, 0, 15, 1, 0, 0, 0]  # alone there is nothing to wait for


def _unread_metrics(rank: int, count: int) -> list[dict[str, float]]:
    """A reading, directly and after the state went through a checkpoint."""
    readings = []
    for through in (False, True):
        metrics = StepMetrics()
        for step in range(3):
            metrics.append(step, {"loss": torch.tensor(0.1 * (step + 3 * rank))})
        if through:
            state = metrics.state_dict()
            metrics = StepMetrics()
            metrics.load_state_dict(state, rank, CPU)
        readings.append(metrics.read())
    return readings


def test_metrics_that_are_not_read_yet_survive_a_checkpoint_to_the_bit(tmp_path):
    for direct, through in _run(_unread_metrics, 2, tmp_path):
        assert direct == through and direct["loss"] == pytest.approx(0.25)


# --- how processes are found


@pytest.fixture
def environment() -> Iterator[Any]:
    """The environment without a launcher's variables; restored afterwards."""
    saved = dict(os.environ)
    for name in saved:
        if name.startswith(("SLURM_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    yield os.environ
    os.environ.clear()
    os.environ.update(saved)


def test_a_plain_start_is_one_process(environment):
    assert find_processes() == Processes(0, 1, 0)
    assert find_processes().is_main


def test_torchrun_tells_the_processes(environment):
    environment.update(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="7")
    assert find_processes() == Processes(5, 8, 1)
    assert not find_processes().is_main


def test_torchrun_inside_a_slurm_step_counts(environment):
    environment.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="3")
    environment.update(MASTER_ADDR="a", MASTER_PORT="7")
    assert find_processes() == Processes(1, 2, 1)


def test_srun_tells_the_processes_and_its_first_node_is_the_address(environment, tmp_path):
    _fake_scontrol(tmp_path, environment, 'echo "$*" > "$0.called"; printf "node03\\nnode04\\n"')
    environment.update(SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="4", SLURM_LOCALID="1", SLURM_STEP_NODELIST="node[03-04]")
    assert find_processes(port=23456) == Processes(3, 4, 1)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node03", "23456")
    assert (tmp_path / "scontrol.called").read_text() == "show hostnames node[03-04]\n"


def test_an_address_that_is_set_is_kept(environment):
    environment.update(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0", MASTER_ADDR="a", MASTER_PORT="7")
    assert find_processes(port=23456) == Processes(0, 2, 0)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("a", "7")


def test_python_inside_a_batch_script_is_alone(environment):
    """`sbatch --ntasks 4` sets SLURM_NTASKS and SLURM_PROCID for the script itself, which runs once."""
    environment.update(SLURM_NTASKS="4", SLURM_NPROCS="4", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_ID="1")
    assert find_processes() == Processes()
    assert "MASTER_ADDR" not in environment


def test_srun_without_a_port_is_refused(environment, tmp_path):
    _fake_scontrol(tmp_path, environment, "echo node03")
    environment.update(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0", SLURM_STEP_NODELIST="node03")
    with pytest.raises(ConfigError, match="--port is needed"):
        find_processes()


def test_a_single_node_needs_no_scontrol(environment, tmp_path):
    environment.update(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0", SLURM_STEP_NODELIST="node03")
    environment["PATH"] = str(tmp_path)
    find_processes(port=23456)
    assert environment["MASTER_ADDR"] == "node03"


def test_a_node_list_that_cannot_be_expanded_is_refused(environment, tmp_path):
    environment.update(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0", SLURM_STEP_NODELIST="node[3-4]")
    _fake_scontrol(tmp_path, environment, "exit 1")
    with pytest.raises(ConfigError, match=r"cannot expand the node list 'node\[3-4\]'"):
        find_processes(port=23456)
    environment["PATH"] = ""
    with pytest.raises(ConfigError, match="export the first node's name as MASTER_ADDR"):
        find_processes(port=23456)


def _fake_scontrol(folder: Path, environment: Any, body: str) -> None:
    path = folder / "scontrol"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"


def test_a_port_is_free_unless_something_listens_there():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        assert port_fault(port) == "taken"
    assert port_fault(port) is None


@pytest.mark.parametrize(
    ("gpus", "wanted", "local_rank", "expected"),
    [
        (0, "auto", 3, "cpu"),
        (0, "cpu", 0, "cpu"),
        (2, "cpu", 1, "cpu"),
        (2, "auto", 1, "cuda:1"),
        (2, "cuda", 0, "cuda:0"),
    ],
)
def test_each_process_has_a_device_of_its_own(monkeypatch, gpus, wanted, local_rank, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(wanted, Processes(local_rank, 4, local_rank)) == torch.device(expected)


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="device: cuda was asked for, but torch finds no GPU"):
        choose_device("cuda", Processes())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for wanted in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="process 3 on this machine has no GPU: there are 2"):
            choose_device(wanted, Processes(6, 8, 2))


@pytest.mark.parametrize(
    ("variables", "fits"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_GPUS_ON_NODE": "2"}, True),  # srun --gpus-per-task=1
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_GPUS_ON_NODE": "1"}, False),  # srun --gres=gpu:1
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_GPUS_PER_TASK": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, False),  # a partition that declares no GPUs
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_GPUS_ON_NODE": "2", "RANK": "1", "WORLD_SIZE": "2"}, False),  # torchrun
    ],
)
def test_the_one_gpu_that_a_task_sees_is_its_own_where_srun_has_one_for_each(environment, monkeypatch, variables, fits):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environment.update(variables)
    assert choose_device("cuda", Processes(0, 2, 0)) == torch.device("cuda:0")
    refused = pytest.raises(ConfigError, match="process 2 on this machine has no GPU: there are 1")
    with contextlib.nullcontext() if fits else refused:
        assert choose_device("cuda", Processes(1, 2, 1)) == torch.device("cuda:0")
