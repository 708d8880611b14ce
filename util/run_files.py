"""Names of the files that a run writes into its save path, and whether a run wrote what is there.

`docs/training.md` says what each is for, `util/checkpoint.py` when a checkpoint takes the place of another.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

LATEST, PREVIOUS, BEST, MID_EPOCH = "latest.pth", "previous.pth", "best.pth", "midway.pth"
EPOCHS = "epoch-*.pth"
LOG_FILE, CONFIG_FILE, CURVES_FILE = "train.log", "config.yaml", "metrics.csv"
INFO_FILE = "run.json"  # how the run was started
SENT_FILE = "sent-*.json"  # what a logger's server has, a file for each such logger
# `--resume never` moves these aside.
RESULTS = (LATEST, PREVIOUS, BEST, MID_EPOCH, EPOCHS, "*.damaged-*", LOG_FILE, CONFIG_FILE, INFO_FILE)
RESULTS += ("events.out.tfevents.*", CURVES_FILE, SENT_FILE, "wandb")
# Keys of every config that a run wrote, which holds all keys, and rarely in one that a person wrote.
CONFIG_KEYS = {"dataset", "classes", "palette", "lr_multi", "reference_batch", "conf_thresh", "seed"}
MOST = 200_000  # characters of a file that are looked at; a run's own config and run.json are shorter


def epoch_files(save_path: Path) -> list[Path]:
    """The checkpoints of single epochs, in their order; `epoch-best.pth` is somebody else's."""
    return [path for path in sorted(save_path.glob(EPOCHS)) if re.fullmatch(r"epoch-[0-9]+\.pth", path.name)]


def foreign_files(save_path: Path) -> list[Path]:
    """The files in `save_path` that have a run's names, but that no run wrote, of any version of this project."""
    found = []
    for name, is_own in ((LOG_FILE, _is_log), (CONFIG_FILE, _is_config), (INFO_FILE, _is_info)):
        try:
            with open(save_path / name, encoding="utf-8", errors="replace") as file:
                text = file.read(MOST)
        except FileNotFoundError:
            continue
        if text.strip() and not is_own(text):  # of an empty one nothing is lost
            found.append(save_path / name)
    return found


def _is_log(text: str) -> bool:
    return re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", text) is not None


def _is_config(text: str) -> bool:
    """A run writes all keys, and nothing that reading and writing would lose, such as a comment."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.keys() >= CONFIG_KEYS and yaml.safe_dump(values, sort_keys=False) == text


def _is_info(text: str) -> bool:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"method", "torch"} <= values.keys()
