"""scripts/evaluate.py gives the mIoU that training logged, for every form of checkpoint."""

from __future__ import annotations

import json
import re

import pytest
import torch

import supervised
from scripts import evaluate
from tests.helpers import load_checkpoint, make_dataset
from util.run_files import LOG_FILE


@pytest.mark.slow
def test_evaluate_gives_the_logged_miou_to_the_last_digit(tmp_path, capsys):
    data = make_dataset(tmp_path / "data", val=3)
    data.configure(epochs=2, keep_last=2, backbone="resnet10", lr=0.05)
    supervised.main(data.arguments(tmp_path / "exp"))
    log = (tmp_path / "exp" / LOG_FILE).read_text(encoding="utf-8")
    logged = re.findall(r"^.*?mIoU +([0-9.]+)$", log, flags=re.M)
    exact = [load_checkpoint(tmp_path / "exp", f"epoch-000{epoch}.pth")["previous_best"] for epoch in (1, 2)]
    assert len(logged) == 2

    wrapped = load_checkpoint(tmp_path / "exp", "epoch-0001.pth")
    wrapped["model"] = {f"module.{name}": tensor for name, tensor in wrapped["model"].items()}
    torch.save(wrapped, tmp_path / "two_processes.pth")  # as DDP's state dict is called
    bare = tmp_path / "bare.pth"
    torch.save(wrapped["model"], bare)
    cases = [
        (tmp_path / "exp/epoch-0001.pth", 0, []),  # in mid-run
        (tmp_path / "exp/latest.pth", 1, []),
        (tmp_path / "two_processes.pth", 0, []),
        (bare, 0, ["--config", str(data.config)]),
    ]
    for path, epoch, further in cases:
        capsys.readouterr()
        evaluate.main(["--checkpoint", str(path), "--out", str(tmp_path / "out"), "--worst", "0", *further])
        shown = re.search(r"mIoU +([0-9.]+)$", capsys.readouterr().out, flags=re.M)[1]
        assert shown == logged[epoch]
        if epoch == 0:
            assert json.loads((tmp_path / "out/metrics.json").read_text())["mIoU"] == exact[0]
