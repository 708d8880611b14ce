"""A method's script in float64: python scripts/chaos/double.py METHOD.py [its arguments].

In float32, training on a few small images makes of a sum's last digit a difference of a percent within some steps.
"""

import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    torch.set_default_dtype(torch.float64)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
