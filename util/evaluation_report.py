"""The files of an evaluation: metrics.json, a table, and pictures of confusions, calibration and the worst images."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dataset.files import IGNORE_INDEX
from dataset.lists import Sample
from dataset.source import DataSource
from dataset.transform import normalize, to_tensor
from util.analysis import BINS, BOUNDARY_SHARE, Analysis
from util.config import to_dict
from util.evaluate import Result, center_crop, class_scores
from util.metrics import mean_iou
from util.outputs import MARK, TABLE_HEADER, save_picture, writing
from util.plots import calibration_chart, class_chart, confusion_chart, contact_sheet
from util.prediction import overlay
from util.trained import Trained
from util.visualize import errors, full_palette

FILES = ("metrics.json", "classes.csv", "classes.png", "confusion.png", "calibration.png", "worst.png")


class View(NamedTuple):
    """How a validation image is seen; see `util.evaluate.class_scores`."""

    mode: str
    crop_size: int
    scales: tuple[float, ...]
    flip: bool


class Report:
    """What is known after an evaluation, and its files."""

    def __init__(
        self,
        trained: Trained,
        samples: Sequence[Sample],
        view: View,
        result: Result,
        analysis: Analysis,
        palette: Sequence[tuple[int, int, int]],
    ) -> None:
        self.palette = full_palette(palette)
        self.trained, self.samples, self.view, self.result, self.analysis = trained, samples, view, result, analysis
        confusion = result.confusion.double()
        self.accuracy = 100 * confusion.diagonal() / confusion.sum(dim=1)  # NaN without a pixel in the labels
        self.pixel_accuracy = float(100 * confusion.diagonal().sum() / confusion.sum())

    def metrics(self) -> dict[str, Any]:
        """Everything as plain values, percentages from 0 to 100 but for `ece`, None for what is not defined."""
        cfg, checkpoint, result = self.trained.cfg, self.trained.checkpoint, self.result
        calibration = self.analysis.calibration
        epoch = checkpoint.get("epoch") if isinstance(checkpoint, dict) else None
        sha256 = self.trained.sha256()
        return _plain(
            {
                "tool": MARK,
                "mIoU": result.miou,
                "pixel_accuracy": self.pixel_accuracy,
                "mean_accuracy": float(self.accuracy.nanmean()),
                "boundary_mIoU": mean_iou(self.analysis.boundary_iou),
                "boundary_distance": f"{BOUNDARY_SHARE} of the image's diagonal",
                "expected_calibration_error": 100 * calibration.ece,
                "ece": calibration.ece,  # the same from 0 to 1, as papers give it
                "confident": {"conf_thresh": cfg.conf_thresh}
                | {key: 100 * value for key, value in self.analysis.confident.items()},
                "classes": [dict(zip(TABLE_HEADER.split(","), row, strict=True)) for row in self._table()],
                "calibration": {
                    "bins": BINS,
                    **{key: values.tolist() for key, values in calibration._asdict().items()},
                },
                "confusion": result.confusion.tolist(),
                "images": len(self.samples),
                "view": self.view._asdict(),
                "checkpoint": {
                    "path": str(self.trained.path),
                    "sha256": sha256,
                    "weights": self.trained.weights,
                    "epoch": epoch if isinstance(epoch, int) else None,
                },
                "checkpoint_sha256": sha256,
                "config": to_dict(cfg),
            }
        )

    def _table(self) -> list[list[Any]]:
        confusion, classes = self.result.confusion, self.trained.cfg.classes
        columns = (
            self.result.iou,
            self.accuracy,
            self.analysis.boundary_iou,
            confusion.sum(dim=1),
            confusion.sum(dim=0),
        )
        values = zip(*(column.tolist() for column in columns), strict=True)
        return [[index, name, *row] for index, (name, row) in enumerate(zip(classes, values, strict=True))]

    def summary(self) -> list[str]:
        """Lines for the screen, beside the table of IoUs."""
        thresh = self.trained.cfg.conf_thresh
        share, right = (100 * self.analysis.confident[key] for key in ("share", "accuracy"))
        return [
            f"  pixel accuracy {self.pixel_accuracy:.2f}, mean accuracy {float(self.accuracy.nanmean()):.2f}, "
            f"boundary mIoU {mean_iou(self.analysis.boundary_iou):.2f}",
            f"  expected calibration error {100 * self.analysis.calibration.ece:.2f}; {share:.2f} of the pixels are at "
            f"least {thresh:g} confident, and {right:.2f} of these right",
        ]

    def show(
        self, model: nn.Module, source: DataSource, number: int, device: torch.device
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pixels (H, W, 3), the label (H, W) and the predicted classes (H, W) of an image, uint8."""
        image, label = map(to_tensor, source.load(self.samples[number]))
        if self.view.mode == "center_crop":
            image, label = center_crop(image, self.view.crop_size), center_crop(label, self.view.crop_size)
        with torch.inference_mode():
            classes = class_scores(
                model, normalize(image[None].to(device), self.trained.cfg.normalization), *self.view
            ).classes()[0]
        rgb = image[list(self.trained.cfg.rgb_channels)]
        return rgb.permute(1, 2, 0).numpy(), label.numpy(), classes.byte().cpu().numpy()

    def write(
        self, folder: Path, worst: Sequence[tuple[int, float, tuple[np.ndarray, np.ndarray, np.ndarray]]]
    ) -> None:
        """Write FILES; `worst` has number, mIoU and what `show` gives of the images to be shown. Raises ConfigError."""
        classes, calibration = self.trained.cfg.classes, self.analysis.calibration
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([TABLE_HEADER.split(","), *_plain(self._table())])
        for name, content in (("metrics.json", json.dumps(self.metrics(), indent=1)), ("classes.csv", text.getvalue())):
            with writing(folder / name) as file:
                file.write(content.encode("utf-8", "backslashreplace"))
        series = {"IoU": self.result.iou, "accuracy": self.accuracy, "boundary IoU": self.analysis.boundary_iou}
        title = f"{self.trained.path.name}: mIoU {self.result.miou:.2f} ({self.view.mode}, {len(self.samples)} images)"
        pictures = {
            "classes.png": class_chart(classes, {name: values.numpy() for name, values in series.items()}, title),
            "confusion.png": confusion_chart(self.result.confusion.numpy(), classes),
            "calibration.png": calibration_chart(
                *(values.numpy() for values in calibration), calibration.ece, self.trained.cfg.conf_thresh
            ),
        }
        if worst:
            pictures["worst.png"] = self._worst_page(worst)
        else:  # an earlier one would be of another evaluation; `check_targets` has seen that it is a tool's own
            (folder / "worst.png").unlink(missing_ok=True)
        for name, picture in pictures.items():
            save_picture(picture, folder / name)

    def _worst_page(self, worst: Sequence[Any]) -> Any:
        palette, cells, present = self.palette, [], set()
        for number, miou, (image, label, classes) in worst:
            present |= set(np.unique(classes[label != IGNORE_INDEX])) | set(np.unique(label)) - {IGNORE_INDEX}
            pictures = (
                image,
                overlay(image, label, palette),
                overlay(image, classes, palette),
                errors(image, label, classes),
            )
            cells.append((f"{miou:.1f}  {Path(self.samples[number].image).name}", pictures))
        titles = ("input", "truth", "prediction", "wrong: orange")
        return contact_sheet(cells, titles, self.trained.cfg.classes, palette, sorted(map(int, present)), across=1)


def _plain(value: Any) -> Any:
    """The same without NaN, which JSON has no word for, and without tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
