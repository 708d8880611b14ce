"""What an evaluation shows of training: how good the pseudo-labels are, and pictures of views and predictions.

The same few images each time, drawn as in the first epoch, so that curves and pictures can be compared. All of it is
made beside the evaluation, by the main process alone: a step does nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import nn

from dataset import DataError
from dataset.files import IGNORE_INDEX
from dataset.lists import Sample
from dataset.packing import collate, to_device
from dataset.semi import Key, TrainDataset, UnlabeledViews, ValDataset
from dataset.transform import IMAGENET, Normalization, normalize
from util.config import Config
from util.evaluate import center_crop, predict
from util.lists import spread
from util.precision import evaluation_copy
from util.run import Run
from util.semi import cutmix_reversed, pseudo_label
from util.visualize import WRONG, colorize, errors, panel

STATISTICS_IMAGES = 8  # of each kind, labelled and unlabelled
PANEL_ROWS = 3  # unlabelled images, and as many labelled ones, seen as the unlabelled ones are
VALIDATION_ROWS = 4
SIDE = 192  # pixels of a picture's longer side in a panel at most


class Views(NamedTuple):
    """Images as a step sees unlabelled ones, collated on the CPU, with the labels uint8 (B, S, S) of labelled ones."""

    batch: Any
    labels: torch.Tensor | None

    def on(self, device: torch.device, by: Normalization = IMAGENET) -> UnlabeledViews:
        """On `device`, normalised `by` these values, the strong views mixed."""
        _, views, *partner = to_device(self.batch, device, by=by)
        if partner:
            return views
        mixed = {
            name: cutmix_reversed(view, box)
            for name, view, box in (("strong1", views.strong1, views.box1), ("strong2", views.strong2, views.box2))
            if view is not None
        }
        return views._replace(**mixed)


class Monitor:
    """Statistics and pictures of `run`, whose images come from the datasets of its loaders."""

    def __init__(self, run: Run, train: TrainDataset, validation: ValDataset) -> None:
        self._run, self._train = run, train
        self._validation = ValDataset(spread(run.lists.val, VALIDATION_ROWS), validation.source)
        self._views: list[Views] | None = None

    def report(self, labeler: nn.Module, network: nn.Module, step: int) -> None:
        """Log statistics and pictures of `labeler`, which gives the pseudo-labels, and predictions of `network`."""
        log = self._run.log
        if not log.has_loggers:
            return
        copy = evaluation_copy(labeler)
        with torch.inference_mode():
            values, pictures = self._look_at_views(copy)
            copy = copy if network is labeler else evaluation_copy(network)
            pictures["views/validation"] = self._validation_panel(copy)
        log.scalars(values, step)
        log.pictures(pictures, step)

    def load_views(self) -> list[Views]:
        """The views, those of labelled images first, in batches of a step's size. They are decoded once."""
        if self._views is None:
            run, sampled = self._run, []
            for samples in (run.lists.labeled, run.lists.unlabeled or []):
                chosen = spread(samples, STATISTICS_IMAGES)
                sampled += self._collate(chosen, labeled=samples is run.lists.labeled)
            self._views = sampled
        return self._views

    def _collate(self, samples: Sequence[Sample], labeled: bool) -> list[Views]:
        cfg, train = self._run.cfg, self._train
        bare = [Sample(sample.image, None) for sample in samples]
        # A labelled image is needed for a key; its view is not used.
        dataset = TrainDataset(
            self._run.lists.labeled[:1], bare, train.source, cfg.crop_size, cfg.seed, train.strong_views, cfg.photometry
        )
        found = []
        for index, sample in enumerate(samples):
            partner = {"other_image": (index + 1) % len(samples), "reversed_batch": -1}.get(cfg.cutmix_partner, index)
            key = Key(int(labeled), 0, index, partner)  # the epoch keeps the draws of both kinds apart
            try:
                found.append((dataset[key], dataset.label_of_weak_view(key, sample) if labeled else None))
            except DataError:  # training reports it when it reads the file
                continue
        batches = []
        for start in range(0, len(found), cfg.batch_size):
            views, labels = zip(*found[start : start + cfg.batch_size], strict=True)
            batches.append(Views(collate(views), torch.stack(labels) if labeled else None))
        return batches

    def _look_at_views(self, labeler: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Statistics of the pseudo-labels, and a panel with a row for each of the first images of both kinds."""
        cfg, device = self._run.cfg, self._run.device
        counts = PseudoLabelCounts(cfg.nclass, cfg.conf_thresh, device)
        rows: dict[bool, list[list[Image.Image]]] = {False: [], True: []}
        for batch in self.load_views():
            u = batch.on(device, cfg.normalization)
            label, conf = pseudo_label(labeler(u.weak))
            truth = None if batch.labels is None else batch.labels.to(device)
            counts.add(label, conf, u.ignore_mask, truth)
            kind = rows[truth is not None]
            for index in range(min(len(label), PANEL_ROWS - len(kind))):
                kind.append(self._row(u, index, label[index], conf[index], None if truth is None else truth[index]))
        titles = ["weak view", *(f"strong view {number}" for number, _ in enumerate(self._strong(u), 1))]
        titles += ["pseudo-label", "confidence", f"counts: >= {cfg.conf_thresh:g}", "ignore mask", "truth"]
        sheet = [*rows[False], *rows[True]]
        return counts.shares(cfg.classes), {"views/train": panel(sheet, titles)} if sheet else {}

    def _strong(self, u: UnlabeledViews) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The strong views that the method has, each with its box."""
        if self._run.lists.unlabeled is None:
            return []
        return [(view, box) for view, box in ((u.strong1, u.box1), (u.strong2, u.box2)) if view is not None]

    def _row(
        self, u: UnlabeledViews, index: int, label: torch.Tensor, conf: torch.Tensor, truth: torch.Tensor | None
    ) -> list[Image.Image]:
        """One image's pictures. Of what counts, white pixels do, grey ones are unsure, black ones padding."""
        cfg = self._run.cfg
        pictures = [_photo(u.weak[index], cfg)]
        for view, box in self._strong(u):
            picture = _photo(view[index], cfg)
            if outline := Image.fromarray(255 * box[index].bool().byte().cpu().numpy()).getbbox():
                left, top, right, bottom = outline
                width = max(1, len(label) // 100)
                ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=WRONG, width=width)
            pictures.append(picture)
        counts = torch.where(conf >= cfg.conf_thresh, 255, 128).masked_fill(u.ignore_mask[index] == IGNORE_INDEX, 0)
        pictures.append(colorize(label.byte().cpu().numpy(), cfg.palette))
        greys = ((255 * conf).round(), counts, u.ignore_mask[index])
        pictures += [Image.fromarray(grey.byte().cpu().numpy()) for grey in greys]
        pictures.append(
            Image.new("RGB", (1, 1), "white") if truth is None else colorize(truth.cpu().numpy(), cfg.palette)
        )
        return [_small(picture) for picture in pictures]

    def _validation_panel(self, network: nn.Module) -> Image.Image:
        """A row for an image: input, truth, prediction, and where it is wrong."""
        cfg, rows = self._run.cfg, []
        for image, label in map(self._validation.__getitem__, range(len(self._validation))):
            if cfg.eval_mode == "center_crop":
                image, label = center_crop(image, cfg.crop_size), center_crop(label, cfg.crop_size)
            seen = normalize(image[None].to(self._run.device), cfg.normalization)
            classes = predict(network, seen, cfg.eval_mode, cfg.crop_size)[0].byte().cpu().numpy()
            pixels, truth = image[list(cfg.rgb_channels)].permute(1, 2, 0).numpy(), label.numpy()
            wrong = Image.fromarray(errors(pixels, truth, classes))
            pictures = [Image.fromarray(pixels), colorize(truth, cfg.palette), colorize(classes, cfg.palette), wrong]
            rows.append([_small(picture) for picture in pictures])
        return panel(rows, ["input", "truth", "prediction", "wrong: orange"])


class PseudoLabelCounts:
    """Pixels by their pseudo-label, on the device: valid ones, confident ones, and on labelled images right ones."""

    def __init__(self, nclass: int, conf_thresh: float, device: torch.device) -> None:
        self._nclass, self._conf_thresh = nclass, conf_thresh
        self._counts = torch.zeros(2, 3, nclass, dtype=torch.int64, device=device)  # of unlabelled and labelled images

    def add(
        self, label: torch.Tensor, conf: torch.Tensor, ignore_mask: torch.Tensor, truth: torch.Tensor | None = None
    ) -> None:
        """Count pseudo-labels and confidences (B, H, W); `truth` (B, H, W) is that of labelled images."""
        valid, right = ignore_mask != IGNORE_INDEX, torch.zeros_like(label, dtype=torch.bool)
        if truth is not None:
            valid, right = valid & (truth != IGNORE_INDEX), label == truth
        sure = valid & (conf >= self._conf_thresh)
        for row, chosen in enumerate((valid, sure, sure & right)):
            # What is not chosen is counted beyond the classes: the host need not wait for how many there are.
            counted = torch.bincount(label.masked_fill(~chosen, self._nclass).flatten(), minlength=self._nclass + 1)
            self._counts[int(truth is not None), row] += counted[: self._nclass]

    def shares(self, classes: Sequence[str]) -> dict[str, float]:
        """Shares from 0 to 1, over all pixels and of each class; those of no pixel at all are left out.

        predicted_share: of the pixels, those with this pseudo-label; confident_share: of these, the confident ones,
        both on unlabelled images where there are any. confident_right: of the confident ones on labelled images, those
        whose pseudo-label is the label.
        """
        unlabeled, labeled = self._counts.cpu().tolist()
        predicted, confident, _ = unlabeled if any(unlabeled[0]) else labeled
        total = [sum(predicted)] * len(classes)
        parts = {
            "predicted_share": (predicted, total),
            "confident_share": (confident, predicted),
            "confident_right": (labeled[2], labeled[1]),
        }
        values = {}
        for name, (part, whole) in parts.items():
            if name != "predicted_share" and sum(whole):
                values[f"pseudo/{name}"] = sum(part) / sum(whole)
            values |= {f"{name}/{label}": p / w for label, p, w in zip(classes, part, whole, strict=True) if w}
        return values


def _photo(image: torch.Tensor, cfg: Config) -> Image.Image:
    """Red, green and blue of a normalised image (C, H, W) as they were."""
    rgb = list(cfg.rgb_channels)
    mean, std = (torch.tensor(values)[rgb][:, None, None] for values in cfg.normalization)
    pixels = image[rgb].float().cpu() * std + mean
    return Image.fromarray((255 * pixels).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _small(picture: Image.Image) -> Image.Image:
    """RGB, and no larger than SIDE."""
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return picture
