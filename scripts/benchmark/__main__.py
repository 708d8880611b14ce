"""Measure what makes this project fast and small, against the naive way of doing the same.

    python -m scripts.benchmark all --json benchmark.json
    python -m scripts.benchmark data

Both ways run in turn, in one process, on synthetic images: JPEG of 500 x 375 pixels, as in Pascal VOC, and PNG of
2048 x 1024, as in Cityscapes, of the same size as those files. Each line gives the median of the naive way
(scripts/benchmark/naive.py, naive_data.py) and of this project's, with the middle half of the measurements in
brackets, their ratio, and how their results compare. Times are good for ratios within one run, not across machines.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import importlib
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from dataset.cache import ImageCache
from dataset.check import check_samples
from dataset.files import read_image, read_label
from dataset.lists import Sample
from dataset.loader import LoaderOptions, train_loader, val_loader
from dataset.packing import collate, to_device
from dataset.semi import EpochSampler, Key, Partner, TrainDataset, UnlabeledViews
from dataset.source import DataSource
from dataset.transform import IMAGENET_MEAN, IMAGENET_STD, box_mask, draw_cutmix_box
from model import build_model
from scripts.benchmark import naive as plain
from scripts.benchmark import naive_data as plain_data
from util.cli import run_main
from util.config import PROJECT_ROOT, load_config
from util.evaluate import evaluate
from util.losses import CrossEntropy, OhemCrossEntropy
from util.metrics import confusion_matrix
from util.precision import evaluation_copy, set_precision
from util.schedule import build_optimizer
from util.semi import consistency_loss, pseudo_label

# The method is what is measured, not a part of this script: hence by name.
unimatch_step = importlib.import_module("unimatch").unimatch_step
# What losses, steps and evaluation are measured on; tests have smaller ones.
BACKBONE, CROP, LOSS_SIZE = "resnet50", 321, 801
GROUPS = ("data", "loader", "loss", "step", "evaluate", "startup")


@dataclass(frozen=True)
class Row:
    """One comparison: measurements of the naive way and of this project's, in `unit`."""

    name: str
    plain: list[float]
    ours: list[float]
    unit: str
    equality: str

    @property
    def ratio(self) -> float:
        """How many times as much the naive way takes, by the medians."""
        return statistics.median(self.plain) / statistics.median(self.ours)


@dataclass(frozen=True)
class Kind:
    """Synthetic images like those of a published data set, and the crop size of its recipe."""

    name: str
    size: tuple[int, int]
    suffix: str
    count: int
    crop: int
    noise: float  # makes the files as large as the data set's: about 110 kB and 2.3 MB
    samples: tuple[Sample, ...] = ()

    def write(self, root: Path) -> Kind:
        """Write the images and labels; a Kind with their names."""
        rng = np.random.default_rng(0)
        samples = tuple(Sample(f"{self.name}{i}{self.suffix}", f"{self.name}{i}_label.png") for i in range(self.count))
        width, height = self.size
        for sample in samples:
            coarse = rng.normal(110, 70, (height // 24 + 2, width // 24 + 2, 3)).clip(0, 255).astype(np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(self.size, Image.Resampling.BICUBIC)).astype(float)
            noisy = (smooth + rng.normal(0, self.noise, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / sample.image, quality=92)
            blocks = rng.integers(0, 19, (height // 24 + 1, width // 24 + 1), dtype=np.uint8)
            Image.fromarray(blocks.repeat(24, 0).repeat(24, 1)[:height, :width]).save(root / sample.label)
        return replace(self, samples=samples)


PASCAL = Kind("pascal", (500, 375), ".jpg", 24, 321, noise=14.0)
CITYSCAPES = Kind("cityscapes", (2048, 1024), ".png", 6, 801, noise=0.8)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the groups that the command line names; print a table, and write the figures if asked to."""
    parser = argparse.ArgumentParser(
        prog="scripts.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", choices=(*GROUPS, "all"), help="what to measure")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each way (default: 7)")
    parser.add_argument("--threads", type=int, help="threads of losses, steps and evaluation (default: the cores)")
    parser.add_argument("--json", metavar="F", type=Path, help="write all measurements to this file")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))

    versions = f"torch {torch.__version__}, Pillow {PIL.__version__}, Python {platform.python_version()}"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {versions}"
    print(f"{machine}; {args.rounds} rounds", flush=True)
    rows = []
    measures = {name: globals()[f"measure_{name}"] for name in GROUPS}
    with tempfile.TemporaryDirectory() as folder:
        kinds = [kind.write(Path(folder)) for kind in (PASCAL, CITYSCAPES)]
        for name in GROUPS if "all" in args.groups else dict.fromkeys(args.groups):
            for row in measures[name](Path(folder), kinds, args.rounds):
                print(_line(row), flush=True)
                rows.append(row)
    if args.json:
        figures = [{**asdict(row), "ratio": row.ratio} for row in rows]
        text = json.dumps({"machine": machine, "rounds": args.rounds, "rows": figures}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


def measure_data(root: Path, kinds: Sequence[Kind], rounds: int) -> Iterator[Row]:
    """Samples as one loading worker makes them, on one thread; and the bytes that it sends."""
    with _threads(1):
        for kind in kinds:
            caches = {"disk": ImageCache(root / "cache", 10**10)}
            if Path("/dev/shm").is_dir():
                caches["ram"] = ImageCache(Path(tempfile.mkdtemp(dir="/dev/shm")), 10**10)
            keys = [Key(epoch, i, i, i) for epoch in range(2) for i in range(kind.count)]
            slow, fast = _datasets(root, kind)
            equality = _compare_labeled(slow, fast, keys)
            yield _samples(f"labelled sample, {kind.name}", slow._labeled, fast._labeled, keys, rounds, equality)
            for place, cache in caches.items():
                _, cached = _datasets(root, kind, cache=cache)
                same = all(map(torch.equal, _tensors(map(fast._labeled, keys)), _tensors(map(cached._labeled, keys))))
                title = f"labelled sample, {kind.name}, from the {place} cache"
                yield _samples(title, slow._labeled, cached._labeled, keys, rounds, f"{_equal(same)} to no cache")
            for method, strong_views in (("UniMatch", 2), ("FixMatch", 1)):
                _, fast = _datasets(root, kind, strong_views)
                equality = _compare_pairs(slow, fast, keys)
                title = f"{method}'s unlabelled pair, {kind.name}"
                yield _samples(title, slow.pair, fast._unlabeled, keys, rounds, equality)
                bytes_plain = [_size(slow.pair(key)) for key in keys]
                bytes_ours = [_size(collate([fast[key]])[1]) for key in keys]
                mean = [[statistics.mean(sizes) / 1e6] for sizes in (bytes_plain, bytes_ours)]
                yield Row(f"{method}'s unlabelled sample, {kind.name}, as it is sent", *mean, "MB", "the same batches")
            for cache in caches.values():
                cache.close()
                shutil.rmtree(cache.folder)


def measure_loader(root: Path, kinds: Sequence[Kind], rounds: int) -> Iterator[Row]:
    """An epoch of UniMatch whose step takes no time: all of it is waiting for data."""
    workers, kind = len(os.sched_getaffinity(0)), replace(kinds[0], samples=4 * kinds[0].samples)
    slow, fast = _datasets(root, kind)
    sampler, options = EpochSampler(len(kind.samples), len(kind.samples), 2, 0), LoaderOptions(workers)
    function = plain_data.collate_naive
    slow_loader = options.build(slow, batch_size=2, sampler=sampler, collate_fn=function, drop_last=True)
    fast_loader = train_loader(fast, sampler, options)

    def ours() -> None:
        for batch in fast_loader:
            to_device(batch, torch.device("cpu"))

    with _threads(1):  # the cores are the workers'
        times = _alternate(lambda: collections.deque(slow_loader, maxlen=0), ours, rounds)
    equality = f"{len(slow_loader)} and {len(fast_loader)} batches of the same samples"
    yield Row(f"waiting for an epoch's data, {kind.name}, {workers} workers", *times, "s", equality)


def measure_loss(root: Path, kinds: Sequence[Kind], rounds: int) -> Iterator[Row]:
    """Losses, confidence and the confusion matrix, on a batch like those of the recipes."""
    generator = torch.Generator().manual_seed(0)
    size, kept = LOSS_SIZE, 200_000 * LOSS_SIZE**2 // 801**2
    label = torch.randint(0, 19, (2, size, size), generator=generator)
    label[:, : size // 10] = 255
    noise = torch.randn(2, 19, size, size, generator=generator)
    shape = f"2 x 19 x {size} x {size}"
    for name, margin in (("many", 2.0), ("few", 9.0)):
        logits = noise + margin * torch.nn.functional.one_hot(label % 19, 19).permute(0, 3, 1, 2)
        criterion = OhemCrossEntropy(255, 0.7, kept)
        needing = logits.clone().requires_grad_()
        criterion(needing, label).backward()
        same = torch.equal(needing.grad.abs().sum(1) > 0, plain.ohem(logits, label, 0.7, kept)[1])
        times = _alternate(
            lambda logits=logits: plain.ohem(logits, label, 0.7, kept),
            lambda logits=logits, criterion=criterion: criterion(logits, label),
            rounds,
        )
        yield Row(f"OHEM forward, {shape}, {name} hard pixels", *times, "s", f"kept pixels {_equal(same)}")

    pseudo, conf = plain.pseudo_label(logits)
    ignore_mask = torch.where(label == 255, 255, 0)
    ways = (plain.consistency_loss, consistency_loss)

    def step(loss: Callable[..., torch.Tensor]) -> torch.Tensor:
        needing = logits.detach().requires_grad_()
        loss(needing, pseudo, conf, ignore_mask, 0.95).backward()
        return needing.grad

    difference = _relative(step(ways[0]), step(ways[1]))
    times = _alternate(lambda: step(ways[0]), lambda: step(ways[1]), rounds)
    yield Row(f"consistency loss and its gradient, {shape}", *times, "s", f"gradients {difference}")

    ours = pseudo_label(logits)
    same = torch.equal(ours[0], pseudo) and torch.allclose(ours[1], conf, rtol=1e-5)
    times = _alternate(lambda: plain.pseudo_label(logits), lambda: pseudo_label(logits), rounds)
    yield Row(f"pseudo-label and confidence, {shape}", *times, "s", f"{_equal(same)} (confidence to 1e-5)")

    truth = torch.randint(0, 19, (1, 1024, 2048), generator=generator)
    guess = torch.where(torch.rand(truth.shape, generator=generator) < 0.8, truth, truth.flip(1))
    truth[:, :64] = 255
    areas = plain.histograms(guess.numpy(), truth.numpy(), 19)
    confusion = confusion_matrix(guess, truth, 19)
    counts = (confusion.diagonal(), confusion.sum(0), confusion.sum(1))
    same = all(np.array_equal(area, count) for area, count in zip(areas, counts, strict=True))
    times = _alternate(
        lambda: plain.histograms(guess.numpy(), truth.numpy(), 19), lambda: confusion_matrix(guess, truth, 19), rounds
    )
    yield Row("confusion matrix, 19 classes, 1024 x 2048", *times, "s", f"counts {_equal(same)}")


def measure_step(root: Path, kinds: Sequence[Kind], rounds: int) -> Iterator[Row]:
    """UniMatch's step with batch 2 + 2, and its peak memory above the loaded model."""
    exact = _gradient_difference()
    batches = [_step_batch(seed, CROP) for seed in range(4)]
    slow_step = _stepper(_plain_model(), naive=True)
    for title, options in (
        ("float32", {}),  # channels_last, the default on a CPU
        ("float32, contiguous", {"channels_last": False}),
        ("bf16 + channels_last", {"amp": "bf16"}),
    ):
        fast_step = _stepper(_model(**options), naive=False)
        steps = (_through(batches, slow_step), _through([_only_used(batch) for batch in batches], fast_step))
        times = _alternate(*steps, rounds)
        equality = exact if "amp" not in options else "16-bit forward passes, by choice"
        yield Row(f"UniMatch step, {BACKBONE}, crop {CROP}, {title}", *times, "s", equality)
    peaks = {way: _memory_of(way) for way in MEMORY_WAYS}
    for way, peak in peaks.items():
        if way != "naive":
            yield Row(f"peak memory of the step, {way}", [peaks["naive"]], [peak], "GB", exact)


def measure_evaluate(root: Path, kinds: Sequence[Kind], rounds: int) -> Iterator[Row]:
    """Evaluation of four images of the first kind."""
    kind = kinds[0]
    device, samples = torch.device("cpu"), list(kind.samples[:4])
    loader = list(val_loader(samples, DataSource(root), LoaderOptions()))
    model = _plain_model()
    with torch.no_grad():  # statistics that fit, so that predictions vary
        model.train()(_images(0, 4, CROP))
    for mode in ("original", "sliding_window"):
        expected = plain.evaluate(model, loader, mode, CROP, 19)
        for title, options in (("float32", {}), ("bf16 + channels_last", {"amp": "bf16"})):
            # Once for all images of an evaluation.
            fast_model = _model(**options)
            fast_model.load_state_dict(model.state_dict())
            fast_model = evaluation_copy(fast_model)

            def ours(fast_model: torch.nn.Module = fast_model, mode: str = mode) -> Any:
                return evaluate(fast_model, loader, mode, CROP, 19, device)

            difference = (ours().iou - expected).abs().nan_to_num().max().item()
            times = _alternate(lambda mode=mode: plain.evaluate(model, loader, mode, CROP, 19), ours, rounds)
            yield Row(
                f"evaluation, {BACKBONE}, {mode}, {title}",
                *times,
                "s",
                f"IoU of a class differs by {difference:.2g} at most",
            )


def measure_startup(root: Path, kinds: Sequence[Kind], rounds: int) -> Iterator[Row]:
    """The checks before training, against decoding every image and label one after the other."""
    for kind in kinds:

        def decode_all(kind: Kind = kind) -> None:
            for sample in kind.samples:
                image, label = read_image(root / sample.image), read_label(root / sample.label)
                assert image.size == label.size and np.asarray(label).max() < 19

        times = _alternate(decode_all, lambda kind=kind: check_samples(kind.samples, root, 19), rounds)
        yield Row(f"checks at the start, {kind.name}", *times, "s", "images only to their ends, labels in full")


# The step's parts


def _config(**options: Any) -> Any:
    """The recipe of the step."""
    settings = {
        "dataset": "synthetic",
        "nclass": 19,
        "backbone": BACKBONE,
        "pretrained": False,
        "crop_size": CROP,
        "device": "cpu",
        **options,
    }
    return load_config("configs/pascal.yaml", settings)


def _model(**options: Any) -> torch.nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    cfg = _config(**options)
    return set_precision(build_model(cfg), cfg)


def _plain_model(**options: Any) -> torch.nn.Module:
    """The same, contiguous and with PyTorch's convolutions."""
    return plain.with_plain_convolutions(_model(channels_last=False, **options))


def _images(seed: int, count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _step_batch(seed: int, size: int, dtype: torch.dtype = torch.float32) -> Any:
    """Two labelled and two unlabelled images with CutMix boxes as often and as large as in training."""
    rng = np.random.default_rng(seed)
    images = [_images(10 * seed + i, 2, size).to(dtype) for i in range(7)]
    boxes = [box_mask(torch.tensor([draw_cutmix_box(size, rng) or (0, 0, 0, 0) for _ in range(2)]), size) for _ in "12"]
    label = torch.from_numpy(rng.integers(0, 19, (2, size, size)))
    ignore_mask = torch.zeros(2, size, size, dtype=torch.uint8)
    ignore_mask[:, size * 3 // 4 :] = 255
    return (
        (images[0], label),
        UnlabeledViews(*images[1:4], ignore_mask, *boxes),
        UnlabeledViews(*images[4:7], ignore_mask, None, None),
    )


def _stepper(model: torch.nn.Module, naive: bool) -> Callable[[Any], None]:
    """A function that does a whole training step on a batch."""
    optimizer = build_optimizer(model, 0.001, 10.0)

    def step(batch: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        if naive:
            plain.unimatch_step(model, batch, plain.cross_entropy, 0.95)
        else:
            unimatch_step(model, batch, CrossEntropy(), 0.95, torch.Tensor.backward)
        optimizer.step()

    return step


def _through(batches: Sequence[Any], step: Callable[[Any], None]) -> Callable[[], None]:
    """A function that does `step` on the next of `batches`, from the first again after the last."""
    endless = itertools.cycle(batches)
    return lambda: step(next(endless))


def _only_used(batch: Any) -> Any:
    """The batch as the loader gives it: strong views mixed, the partners' weak views only where there is a box."""
    labeled, u, u_mix = batch
    used = (u.box1 | u.box2).flatten(1).any(1).nonzero()[:, 0]
    return labeled, plain.paste_partner(u, u_mix), Partner(u_mix.weak[used], u_mix.ignore_mask, used)


def _gradient_difference() -> str:
    """Between the two ways, over all parameters, in float64 on a small batch."""
    batch, gradients = _step_batch(1, 65, torch.float64), []
    for naive in (True, False):
        model = (_plain_model() if naive else _model()).double()
        torch.manual_seed(0)
        if naive:
            plain.unimatch_step(model, batch, plain.cross_entropy, 0.1)
        else:
            unimatch_step(model, _only_used(batch), CrossEntropy(), 0.1, torch.Tensor.backward)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return f"gradients in float64 {_relative(*gradients)}"


MEMORY_WAYS = {
    "naive": None,
    "float32": {},
    "checkpoint_activations: backbone": {"checkpoint_activations": "backbone"},
    "checkpoint_activations: all": {"checkpoint_activations": "all"},
}


def _memory_of(way: str) -> float:
    """Peak of a step above the loaded model in GB, measured in a process of its own."""
    # Freed memory goes back to the system at once, so that the resident set is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = (way, BACKBONE, CROP, torch.get_num_threads())
    command = [sys.executable, "-c", f"from scripts.benchmark import __main__ as b; print(b.peak_memory{arguments})"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def peak_memory(way: str, backbone: str, crop: int, threads: int) -> float:
    """Peak resident memory in GB of the second step of `way` above that of the loaded model with its momentum."""
    torch.set_num_threads(threads)
    options, batch = MEMORY_WAYS[way], _step_batch(1, crop)
    batch = batch if options is None else _only_used(batch)
    model = _plain_model(backbone=backbone) if options is None else _model(backbone=backbone, **options)
    step = _stepper(model, naive=options is None)
    step(batch)  # the momentum buffers, and what libraries keep from their first call
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    step(batch)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """This process's resident memory, now (VmRSS) or at its peak (VmHWM), in GB."""
    kilobytes = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kilobytes[1]) * 1024 / 1e9


# Measuring


def _alternate(
    plain_way: Callable[[], Any], our_way: Callable[[], Any], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each way, one after the other in turn, after one unmeasured call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for measured in range(-1, rounds):
        for way, seconds in zip((plain_way, our_way), times, strict=True):
            started = time.perf_counter()
            way()
            if measured >= 0:
                seconds.append(time.perf_counter() - started)
    return times


def _samples(
    title: str,
    plain_way: Callable[[Key], Any],
    our_way: Callable[[Key], Any],
    keys: Sequence[Key],
    rounds: int,
    equality: str,
) -> Row:
    """Milliseconds a sample, by the mean over `keys` in each round."""
    times = _alternate(lambda: [plain_way(key) for key in keys], lambda: [our_way(key) for key in keys], rounds)
    return Row(title, *([1000 * x / len(keys) for x in way] for way in times), "ms", equality)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def _datasets(
    root: Path, kind: Kind, strong_views: int = 2, cache: ImageCache | None = None
) -> tuple[plain_data.NaiveDataset, TrainDataset]:
    unlabeled = [sample._replace(label=None) for sample in kind.samples]
    naive = plain_data.NaiveDataset(kind.samples, unlabeled, DataSource(root), kind.crop, 0)
    return naive, TrainDataset(kind.samples, unlabeled, DataSource(root, cache=cache), kind.crop, 0, strong_views)


# Comparing


def _compare_labeled(slow: TrainDataset, fast: TrainDataset, keys: Sequence[Key]) -> str:
    """Labels exactly; images by the pixels of which any channel differs."""
    off, most, labels = [], 0, True
    for key in keys:
        (image, label), (pixels, own_label) = slow._labeled(key), fast._labeled(key)
        difference = (_levels(image) - pixels.int()).abs().amax(-1)
        off.append((difference > 0).double().mean().item())
        most, labels = max(most, int(difference.max())), labels and torch.equal(label, own_label.long())
    return f"labels {_equal(labels)}, {100 * statistics.mean(off):.2f}% of pixels off by <= {most}"


def _compare_pairs(slow: TrainDataset, fast: TrainDataset, keys: Sequence[Key]) -> str:
    """What a step makes of both: weak views and their masks, and strong views after CutMix."""
    off, masks, mean = [], True, []
    for key in keys:
        _, u, _ = to_device(collate([fast[key]]), torch.device("cpu"))
        _, slow_u, slow_mix = plain_data.collate_naive([slow[key]])
        off.append((_levels(u.weak[0]) != _levels(slow_u.weak[0])).any(-1).double().mean().item())
        masks &= torch.equal(u.ignore_mask.long(), slow_u.ignore_mask) and torch.equal(u.box1.long(), slow_u.box1)
        mixed = plain.paste_partner(slow_u, slow_mix).strong1
        mean.append((_levels(u.strong1[0]) - _levels(mixed[0])).abs().double().mean().item())
    return (
        f"masks {_equal(masks)}, {100 * statistics.mean(off):.2f}% of weak pixels off, strong views by "
        f"{statistics.mean(mean):.1g} levels in the mean"
    )


def _levels(image: torch.Tensor) -> torch.Tensor:
    """8-bit values, int32 (H, W, 3), of a normalised image (3, H, W)."""
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_STD, IMAGENET_MEAN))
    return (255 * (image * std + mean)).round().int().permute(1, 2, 0)


def _relative(expected: torch.Tensor, found: torch.Tensor) -> str:
    return f"differ by {((expected - found).norm() / expected.norm()).item():.1e} of their norm"


def _equal(same: bool) -> str:
    return "equal" if same else "NOT EQUAL"


def _size(batch: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(batch))


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def _line(row: Row) -> str:
    ways = "  ".join(_figure(values, row.unit) for values in (row.plain, row.ours))
    return f"{row.name:<58} {ways}  {row.ratio:5.2f} x  {row.equality}"


def _figure(values: Sequence[float], unit: str) -> str:
    """The median and, in brackets, the middle half."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return f"{statistics.median(values):8.3g} {unit} [{low:.3g}, {high:.3g}]"


if __name__ == "__main__":
    run_main(main)
