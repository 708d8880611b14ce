"""The benchmark's GPU part: steps, losses, photometry and feeding, each against the naive way in the same run.

    python -m scripts.benchmark.gpu --json gpu.json

Times are between CUDA events, after unmeasured calls, both ways in turn. Each row is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from dataset.packing import collate, to_device
from dataset.photometry import apply_photometry_batch, photometry_numbers
from dataset.transform import Extent, draw_cutmix_box, draw_photometry
from dataset.views import PartnerSample, UnlabeledSample
from scripts.benchmark import naive
from scripts.benchmark.model import make_model, make_naive_model
from scripts.benchmark.rows import Row, alternate, line
from scripts.benchmark.step_v2 import WAYS as WAYS_V2
from scripts.benchmark.step_v2 import prepare_step_v2
from util.cli import run_main
from util.errors import ConfigError
from util.losses import CrossEntropy, OhemCrossEntropy
from util.outputs import MARK, check_targets, replacing
from util.schedule import build_optimizer
from util.semi import consistency_loss, pseudo_label
from util.train.feed import Feed
from util.train.graph import WARM_UP, GraphedStep

unimatch_step = importlib.import_module("unimatch").unimatch_step  # what is measured, by name as in step.py
WAYS = {
    "float32": {},
    "TF32": {"tf32": True},
    "bf16 + channels_last": {"amp": "bf16", "channels_last": True},
    "float32, cuda_graphs": {"cuda_graphs": True},
    "bf16 + channels_last, cuda_graphs": {"amp": "bf16", "channels_last": True, "cuda_graphs": True},
    "float32, compile": {"compile": True},
    "bf16 + channels_last, compile": {"amp": "bf16", "channels_last": True, "compile": True},
}


def measure_gpu(
    device: torch.device,
    rounds: int,
    backbone: str = "resnet50",
    crop: int = 321,
    loss_size: int = 801,
    crop_v2: int = 518,
) -> Iterator[Row]:
    """All rows; those that compile come last. A row that fails has no measurements, and says why."""
    sizes = {"backbone": backbone, "crop": crop, "loss_size": loss_size, "crop_v2": crop_v2}
    for measure in (_losses, _photometry, _feeding, _steps_v2, _steps):
        try:
            yield from measure(device, rounds, sizes)
        except Exception as error:  # the other rows are still worth measuring
            yield _failed(measure.__name__.strip("_"), error)


def in_turn(device: torch.device, naive_way: Callable, our_way: Callable, rounds: int) -> tuple[list, list]:
    """Seconds of each way, in turn, by CUDA events, after unmeasured calls; by the clock on a CPU."""
    if device.type == "cpu":
        return alternate(naive_way, our_way, rounds)
    times: tuple[list[float], list[float]] = ([], [])
    for measured in range(-WARM_UP - 1, rounds):
        for way, seconds in zip((naive_way, our_way), times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            way()
            end.record()
            end.synchronize()
            if measured >= 0:
                seconds.append(start.elapsed_time(end) / 1000)
    return times


def packed_batch(seed: int, size: int, pasted: bool = True) -> Any:
    """A batch of 2 + 2 images of noise as the loader gives it, with boxes as often and as large as in training.

    `pasted` is False for a method that pastes from the reversed batch.
    """
    rng, samples = np.random.default_rng(seed), []
    for _ in range(2):
        pixels = [torch.from_numpy(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(5)]
        extent, boxes = Extent(size, size * 3 // 4, False), tuple(draw_cutmix_box(size, rng) for _ in range(2))
        colours = draw_photometry(rng), draw_photometry(rng)
        partner = PartnerSample(pixels[1], extent, colours) if pasted and any(boxes) else None
        sample = UnlabeledSample(pixels[0], tuple(pixels[2:4]), extent, boxes, colours, partner, pasted)
        samples.append(((pixels[4], pixels[4][..., 0] % 19), sample))
    return collate(samples)


def _losses(device: torch.device, rounds: int, sizes: dict[str, Any]) -> Iterator[Row]:
    size = sizes["loss_size"]
    logits = torch.randn(2, 19, size, size, device=device)
    label = torch.randint(0, 19, (2, size, size), device=device)
    conf, ignore_mask = torch.rand(2, size, size, device=device), torch.zeros_like(label)
    kept = 200_000 * size**2 // 801**2
    shape = f"2 x 19 x {size} x {size}"
    needing = logits.clone().requires_grad_()
    for name, slow, fast in (
        ("OHEM", lambda: naive.ohem(logits, label, 0.7, kept), lambda: OhemCrossEntropy(255, 0.7, kept)(logits, label)),
        ("pseudo-label", lambda: naive.pseudo_label(logits), lambda: pseudo_label(logits)),
        (
            "consistency loss and its gradient",
            lambda: naive.consistency_loss(needing, label, conf, ignore_mask, 0.95).backward(),
            lambda: consistency_loss(needing, label, conf, ignore_mask, 0.95).backward(),
        ),
    ):
        yield _row(f"{name}, {shape}", device, slow, fast, rounds)


def _photometry(device: torch.device, rounds: int, sizes: dict[str, Any]) -> Iterator[Row]:
    rng, size = np.random.default_rng(0), sizes["crop"]
    images = torch.from_numpy(rng.integers(0, 256, (8, 3, size, size), dtype=np.uint8)).to(device)
    numbers = torch.tensor([photometry_numbers(draw_photometry(rng)) for _ in images]).to(device)

    def one_by_one() -> list[torch.Tensor]:
        return [apply_photometry_batch(images[i : i + 1], numbers[i : i + 1]) for i in range(len(images))]

    yield _row(
        f"photometry of 8 images of {size}", device, one_by_one, lambda: apply_photometry_batch(images, numbers), rounds
    )


def _feeding(device: torch.device, rounds: int, sizes: dict[str, Any]) -> Iterator[Row]:
    model = make_model(sizes["backbone"], sizes["crop"]).to(device)
    batch, feed, criterion = _pinned(packed_batch(0, sizes["crop"]), device), Feed(device), CrossEntropy()

    def steps(moved: Callable[[Any], Any]) -> None:
        for _ in range(4):
            unimatch_step(model, moved(batch), criterion, 0.95, torch.Tensor.backward)

    plain = lambda: steps(lambda packed: to_device(packed, device))  # noqa: E731
    yield _row("4 steps with their batches' way, beside instead of before", device, plain, lambda: steps(feed), rounds)


def _steps(device: torch.device, rounds: int, sizes: dict[str, Any]) -> Iterator[Row]:
    backbone, crop = sizes["backbone"], sizes["crop"]
    name = f"UniMatch step 2 + 2, {backbone}, crop {crop}"
    ways = {
        title: (options.get("tf32", False), partial(_our_stepper, device, sizes, options))
        for title, options in WAYS.items()
        if device.type == "cuda" or not {"cuda_graphs", "compile"} & set(options)
    }
    yield from _step_rows(name, device, rounds, lambda: _naive_stepper(device, sizes), ways)


def _steps_v2(device: torch.device, rounds: int, sizes: dict[str, Any]) -> Iterator[Row]:
    """With the EMA teacher's update; batches as the loader gives them, whose partner is the reversed batch."""
    backbone, crop = "dinov2_small", sizes["crop_v2"]

    def make(way: str) -> Callable[[], None]:
        batch = to_device(packed_batch(0, crop, pasted=False), device)
        return prepare_step_v2(way, backbone, crop, device, [batch])[1]

    ways = {title: (False, partial(make, title)) for title in WAYS_V2 if title != "naive"}
    name = f"UniMatch V2 step 2 + 2, {backbone}, crop {crop}"
    yield from _step_rows(name, device, rounds, lambda: make("naive"), ways)


def _step_rows(
    name: str,
    device: torch.device,
    rounds: int,
    make_naive: Callable[[], Callable[[], None]],
    ways: dict[str, tuple[bool, Callable[[], Callable[[], None]]]],
) -> Iterator[Row]:
    """Time and peak memory of a step in each of `ways`: by its title, whether with TF32, and what makes the step."""
    with _tf32(False):
        slow, slow_peak = warmed_up(device, make_naive)
    for title, (tf32, make) in ways.items():
        fast = None  # gives back the way before
        with _tf32(tf32):
            try:
                fast, peak = warmed_up(device, make)
                yield _row(f"{name}, {title}", device, slow, fast, rounds)
                yield Row(f"peak memory with the model: {name}, {title}", [slow_peak], [peak], "GB", "")
            except Exception as error:
                yield _failed(f"{name}, {title}", error)


def warmed_up(device: torch.device, make: Callable[[], Callable[[], None]]) -> tuple[Callable[[], None], float]:
    """A step, and the GB that tensors took more, at the peak, from before its model was made to after its first steps.

    A step that is recorded allocates nothing later: its memory is taken when it warms up and is recorded.
    """
    if device.type == "cpu":
        return make(), math.nan
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = make()
    for _ in range(WARM_UP + 1):
        step()
    return step, (torch.cuda.max_memory_allocated(device) - before) / 1e9


@contextlib.contextmanager
def _tf32(value: bool) -> Iterator[None]:
    """TF32 in convolutions and matrix products inside the `with`, or in neither."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = value
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _naive_stepper(device: torch.device, sizes: dict[str, Any]) -> Callable[[], None]:
    model = make_naive_model(sizes["backbone"], sizes["crop"]).to(device)
    (image, label), u, mix = to_device(packed_batch(0, sizes["crop"]), device, fixed_shapes=True)
    whole = u._replace(weak=mix.weak, ignore_mask=mix.ignore_mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4, foreach=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        naive.unimatch_step(model, ((image, label), u, whole), naive.cross_entropy, 0.95)
        optimizer.step()

    return step


def _our_stepper(device: torch.device, sizes: dict[str, Any], options: dict[str, Any]) -> Callable[[], None]:
    precision = {key: value for key, value in options.items() if key in ("amp", "channels_last", "compile")}
    model = make_model(sizes["backbone"], sizes["crop"], **{"channels_last": False, **precision}).to(device)
    fixed = bool(options.get("cuda_graphs") or options.get("compile"))
    batch = to_device(packed_batch(0, sizes["crop"]), device, fixed)
    optimizer, criterion = build_optimizer(model, 0.001, 10.0), CrossEntropy()

    def train_step(batch: Any, backward: Callable[[torch.Tensor], None]) -> dict[str, torch.Tensor]:
        return unimatch_step(model, batch, criterion, 0.95, backward)

    if options.get("cuda_graphs"):
        train_step = GraphedStep(train_step, model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        train_step(batch, torch.Tensor.backward)
        optimizer.step()

    return step


def _row(name: str, device: torch.device, slow: Callable, fast: Callable, rounds: int) -> Row:
    try:
        return Row(name, *in_turn(device, slow, fast, rounds), "s", "")
    except Exception as error:
        return _failed(name, error)


def _failed(name: str, error: Exception) -> Row:
    return Row(name, [math.nan], [math.nan], "s", f"FAILED: {type(error).__name__}: {str(error).splitlines()[:1]}")


def _pinned(batch: Any, device: torch.device) -> Any:
    return batch if device.type == "cpu" else tree_map_only(torch.Tensor, torch.Tensor.pin_memory, batch)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on the first GPU and write the rows."""
    parser = argparse.ArgumentParser(prog="scripts.benchmark.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each way (default: 7)")
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="where the rows go")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ConfigError("no GPU: torch sees none; python -m scripts.benchmark measures on the CPU")
    check_targets([args.json], [])
    torch.backends.cudnn.benchmark = True
    rows = []
    for row in measure_gpu(torch.device("cuda"), args.rounds):
        print(line(row), flush=True)
        rows.append({**asdict(row), "ratio": row.ratio})
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps({"tool": MARK, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
