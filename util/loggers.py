"""Where a run's numbers and pictures go besides the screen: TensorBoard, Weights & Biases, MLflow, or a CSV file.

The key `logger` names them; each package is imported only where it is asked for. Curves of a continued run have each
point once: what was written from its `first_step` on, beyond its checkpoint, is hidden, cut off or not sent again.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import posixpath
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dataset.atomic import replacing
from dataset.errors import one_line
from util.errors import ConfigError, SavePathError
from util.run_files import CURVES_FILE, SENT_FILE

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "csv": None}
BEST_MIOU, LAST_MIOU = "eval/best_mIoU", "eval/mIoU"
CSV_HEADER = ("step", "name", "value")
TEXT_LIMIT = 500  # characters of a hyperparameter; MLflow refuses longer ones
PROJECT = "unimatch"  # of Weights & Biases and MLflow, unless their own environment variables say another


@dataclass(frozen=True)
class Place:
    """Where a run saves, the first step that it is going to write, and what distinguishes it from others."""

    folder: Path
    first_step: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flat(self) -> dict[str, int | float | str | bool]:
        """The hyperparameters as numbers and short texts."""
        kinds = (int, float, str, bool)
        values = {key: value if isinstance(value, kinds) else str(value) for key, value in self.hyperparameters.items()}
        return {key: value[:TEXT_LIMIT] if isinstance(value, str) else value for key, value in values.items()}


def check_loggers(names: Sequence[str]) -> None:
    """Import what `names` need. Raises ConfigError, one line, where a package is missing."""
    for name in names:
        package = PACKAGES[name]
        if package is None:
            continue
        try:
            importlib.import_module(package)
        except ImportError as error:
            why = "is not installed" if getattr(error, "name", None) == package else f"is broken ({one_line(error)})"
            raise ConfigError(
                f"logger: {name}: the package {package} {why}: pip install {package}, or leave {name} out of `logger`"
            ) from None


class TensorBoard:
    """Curves and pictures in an event file of the save path."""

    name, remote = "TensorBoard's file", False

    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(place.folder), purge_step=place.first_step)
        texts = {key: _utf8(value) if isinstance(value, str) else value for key, value in place.flat.items()}
        start = hparams(texts, {BEST_MIOU: 0.0, LAST_MIOU: 0.0})
        self._end = start[2]
        if place.first_step == 0:
            # As SummaryWriter.add_hparams does, which would begin a file, and a run, of its own.
            for summary in start[:2]:
                self._writer.file_writer.add_summary(summary)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(_utf8(tag), value, step)
        self._writer.flush()  # a run that is killed has them

    def pictures(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, picture in pictures.items():
            data = io.BytesIO()
            picture.save(data, "JPEG", quality=90, subsampling=0)  # add_image would write PNG, several times as large
            image = Summary.Image(
                height=picture.height, width=picture.width, colorspace=3, encoded_image_string=data.getvalue()
            )
            self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=_utf8(tag), image=image)]), step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.file_writer.add_summary(self._end)

    def close(self, failed: bool) -> None:
        self._writer.close()


class Csv:
    """A line `step,name,value` for each point of a curve, in CURVES_FILE of the save path. Pictures are left out."""

    name, remote = CURVES_FILE, False

    def __init__(self, place: Place) -> None:
        path = place.folder / CURVES_FILE
        kept = _rows_before(path, place.first_step)
        with replacing(path, durable=True) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([CSV_HEADER, *kept])
        self._file = open(path, "a", encoding="utf-8", errors="backslashreplace", newline="")  # noqa: SIM115
        self._rows = csv.writer(self._file, lineterminator="\n")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._rows.writerows((step, tag, repr(float(value))) for tag, value in values.items())
        self._file.flush()

    def pictures(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self, failed: bool) -> None:
        self._file.close()


def _rows_before(path: Path, first_step: int) -> list[list[str]]:
    """The rows of an earlier part of the run. A kill may have left a last one without its end. Raises SavePathError."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    header = ",".join(CSV_HEADER) + "\n"
    if not text.startswith(header):
        raise SavePathError(f"{path}: exists, and no run wrote it: move it away, or choose another --save-path")
    rows = csv.reader(io.StringIO(text[len(header) : text.rfind("\n") + 1], newline=""))
    return [row for row in rows if len(row) == 3 and row[0].isdecimal() and int(row[0]) < first_step]


class _Sent:
    """What was sent to a server, in a file of the save path: the run's name there, and the last step of each curve."""

    def __init__(self, place: Place, logger: str) -> None:
        self._path = place.folder / SENT_FILE.replace("*", logger)
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
            self.run, self._steps = str(known["run"]), {str(key): int(value) for key, value in known["steps"].items()}
            self.new = False
        except FileNotFoundError:
            self.run, self._steps, self.new = "", {}, True
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SavePathError(f"{self._path}: damaged: remove it, and {logger} begins a new run") from None

    def begin(self, run: str) -> None:
        self.run = run
        self._save()

    def unsent(self, values: Mapping[str, Any], step: int) -> dict[str, Any]:
        return {tag: value for tag, value in values.items() if step > self._steps.get(tag, -1)}

    def note(self, tags: Mapping[str, Any], step: int) -> None:
        self._steps.update(dict.fromkeys(tags, step))
        self._save()

    def _save(self) -> None:
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps({"run": self.run, "steps": self._steps}), encoding="utf-8")


class WeightsAndBiases:
    """A run of wandb, continued under the same id. WANDB_PROJECT and wandb's other variables apply."""

    name, remote = "wandb", True

    def __init__(self, place: Place) -> None:
        import wandb

        self._sent, self._picture = _Sent(place, "wandb"), wandb.Image
        if self._sent.new:
            self._sent.begin(secrets.token_hex(8))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self._sent.run,
            resume="allow",
            name=str(place.folder),
            dir=str(place.folder),
            config=place.flat,
            settings=wandb.Settings(console="off"),
        )
        # wandb's own count of steps never goes back, and a continued run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if new := self._sent.unsent(values, step):
            self._run.log({**new, "step": step})
            self._sent.note(new, step)

    def pictures(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        if new := self._sent.unsent(pictures, step):
            self._run.log({**{tag: self._picture(picture) for tag, picture in new.items()}, "step": step})
            self._sent.note(new, step)

    def finish(self) -> None:
        pass

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, continued under the same id. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply."""

    name, remote = "mlflow", True

    def __init__(self, place: Place) -> None:
        import mlflow

        self._mlflow, self._sent = mlflow, _Sent(place, "mlflow")
        if self._sent.new:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
            run = mlflow.start_run(run_name=str(place.folder))
            mlflow.log_params(place.flat)
            self._sent.begin(run.info.run_id)
        else:
            mlflow.start_run(run_id=self._sent.run)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if new := self._sent.unsent(values, step):
            self._mlflow.log_metrics({_mlflow_name(tag): value for tag, value in new.items()}, step=step)
            self._sent.note(new, step)

    def pictures(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        if new := self._sent.unsent(pictures, step):
            for tag, picture in new.items():
                self._mlflow.log_image(picture, f"{_mlflow_name(tag)}/{step:08}.png")
            self._sent.note(new, step)

    def finish(self) -> None:
        pass

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


Logger = TensorBoard | Csv | WeightsAndBiases | MLflow
KINDS = {"tensorboard": TensorBoard, "csv": Csv, "wandb": WeightsAndBiases, "mlflow": MLflow}


def open_logger(name: str, place: Place) -> Logger:
    """The logger of that name for the run. Raises OSError if the disk refuses, ConfigError if a server does."""
    kind = KINDS[name]
    if not kind.remote:
        return kind(place)
    try:
        return kind(place)
    except SavePathError:
        raise
    except Exception as error:  # whatever the network, the login or the server is about
        raise ConfigError(f"logger: {name}: cannot start: {one_line(error)}; or leave {name} out of `logger`") from None


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _mlflow_name(tag: str) -> str:
    """The tag in the characters that MLflow takes."""
    return posixpath.normpath(re.sub(r"[^\w\-. /:]", "_", tag))
