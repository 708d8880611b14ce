"""Fixtures that several test modules use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import model.weights
from tests.helpers import TinyData, make_dataset


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, as the scripts have under run_script: the number of threads shapes the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes last."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU and, for tests then marked gpu, a GPU."""
    return torch.device(request.param)


@pytest.fixture
def draws_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, channel dropout draws what it draws on the CPU, as for the reference figures."""
    draw = torch.nn.functional.dropout2d
    monkeypatch.setattr(torch.nn.functional, "dropout2d", lambda x, *args, **more: draw(x.cpu(), *args, **more).to(x))


@pytest.fixture
def data(tmp_path: Path) -> TinyData:
    """A tiny data set of the test's own, to be spoiled at will; modules that train on one share one of their own."""
    return make_dataset(tmp_path / "data")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root without weights; returns its folder `pretrained`."""
    monkeypatch.setattr(model.weights, "PROJECT_ROOT", tmp_path)
    folder = tmp_path / "pretrained"
    folder.mkdir()
    return folder
