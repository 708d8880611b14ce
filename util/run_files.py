"""Names of the files that a run writes into its save path.

`docs/training.md` says what each is for, `util/checkpoint.py` when a checkpoint takes the place of another.
"""

LATEST, PREVIOUS, BEST, MID_EPOCH = "latest.pth", "previous.pth", "best.pth", "midway.pth"
EPOCHS = "epoch-*.pth"
LOG_FILE, CONFIG_FILE, CURVES_FILE = "train.log", "config.yaml", "metrics.csv"
INFO_FILE = "run.json"  # how the run was started
SENT_FILE = "sent-*.json"  # what a logger's server has, a file for each such logger
# `--resume never` moves these aside.
RESULTS = (LATEST, PREVIOUS, BEST, MID_EPOCH, EPOCHS, "*.damaged-*", LOG_FILE, CONFIG_FILE, INFO_FILE)
RESULTS += ("events.out.tfevents.*", CURVES_FILE, SENT_FILE, "wandb")
