"""What several tests need: a tiny data set, small models, filled weights, batches, the real scripts as subprocesses."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dataset import DataError
from dataset.views import UnlabeledViews
from model import WeightsError, build_model
from model.backbone import create_backbone
from scripts.benchmark.naive import paste_partner
from tests.reference import formulas
from util.cli import run_main

PROJECT_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class TinyData:
    """Paths of a tiny data set: its config, its three lists, and the folder that their lines are relative to."""

    root: Path
    config: Path
    labeled: Path
    unlabeled: Path
    val: Path

    def settings(self) -> dict[str, Any]:
        """The keys of the config file."""
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))

    def configure(self, **changes: Any) -> None:
        """Write the config anew with `changes`; a value of None leaves its key out."""
        values = {key: value for key, value in {**self.settings(), **changes}.items() if value is not None}
        self.config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def arguments(self, save_path: Path | str) -> list[str]:
        """The arguments of a method script for a run on this data."""
        return ["--config", str(self.config), "--labeled-id-path", str(self.labeled), "--save-path", str(save_path)]


def make_dataset(
    root: Path,
    labeled: int = 4,
    unlabeled: int = 6,
    val: int = 2,
    size: tuple[int, int] = (40, 32),
    nclass: int = 3,
    seed: int = 0,
) -> TinyData:
    """Write `size` (width, height) pictures of coloured stripes, labels, lists and a config of seconds-long training.

    Images are `images/NAME.jpg`, labels `labels/NAME.png` with every class and a row of 255; NAME is `labeled0`,
    `unlabeled0`, `val0` and so on. Unlabelled images have no label on disk. Lists and config lie in `root`.
    """
    rng = np.random.default_rng(seed)
    root = Path(root)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    width, height = size
    colours = rng.integers(0, 256, (nclass, 3))
    for kind, count in (("labeled", labeled), ("unlabeled", unlabeled), ("val", val)):
        lines = []
        for index in range(count):
            name = f"{kind}{index}"
            stripes = (np.arange(width) * nclass // width + rng.integers(nclass)) % nclass
            label = np.tile(stripes.astype(np.uint8), (height, 1))
            image = colours[label] + rng.normal(0, 20, (height, width, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{name}.jpg", quality=90)
            if kind == "unlabeled":
                lines.append(f"images/{name}.jpg")
                continue
            label[0] = 255
            Image.fromarray(label).save(root / f"labels/{name}.png")
            lines.append(f"images/{name}.jpg labels/{name}.png")
        (root / f"{kind}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    data = TinyData(root, root / "config.yaml", *(root / f"{kind}.txt" for kind in ("labeled", "unlabeled", "val")))
    settings = {
        "dataset": "tiny",
        "data_root": str(root),
        "classes": [f"class {i}" for i in range(nclass)],
        "val_id_path": str(data.val),
        "unlabeled_id_path": str(data.unlabeled),
        "crop_size": 32,
        "epochs": 1,
        "batch_size": 2,
        "lr": 0.001,
        "backbone": "resnet10",
        "pretrained": False,
        "device": "cpu",
        "workers": 0,
        "log_interval": 1,
    }
    data.config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return data


def run_script(
    *args: str | Path, env: Mapping[str, str] | None = None, timeout: float = 300, cwd: Path | str = PROJECT_ROOT
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS...` from the project root, such as `run_script("unimatch.py", "--config", ...)`.

    `env` is added to the environment, in which OpenMP gets one thread. stdout and stderr are captured as text.
    """
    command = [sys.executable, *map(str, args)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=variables, timeout=timeout, capture_output=True, text=True, check=False)


def run_here(module: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """As `run_script`, but in this process, which has imported everything: `run_here("scripts.predict", ...)`."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    main = importlib.import_module(module).main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(lambda: main([*map(str, args)]))
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess([module, *map(str, args)], status, out.getvalue(), err.getvalue())


def load_checkpoint(path: Path, name: str = "latest.pth") -> dict[str, Any]:
    """A checkpoint of the run saved in `path`."""
    return torch.load(path / name, weights_only=True)


def assert_same(first: Any, second: Any, where: str = "checkpoint") -> None:
    """Nested containers are equal, tensors bit for bit."""
    if isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_same(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    else:
        assert first == second, where


def model_config(**changes: Any) -> SimpleNamespace:
    """The keys of a config that shape a model and how it computes; by default a ResNet-10 with 5 classes."""
    values = {
        "backbone": "resnet10",
        "nclass": 5,
        "dilations": (6, 12, 18),
        "replace_stride_with_dilation": (False, False, True),
        "pretrained": False,
        "checkpoint_activations": "none",
        "channels_last": False,
        "amp": "none",
        "compile": False,
        "cuda_graphs": False,
    }
    return SimpleNamespace(**values | changes)


def make_model(**changes: Any) -> torch.nn.Module:
    """The model of `model_config`, with the same random weights each time. torch's generator is seeded."""
    torch.manual_seed(0)
    return build_model(model_config(**changes))


def reference_batch(
    seed: int, i: int, batch: int = 4, size: int = 49, nclass: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[tuple[torch.Tensor, torch.Tensor], UnlabeledViews, UnlabeledViews]:
    """Step i's batch of the reference figures: ((image, label), views, the CutMix partner's views).

    The partner is pasted into the strong views, as the loader does; in the figures' inputs it is not yet.
    """
    image, label = formulas.labeled(seed + 10 + i, batch, size, nclass)
    views = []
    for offset in (100, 200):
        parts = [torch.from_numpy(part) for part in formulas.unlabeled(seed + offset + i, batch, size)]
        views.append(UnlabeledViews(*(part.to(dtype) if part.ndim == 4 else part for part in parts)))
    u, u_mix = views
    return (torch.from_numpy(image).to(dtype), torch.from_numpy(label)), paste_partner(u, u_mix), u_mix


def save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    """Save an array as an image, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def photo(channels: int = 3, seed: int = 0, size: tuple[int, int] = (24, 20)) -> np.ndarray:
    """Noise of `size` (width, height), so that files are long enough to be cut anywhere."""
    return np.random.default_rng(seed).integers(0, 256, (*size[::-1], channels), dtype=np.uint8)


def complaint(function: Callable, *args: Any, error: type[Exception] = DataError, **options: Any) -> str:
    """The message of the `error` that a call raises: always one line."""
    with pytest.raises(error) as caught:
        function(*args, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def refusal(capsys: pytest.CaptureFixture[str], main: Callable[[], None]) -> str:
    """The error line with which a script's `main` ends, status 2."""
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def filled(shapes: Iterable[tuple[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """A state dict of these (name, shape) pairs, each tensor filled with its own number: tiny on disk."""
    return {name: torch.tensor(float(i % 97 + 1)).expand(tuple(shape)) for i, (name, shape) in enumerate(shapes)}


def filled_backbone(name: str = "resnet18") -> dict[str, torch.Tensor]:
    """The state dict of the backbone of that name, filled so."""
    with torch.device("meta"):
        own = create_backbone(name).state_dict()
    return filled((key, tensor.shape) for key, tensor in own.items())


def assert_loaded(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Every tensor of `state` has arrived."""
    own = module.state_dict()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor.to(own[name].dtype)), name


weights_error = partial(complaint, error=WeightsError)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to within 1e-4 of the largest value, and not constant."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
