"""Random arguments for training and every tool: no file that was there ever changes, and every error is one line.

The examples are the same in every run; `FUZZ=long` in the environment tries many more, others each time.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.prepare import toy
from model import build_model
from scripts import make_splits
from tests.helpers import make_dataset, run_here
from util.config import load_config, to_dict
from util.visualize import colorize

LONG = os.environ.get("FUZZ") == "long"
EXAMPLES = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": not LONG}

FILES = ("config.yaml", "val.txt", "labeled.txt", "images/val0.jpg", "labels/val0.png", "model.pth", "run/train.log")
FOLDERS = (".", "images", "labels", "mine", "link", "voc", "lists", "run", "new", "new/deep", "mine/b", "mine/c")
OUTPUTS = ("new/p.png", "new/p.jpg", "new/p.json", "new/p.pth", "images/p.png", "hard.png", "soft.png", "mine/toy.png")
PAGES = ("new/p.html", "run/p.html", "mine/report.html", "mine/report.txt")
PLACES = st.sampled_from([*FILES, *FOLDERS, *OUTPUTS, *PAGES, "missing"])

# Each tool's arguments: (option, its usual value); an option without one gets a place only sometimes.
TOOLS = {
    "make_splits": [("--images", "images"), ("--labels", "labels"), ("--output", "new"), ("--data-root", None)],
    "make_toy": [("--root", "new"), ("--preview", None)],
    "check_data": [
        *(("--config", "config.yaml"), ("--labeled-id-path", None), ("--unlabeled-id-path", None), ("--output", "new")),
    ],
    "prepare_data": [("", "pascal"), ("--source", "voc"), ("--root", "new"), ("--splits", "lists")],
    "convert_backbone": [("", "resnet50_tv"), ("--from", "model.pth"), ("--output", "new/p.pth")],
    "predict": [
        *(("--checkpoint", "model.pth"), ("--images", "images"), ("--out", "new"), ("--panel", None)),
        ("--contact-sheet", None),
    ],
    "evaluate": [("--checkpoint", "model.pth"), ("--config", None), ("--out", None)],
    "make_figures": [("--out", "new"), ("--runs", None)],
    "export": [("--checkpoint", "model.pth"), ("--out", "mine/model.pt2")],
    "report.__main__": [("", "@run"), ("--out", "new/p.html")],
    "plan": [("--config", "config.yaml"), ("--labeled-id-path", None), ("--unlabeled-id-path", None)],
    "unimatch": [
        *(("--config", "config.yaml"), ("--labeled-id-path", "labeled.txt"), ("--unlabeled-id-path", None)),
        ("--save-path", "new"),
    ],
}
# Hard links, among the names that a run or a tool would write.
LINKS = {
    "hard.png": "labels/val0.png",
    "mine/train.log": "config.yaml",
    "mine/b/metrics.csv": "val.txt",
    "mine/b/val.txt": "val.txt",
    "mine/c/latest.pth": "model.pth",
    "mine/c/p.pth": "model.pth",
}
NUMBERS = {
    "make_splits": ["--val=1", "--val=0.5", "--labeled=1/2", "--seed=3", "--force"],
    "make_toy": ["--seed=1", "--force"],
    "check_data": ["--workers=1", "--strict", "--show=0"],
    "prepare_data": ["--workers=1"],
    "convert_backbone": ["--force"],
    "predict": ["--save=overlay", "--keep-suffix", "--flip", "--colors=colorblind"],
    "evaluate": ["--flip", "--worst=1"],
    "make_figures": [],
    "export": [],
    "report.__main__": ["--images=0", "--images=1", "--colors=colorblind"],
    "plan": ["--gpus=2", "--gpu-memory=1", "--method=supervised", "--method=unimatch_v2"],
    "unimatch": ["--set=cache=ram", "--set=keep_last=1"],
}


@st.composite
def commands(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A tool and its arguments, in which places are relative; mostly the usual ones."""
    tool = draw(st.sampled_from(sorted(TOOLS if LONG else TOOLS.keys() - {"plan"})))  # a plan takes seconds
    arguments = []
    for option, usual in TOOLS[tool]:
        if not option:
            arguments.append(usual)
        elif usual is None and draw(st.booleans()):
            continue
        else:
            place = draw(PLACES) if usual is None or draw(st.integers(0, 2)) == 0 else usual
            arguments.append(f"{option}=@{place}")
    return tool, arguments + draw(
        st.lists(st.sampled_from(NUMBERS[tool]), max_size=2) if NUMBERS[tool] else st.just([])
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data, lists, a checkpoint and a stranger's files; links of both kinds that lead to a label and to a folder."""
    data = make_dataset(tmp_path_factory.mktemp("fuzz") / "world", labeled=2, unlabeled=2, val=2)
    lists = {"val_id_path": "val.txt", "unlabeled_id_path": "unlabeled.txt"}
    data.configure(backbone="resnet10", data_root="images/..", logger=["csv"], **lists)
    torch.manual_seed(0)
    cfg = load_config(data.config)
    torch.save({"model": build_model(cfg).state_dict(), "config": to_dict(cfg)}, data.root / "model.pth")
    (data.root / "mine").mkdir()
    names = ("report.txt", "report.html", "train.txt", "metrics.json", "method.png", "val0.png", "toy.png", "model.pt2")
    for name in names:
        (data.root / "mine" / name).write_text("a year's work")
    (data.root / "soft.png").symlink_to("labels/val0.png")
    (data.root / "link").symlink_to("images")
    (data.root / "images/back").symlink_to("..")
    # A part of Pascal VOC's download, and a list of it.
    for kind in ("JPEGImages", "SegmentationClass"):
        (data.root / "voc/VOC2012" / kind).mkdir(parents=True)
    shutil.copy(data.root / "images/val0.jpg", data.root / "voc/VOC2012/JPEGImages/a.jpg")
    with Image.open(data.root / "labels/val0.png") as label:
        colorize(label, cfg.palette).save(data.root / "voc/VOC2012/SegmentationClass/a.png")
    (data.root / "lists").mkdir()
    (data.root / "lists/all.txt").write_text("JPEGImages/a.jpg SegmentationClass/a.png\n")
    with inside(data.root):
        done = run_here("supervised", *data.arguments("run"))
    assert done.returncode == 0, done.stderr
    return data.root


def copy_world(world: Path, root: Path) -> None:
    """A copy with hard links in it."""
    shutil.copytree(world, root, symlinks=True)
    for name, target in LINKS.items():
        (root / name).parent.mkdir(exist_ok=True)
        os.link(root / target, root / name)


def forced(arguments: Sequence[str], root: Path) -> set[str]:
    """The files that `--force` lets a tool replace: those that it was told to write."""
    places = [argument.partition("=@")[2] for argument in arguments if argument.startswith("--output=")]
    if "--force" not in arguments:
        return set()
    lists = [f"{place}/{name}" for place in places for name in make_splits.LISTS]
    paths = [root / place for place in [*places, *lists]]
    return {(path.parent.resolve() / path.name).relative_to(root.resolve()).as_posix() for path in paths}


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In `folder` as the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def contents(root: Path) -> dict[str, bytes | str]:
    """What each path below `root` holds: a file's bytes, a link's target."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*files, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]:
            path = Path(folder, name)
            held = os.readlink(path) if path.is_symlink() else path.read_bytes()
            found[path.relative_to(root).as_posix()] = held
    return found


def module(tool: str) -> str:
    return tool if tool == "unimatch" else f"scripts.{tool}"


def run(tool: str, arguments: Sequence[str], root: Path) -> None:
    """Run the tool's main with its places in `root`; an error must be one line, or argparse's usage and one line."""
    argv = [argument.replace("@", f"{root}/") for argument in arguments]
    done = run_here(module(tool), *argv)
    status, err = done.returncode, done.stderr
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status in (0, 2) or (status, tool) == (1, "check_data"), (tool, argv, status, err)
    if status == 2:
        assert len(told) == 1 or "usage: " in err, (tool, argv, err)
        assert len(told) == 0 or len(told[0]) < 1000


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_no_tool_changes_a_file_that_was_there_and_each_error_is_one_line(world, monkeypatch):
    monkeypatch.setattr(toy, "SUBSETS", {"train": 9, "val": 8})

    @settings(max_examples=500 if LONG else 15, **EXAMPLES)
    @given(commands())
    def check(command: tuple[str, list[str]]) -> None:
        tool, arguments = command
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "world")
            copy_world(world, root)
            free = forced(arguments, root)
            before = {name: content for name, content in contents(root).items() if name not in free}
            with inside(root):
                run(tool, arguments, root)
                after = contents(root)
                assert {name: after.get(name) for name in before} == before, (tool, arguments)
                assert not [name for name in after if name.endswith((".tmp", ".part"))], (tool, arguments)
                run(tool, arguments, root)  # takes nothing that the first run wrote for an input
                again = contents(root)
                assert {name: again.get(name) for name in before} == before, (tool, arguments)
                assert again.keys() == after.keys(), (tool, arguments)

    check()


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_the_usual_arguments_are_those_of_the_tool(tool):
    """Else everything above would end at an option that is unknown."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(module(tool)).main(["--help"])
    options = [option for option, _ in TOOLS[tool] if option]
    options += [argument.partition("=")[0] for argument in NUMBERS[tool]]
    assert options and all(option in text.getvalue() for option in options)
