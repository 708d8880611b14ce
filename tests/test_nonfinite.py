"""Steps that are not finite: undone to the last bit and counted, on all processes alike, or the end of the run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import unimatch
from tests.helpers import run_script
from util.cli import run_main
from util.errors import EXIT_STOPPED, TrainingStopped
from util.log import RunLog
from util.schedule import build_optimizer
from util.train.nonfinite import NonFiniteGuard
from util.train.step_metrics import StepMetrics

pytestmark = pytest.mark.usefixtures("one_thread")

SKIP = ("--set", "on_nonfinite=skip")


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path, active=False)


def _net(kind: str = "sgd") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    return model, build_optimizer(model, 0.1, 1, weight_decay=1e-2, kind=kind)


def _image(number: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(number))


def _loss(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return model(image).square().mean()


def _gradients(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    loss = _loss(model, image)
    loss.backward()
    model[0].weight.grad[0] = math.inf
    return loss


def _weights(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    loss = _loss(model, image)
    loss.backward()
    model[2].bias.grad.fill_(3e38)  # finite, but not once it is multiplied by the rate and added up
    model[2].bias.data.fill_(-3.3e38)
    return loss


def _forward(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    loss = _loss(model, image * math.inf)
    loss.backward()
    return loss


def _statistics(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The output is finite, the running variance is not."""
    loss = _loss(model, image * 1e25)
    loss.backward()
    return loss


BROKEN = [_gradients, _weights, _forward, _statistics]


def _train(model, optimizer, numbers, guard=None, broken=None) -> list[bool]:
    """A step for each image; after the first, a step of the `broken` kind too where there is one. Which were undone."""
    undone = []

    def step(work, image):
        optimizer.zero_grad()
        if guard:
            guard.keep()
        loss = work(model, image)
        optimizer.step()
        undone.append(bool(guard.undo([loss.detach()])) if guard else False)

    def sound(model, image):
        loss = _loss(model, image)
        loss.backward()
        return loss

    for position, number in enumerate(numbers):
        if broken and position == 1:
            step(broken, _image(99))
        step(sound, _image(number))
    return undone


def _state(model, optimizer) -> list[torch.Tensor]:
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *states)]


@pytest.mark.parametrize("broken", BROKEN)
def test_the_broken_steps_do_break_what_the_guard_protects(broken):
    model, optimizer = _net()
    _train(model, optimizer, [0, 1], broken=broken)
    assert not all(tensor.isfinite().all() for tensor in _state(model, optimizer))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_step_that_is_not_finite_leaves_no_trace(broken, log, kind):
    model, optimizer = _net(kind)
    twin, twins = _net(kind)
    guard = NonFiniteGuard([model], optimizer, 5, log)
    assert _train(model, optimizer, [0, 1, 2], guard, broken) == [False, True, False, False]
    assert guard.unreported == 1
    _train(twin, twins, [0, 1, 2])
    for kept, expected in zip(_state(model, optimizer), _state(twin, twins), strict=True):
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_first_step_that_is_not_finite_leaves_no_trace_either(log, kind):
    """It is the one that makes the momenta."""
    model, optimizer = _net(kind)
    twin, twins = _net(kind)
    guard = NonFiniteGuard([model], optimizer, 5, log)
    guard.keep()
    _forward(model, _image(9))
    optimizer.step()
    guard.undo([])
    _train(model, optimizer, [0, 1], guard)
    _train(twin, twins, [0, 1])
    assert all(torch.equal(a, b) for a, b in zip(_state(model, optimizer), _state(twin, twins), strict=True))


def test_gradients_that_a_scaler_looks_after_are_left_to_it(log):
    """It does not step with them; BatchNorm's statistics of a sound forward stay."""
    model, optimizer = _net()
    guard = NonFiniteGuard([model], optimizer, 5, log, check_gradients=False)
    guard.keep()
    loss = _gradients(model, _image(0))
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not guard.undo([loss.detach()])
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())
    guard.keep()
    assert guard.undo([torch.tensor(math.nan)])


def test_undone_steps_do_not_count_in_the_means_of_the_metrics():
    metrics = StepMetrics()
    for step, (loss, undone) in enumerate([(1.0, False), (math.nan, True), (3.0, False)]):
        metrics.append(step, {"loss": torch.tensor(loss)}, torch.tensor(undone))
    assert metrics.read() == {"loss": 2.0}
    metrics.append(3, {"loss": torch.tensor(math.inf)}, torch.tensor(True))
    assert metrics.read() == {}
    metrics.append(4, {"loss": torch.tensor(math.inf)}, torch.tensor(False))
    with pytest.raises(TrainingStopped, match="iteration 5: loss inf"):
        metrics.read()


def test_more_undone_steps_than_the_limit_stop_the_run(log):
    model, optimizer = _net()
    guard = NonFiniteGuard([model], optimizer, 3, log)
    for iteration, broken in ((10, 2), (20, 0), (30, 1)):
        for _ in range(broken):
            guard.undo([torch.tensor(math.nan)])
        guard.report(iteration)
    guard.undo([torch.tensor(math.nan)])
    with pytest.raises(TrainingStopped, match=r"4 steps .* up to iteration 40, more than nonfinite_limit 3"):
        guard.report(40)


# --- runs


def _break_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let step `number` (from 1) of a run have an image of NaN, the rest as it is."""
    step, calls = unimatch.unimatch_step, []

    def changed(model, batch, *args):
        calls.append(None)
        if len(calls) == number:
            (image, label), *views = batch
            batch = ((image * math.nan, label), *views)
        return step(model, batch, *args)

    monkeypatch.setattr(unimatch, "unimatch_step", changed)


def test_a_run_goes_on_past_a_step_that_is_not_finite(data, tmp_path, monkeypatch, capsys):
    _break_step(monkeypatch, 3)  # the last one of an epoch, before an evaluation and a checkpoint
    unimatch.main([*data.arguments(tmp_path / "run"), *SKIP])
    assert "1 step was not finite and undone up to iteration 3 (nonfinite_limit: 10)" in capsys.readouterr().out
    for name in ("latest.pth", "best.pth"):
        state = torch.load(tmp_path / "run" / name, weights_only=True)
        momenta = [part["momentum_buffer"] for part in state["optimizer"]["state"].values()]
        assert all(tensor.isfinite().all() for tensor in (*state["model"].values(), *momenta))
    assert (
        state["model"]["backbone.bn1.num_batches_tracked"] % 2 == 0
    )  # two training forwards a step, none of them kept


def test_the_option_alone_changes_nothing(data, tmp_path):
    unimatch.main(data.arguments(tmp_path / "stop"))
    unimatch.main([*data.arguments(tmp_path / "skip"), *SKIP])
    stop, skip = (torch.load(tmp_path / name / "latest.pth", weights_only=True) for name in ("stop", "skip"))
    assert stop["previous_best"] == skip["previous_best"]
    assert all(torch.equal(stop["model"][name], skip["model"][name]) for name in stop["model"])


def test_a_diverging_run_stops_beyond_the_limit_even_if_it_may_skip(data, tmp_path, capsys):
    arguments = [*data.arguments(tmp_path / "run"), *SKIP, "lr=1e30", "nonfinite_limit=1"]
    with pytest.raises(SystemExit) as exited:
        run_main(lambda: unimatch.main(arguments))
    assert exited.value.code == EXIT_STOPPED
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 steps were not finite and undone up to iteration 3, more than nonfinite_limit 1" in line


@pytest.mark.slow
def test_two_processes_undo_a_step_that_only_one_has_spoilt(data, tmp_path):
    """Process 1's labelled image is all NaN in its second step; the weights of both stay finite and equal."""
    script = tmp_path / "spoilt.py"
    script.write_text(
        "import os, sys\n"
        "import torch, unimatch\n"
        "from util.cli import run_main\n"
        "step, calls = unimatch.unimatch_step, []\n"
        "def spoilt(model, batch, *args):\n"
        "    calls.append(None)\n"
        "    if len(calls) == 2 and os.environ['RANK'] == '1':\n"
        "        (image, label), *views = batch\n"
        "        batch = ((image * float('nan'), label), *views)\n"
        "    metrics = step(model, batch, *args)\n"
        "    total = sum(p.detach().abs().sum() for p in model.parameters())\n"
        "    with open(f\"{os.environ['SUMS']}-{os.environ['RANK']}\", 'a') as file:\n"
        "        print(float(total), file=file)\n"
        "    return metrics\n"
        "unimatch.unimatch_step = spoilt\n"
        "run_main(lambda: unimatch.main(sys.argv[1:]))\n",
        encoding="utf-8",
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2", script)
    arguments = [*data.arguments(tmp_path / "run"), *SKIP, "batch_size=1"]
    ended = run_script(*launcher, *arguments, env={"PYTHONPATH": ".", "SUMS": str(tmp_path / "sums")})
    assert ended.returncode == 0, ended.stderr
    assert "1 step was not finite and undone up to iteration 2" in ended.stdout
    first, second = ((tmp_path / f"sums-{rank}").read_text().split() for rank in (0, 1))
    assert first == second and len(first) == 3  # before each step of the optimiser
    assert first[1] == first[2] != first[0]
