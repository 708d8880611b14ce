"""model/backbone/positions.py: the formula gives what DINOv2's own interpolation gives."""

from __future__ import annotations

import pytest
import torch

from model.backbone.dinov2 import DINOv2


@pytest.mark.parametrize("grid", [(1, 2), (20, 36), (37, 37), (37, 40), (3, 80)])
def test_exported_positions_are_those_of_the_model(grid):
    torch.manual_seed(0)
    backbone = DINOv2(width=4, depth=0, heads=1, taps=())
    with torch.no_grad():
        expected = backbone.positions(grid)
        backbone.exporting = True
        found = backbone.positions(grid)
    assert found.shape == (1, 1 + grid[0] * grid[1], 4)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert grid != (37, 37) or torch.equal(found, expected)
