"""scripts/export.py: what is refused before any work. What it writes is in test_exported.py."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from scripts import export
from tests.helpers import make_dataset, make_model
from util.errors import ConfigError


def test_another_suffix_is_refused_before_the_checkpoint_is_read():
    for out in ("model.pth", "model", "onnx"):
        with pytest.raises(ConfigError, match=rf"--out {out}: the suffix must be one of \.pt2, \.onnx"):
            export.main(["--checkpoint", "none.pth", "--out", out])


def test_missing_packages_are_named_with_the_way_out(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(ConfigError, match=r"needs onnx, onnxscript, onnxruntime: pip install -r requirements-tools"):
        export.main(["--checkpoint", "none.pth", "--out", "model.onnx"])


def test_no_input_and_no_foreign_file_is_replaced(tmp_path):
    data = make_dataset(tmp_path / "data", val=1)
    checkpoint, foreign = tmp_path / "model.pt2", tmp_path / "other.pt2"
    torch.save(make_model(nclass=3).state_dict(), checkpoint)
    foreign.write_bytes(b"mine")
    before = checkpoint.read_bytes()
    arguments = ["--config", str(data.config), "--checkpoint", str(checkpoint)]
    with pytest.raises(ConfigError, match="is the checkpoint"):
        export.main([*arguments, "--out", str(checkpoint)])
    with pytest.raises(ConfigError, match="did not write it"):
        export.main([*arguments, "--out", str(foreign)])
    assert checkpoint.read_bytes() == before and foreign.read_bytes() == b"mine"


def test_a_torch_without_the_exporter_is_told_at_once(monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f, dynamo=False: None)  # as 2.4 has it
    with pytest.raises(ConfigError, match=r"--out model\.onnx needs PyTorch 2\.5 or newer, this is .*\.pt2"):
        export.main(["--checkpoint", "none.pth", "--out", "model.onnx"])
