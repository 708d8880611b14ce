"""scripts/make_figures.py: each picture of the documents is drawn, and small enough to be kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from model import build_model
from scripts.make_figures import main, read_curve
from util.config import load_config, to_dict
from util.errors import ConfigError
from util.run_files import BEST

pytest.importorskip("matplotlib")


def test_the_pictures_are_drawn_from_a_checkpoint_and_from_curves(data, tmp_path, capsys):
    cfg = load_config(data.config)
    torch.manual_seed(0)
    state = {"model": build_model(cfg).state_dict(), "config": to_dict(cfg)}
    torch.save(state, tmp_path / BEST)
    write_curves(tmp_path / "runs")
    main(["--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path / BEST), "--runs", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    for name in ("method", "views", "toy", "curves"):
        path = tmp_path / f"out/{name}.png"
        assert path.stat().st_size < 300_000 and f"{path}:" in printed
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert picture.width > 500 and pixels.std() > 5
        assert (pixels[:3] == 255).all(), "the background is white"


def write_curves(folder):
    """Two seeds of each method: mIoU 10, 20, 30 after 2, 4, 6 steps, and 2 more for the second seed."""
    for method in ("unimatch", "fixmatch", "supervised"):
        for seed in (0, 1):
            with SummaryWriter(str(folder / method / f"seed{seed}")) as writer:
                for epoch in (1, 2, 3):
                    writer.add_scalar("eval/mIoU", 10 * epoch + 2 * seed, 2 * epoch - 1)


def test_a_curve_is_read_by_the_steps_that_were_done(tmp_path):
    write_curves(tmp_path)
    assert read_curve(tmp_path / "fixmatch/seed1") == {2: 12, 4: 22, 6: 32}
    assert read_curve(tmp_path) == {}


def test_a_picture_that_no_tool_made_is_left_alone(tmp_path, capsys):
    path = tmp_path / "method.png"
    Image.new("RGB", (4, 4)).save(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"method\.png: exists, and these tools did not write it"):
        main(["--out", str(tmp_path)])
    assert path.read_bytes() == before
