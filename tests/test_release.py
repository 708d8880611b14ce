"""A run of the published code, continued: its checkpoint counts as one of ours after the same epochs."""

from __future__ import annotations

import copy
import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import supervised
import unimatch
import unimatch_v2
from dataset.catalog import CATALOG
from dataset.lists import read_list
from tests.helpers import PROJECT_ROOT, assert_same, make_dataset, photo, save
from util.config import Config, to_dict
from util.release import adopt, is_release, without_frozen
from util.schedule import build_optimizer

NETWORKS = {"model": "model", "model_ema": "teacher"}  # in the release's checkpoints, and in ours
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_of_the_release_goes_on_at_its_next_epoch_to_the_same_end(tmp_path, capsys):
    data = make_dataset(tmp_path / "data", labeled=4, unlabeled=1, val=1)
    arguments = ["--set", "epochs=2"]
    supervised.main([*data.arguments(tmp_path / "whole"), *arguments])
    state = torch.load(tmp_path / "whole" / "previous.pth", weights_only=True)
    release = {
        "model": {f"module.{name}": tensor for name, tensor in state["model"].items()},
        "optimizer": state["optimizer"],
        "epoch": 0,
        "previous_best": np.float64(state["previous_best"]),
    }
    path = tmp_path / "run"
    path.mkdir()
    torch.save(release, path / "latest.pth")
    capsys.readouterr()
    supervised.main([*data.arguments(path), *arguments])
    out = capsys.readouterr().out
    assert f"note: {path}/latest.pth is a checkpoint of the published code after 1 epochs" in out
    assert "whose epochs have 2 iterations; its best epoch is not told\n" in out
    assert re.search(r"1 of 2 epochs are done, best mIoU \d+\.\d\d\n", out)
    whole, continued = (torch.load(folder / "latest.pth", weights_only=True) for folder in (tmp_path / "whole", path))
    assert continued["epoch"] == 2 and continued["previous_best"] == whole["previous_best"]
    assert all(torch.equal(tensor, continued["model"][name]) for name, tensor in whole["model"].items())
    for number, values in whole["optimizer"]["state"].items():
        assert torch.equal(values["momentum_buffer"], continued["optimizer"]["state"][number]["momentum_buffer"])
    for folder in (tmp_path / "whole", path):
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_run_of_unimatch_v2_s_release_goes_on_with_its_teacher(tmp_path, capsys):
    data, path = make_dataset(tmp_path / "data", val=1), tmp_path / "run"
    data.configure(epochs=2, optimizer="adamw", conf_thresh=0.4)
    unimatch_v2.main(data.arguments(tmp_path / "whole"))
    state = torch.load(tmp_path / "whole" / "previous.pth", weights_only=True)
    release = {name: {f"module.{key}": tensor for key, tensor in state[own].items()} for name, own in NETWORKS.items()}
    release |= {"optimizer": state["optimizer"], "epoch": 0, "best_epoch": 0, "best_epoch_ema": 0}
    release |= {"previous_best": np.float64(99), "previous_best_ema": np.float64(state["previous_best"])}
    path.mkdir()
    torch.save(release, path / "latest.pth")
    capsys.readouterr()
    unimatch_v2.main(data.arguments(path))
    assert "is a checkpoint of the published code after 1 epochs" in (out := capsys.readouterr().out)
    assert "is not told" not in out
    whole, continued = (torch.load(folder / "latest.pth", weights_only=True) for folder in (tmp_path / "whole", path))
    for key in ("model", "teacher", "optimizer", "teacher_updates", "epoch", "previous_best", "best_epoch"):
        assert_same(whole[key], continued[key], key)


# Of each of the release's files: the method, the split whose files are made small, and what makes the run quick.
RECIPES = {
    "pascal": (unimatch, "92", {"backbone": "resnet10", "crop_size": 33}),
    "cityscapes": (unimatch, "1_16", {"backbone": "resnet10", "crop_size": 33}),
    "coco": (unimatch, "1_512", {"crop_size": 33}),
    "v2_pascal": (unimatch_v2, "92", {"crop_size": 28, "batch_size": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_releases_files_train_for_an_epoch_on_miniatures_of_their_data(name, tmp_path, capsys):
    """The YAML files as they are written for those programs, but for data_root, and files named as in the splits."""
    method, split, changes = RECIPES[name]
    info, root = CATALOG[name.removeprefix("v2_")], tmp_path / "data"
    splits = PROJECT_ROOT / "splits" / info.name
    lists = {"labeled": read_list(splits / split / "labeled.txt")[:4], "val": read_list(splits / "val.txt")[:2]}
    rng = np.random.default_rng(0)
    for kind, samples in lists.items():
        for index, sample in enumerate(samples):
            save(root / sample.image, photo(seed=index, size=(40, 34)))
            save(root / sample.label, rng.integers(0, len(info.classes), (34, 40), dtype=np.uint8))
        lines = [f"{sample.image} {sample.label}" for sample in samples]
        (tmp_path / f"{kind}.txt").write_text("\n".join(lines))
    first = lists["labeled"][0].image
    pool = [f"{first.rpartition('/')[0]}/unlabelled{index}{first[-4:]}" for index in range(4)]
    for index, image in enumerate(pool):
        save(root / image, photo(seed=9 + index, size=(40, 34)))
    (tmp_path / "pool.txt").write_text("\n".join(pool))
    config = tmp_path / "release.yaml"
    text = (PROJECT_ROOT / f"tests/reference/release_configs/{name}.yaml").read_text()
    config.write_text(re.sub(r"(?m)^data_root: .*$", f"data_root: {root}", text))

    arguments = ["--config", str(config), "--labeled-id-path", str(tmp_path / "labeled.txt")]
    if info.unlabeled != "train2017":  # COCO's is a folder of the data, and the default
        arguments += ["--unlabeled-id-path", str(tmp_path / "pool.txt")]
    changes = changes | {"epochs": 1, "pretrained": "false", "workers": 0, "device": "cpu"}
    changes["val_id_path"] = tmp_path / "val.txt"
    settings = [f"{key}={value}" for key, value in changes.items()]
    method.main([*arguments, "--save-path", str(tmp_path / "run"), "--set", *settings])
    printed = capsys.readouterr().out
    assert f"4 labelled, 2 validation, 4 unlabelled images, {len(info.classes)} classes" in printed
    state = torch.load(tmp_path / "run/latest.pth", weights_only=True)
    assert state["epoch"] == 1 and state["config"]["eval_mode"] == info.eval_mode
    shutil.rmtree(tmp_path / "run")


class _Net(nn.Module):
    """Some parameters of either group never get a gradient, as in DPT on DINOv2."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ParameterList(nn.Parameter(torch.full((k,), float(k))) for k in (1, 2, 3))
        self.head = nn.ParameterList(nn.Parameter(torch.full((k,), float(k))) for k in (4, 5, 6))
        self.unused = (self.backbone[1], self.head[0])

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        unused = {id(p) for p in self.unused}
        sum(p.square().sum() for p in self.parameters() if id(p) not in unused).backward()
        optimizer.step()


def test_parameters_without_a_gradient_are_taken_out_of_the_releases_optimizer():
    """Its groups hold them; ours do not. The next step is the same."""
    theirs, ours = _Net(), _Net()
    optimizer = build_optimizer(theirs, 0.1, 2, kind="adamw")
    theirs.step(optimizer)
    ours.load_state_dict(theirs.state_dict())
    for parameter in ours.unused:
        parameter.requires_grad_(False)
    own = build_optimizer(ours, 0.1, 2, kind="adamw")
    own.load_state_dict(without_frozen(copy.deepcopy(optimizer.state_dict()), ours))
    theirs.step(optimizer)
    ours.step(own)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    state = own.state_dict()
    assert without_frozen(state, ours) is state  # of our own, nothing is taken out


def test_of_a_locked_backbone_the_releases_optimizer_holds_nothing():
    theirs, ours = _Net(), _Net()
    for net in (theirs, ours):
        net.backbone.requires_grad_(False)
    optimizer = build_optimizer(theirs, 0.1, 2, kind="adamw")
    theirs.step(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 3]
    ours.load_state_dict(theirs.state_dict())
    ours.unused[1].requires_grad_(False)
    own = build_optimizer(ours, 0.1, 2, kind="adamw")
    own.load_state_dict(without_frozen(copy.deepcopy(optimizer.state_dict()), ours))
    theirs.step(optimizer)
    ours.step(own)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("state", [{}, {"param_groups": 3, "state": {}}, {"param_groups": [1], "state": 2}, [1]])
def test_what_is_no_optimizers_state_is_left_for_the_loader_to_refuse(state):
    net = _Net()
    net.unused[0].requires_grad_(False)
    assert without_frozen(state, net) is state


def test_v2s_checkpoint_brings_its_teacher_whose_best_is_followed():
    state = {"model": {}, "model_ema": {"module.a": torch.ones(1)}, "optimizer": {}, "epoch": 4, "best_epoch": 1}
    state |= {"previous_best": 50.0, "previous_best_ema": 60.0, "best_epoch_ema": 2}
    assert is_release(state)
    values = {"data_root": "data", "val_id_path": "val.txt", "classes": ("a", "b"), "crop_size": 28, "epochs": 9}
    cfg = Config(dataset="tiny", batch_size=2, lr=0.1, model="dpt", backbone="dinov2_small", **values)
    ours = adopt(state, to_dict(cfg), {"method": "unimatch_v2"}, steps=10)
    assert (ours["epoch"], ours["iteration"], ours["previous_best"], ours["best_epoch"]) == (5, 50, 60.0, 3)
    assert ours["teacher"] is state["model_ema"] and int(ours["teacher_updates"]) == 50
    assert not is_release(ours)
    ours = adopt(state, {**to_dict(cfg), "evaluate": "student"}, {"method": "unimatch_v2"}, steps=10)
    assert (ours["previous_best"], ours["best_epoch"]) == (50.0, 2)
