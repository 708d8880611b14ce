"""Plan a run without a GPU: its memory, operations, communication and data rate, and which settings fit a GPU.

    python -m scripts.plan --config configs/pascal.yaml --gpus 4 --gpu-memory 24
    python -m scripts.plan --config configs/v2/pascal.yaml --gpus 4 --labeled-id-path splits/pascal/92/labeled.txt

The method's own step runs on tensors without values (FakeTensorMode), and what is alive at each moment is added up, in
the backward passes too. Not in it: a GPU's context, the libraries' working memory, and gaps between tensors; a tenth of
the GPU is left for them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dataset.lists import read_list
from dataset.sampler import EpochSampler
from dataset.views import Partner, UnlabeledViews
from model import build_model
from util.cli import add_common_arguments, run_main
from util.config import Config, check_batch, for_method, has_teacher, load_config, resolve_path
from util.errors import ConfigError
from util.lists import list_unlabeled
from util.losses import build_criterion
from util.precision import set_precision
from util.teacher import Teacher

METHODS = ("unimatch", "unimatch_v2", "fixmatch", "supervised")
SPARE = 0.9  # the part of a GPU's memory that tensors may take


class Cost(NamedTuple):
    """Of one process and one batch: bytes that stay (weights, optimiser, teacher), bytes more at the step's peak, and
    floating-point operations; `synced` numbers that BatchNorm sums over the processes, in `messages`."""

    kept: int
    peak: int
    flops: int
    synced: int
    messages: int


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive, made since it began: `now`, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def step_cost(cfg: Config, method: str, gradients_stay: bool = False, count_flops: bool = False) -> Cost:
    """What a step of the method takes on one process, by its own step function on tensors without values.

    `gradients_stay`: gradients are there from the beginning, as with `accumulate` and with several processes. Without
    `count_flops`, which takes longer, `flops` is 0.
    """
    with warnings.catch_warnings(), FakeTensorMode(), LiveBytes() as live:
        warnings.simplefilter("ignore")  # of copying tensors without values
        model = set_precision(build_model(cfg, pretrained=False), replace(cfg, compile=False, channels_last=False))
        teacher = Teacher(model, cfg.teacher_decay) if has_teacher(cfg, method) else None
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state = [torch.empty_like(p) for p in learned for _ in range(_states(cfg))]
        if gradients_stay:
            for parameter in learned:
                parameter.grad = torch.zeros_like(parameter)
        gradients = _bytes(learned) if gradients_stay else 0
        batch, criterion = _batch(cfg, method, teacher is not None), build_criterion(cfg)
        inputs = _bytes(leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))
        kept = live.most = live.now
        synced = _count_synced(model)
        step = _step_of(method, model, teacher, criterion, cfg)
        with FlopCounterMode(display=False) if count_flops else contextlib.nullcontext() as counter:
            step(batch=batch, backward=torch.Tensor.backward)
            if teacher:
                teacher.update(model)
        del state
        kept -= gradients + inputs
        return Cost(kept, live.most - kept, counter.get_total_flops() if counter else 0, sum(synced), len(synced))


def _step_of(method: str, model: nn.Module, teacher: Teacher | None, criterion: nn.Module, cfg: Config) -> Callable:
    """The step function of the method's script; by name, since the method is what is measured."""
    step = getattr(importlib.import_module(method), f"{method}_step")
    known = {"model": model, "teacher": teacher, "criterion": criterion, "conf_thresh": cfg.conf_thresh}
    taken = inspect.signature(step).parameters
    return functools.partial(step, **{name: value for name, value in known.items() if name in taken})


def _states(cfg: Config) -> int:
    """Numbers that the optimiser keeps for each weight."""
    return 2 if cfg.optimizer_kind == "adamw" else 1


def _batch(cfg: Config, method: str, teacher: bool) -> Any:
    """A batch as the loader gives it, every unlabelled sample with a CutMix box."""
    b, size = cfg.batch_size, cfg.crop_size
    images = [torch.empty(b, cfg.channels, size, size) for _ in range(5)]
    masks = [torch.zeros(b, size, size, dtype=torch.uint8) for _ in range(4)]
    labeled = images[0], torch.zeros(b, size, size, dtype=torch.int64)
    if method == "supervised":
        return labeled
    two = method != "fixmatch"
    views = UnlabeledViews(*images[1:3], images[3] if two else None, *masks[:2], masks[2] if two else None)
    return (labeled, views) if teacher else (labeled, views, Partner(images[4], masks[3]))


def _count_synced(model: nn.Module) -> list[int]:
    """A list to which each message of synchronised BatchNorm will add its size, forward and back."""
    sizes: list[int] = []

    def note(module: nn.Module, *_: Any) -> None:
        if module.training:
            sizes.extend([2 * module.num_features + 1, 2 * module.num_features])

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(note)
    return sizes


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Setting(NamedTuple):
    """A row of the table: keys of the config, the peak in GB of a process, and what is as in one batch on one GPU."""

    batch_size: int
    accumulate: int
    checkpoint_activations: str
    amp: str
    gigabytes: float
    exact: str


def settings(cfg: Config, method: str, gpus: int, total: int) -> Iterator[Setting]:
    """Ways to take `total` labelled images a step on so many GPUs, what changes the result least first."""
    share = total // gpus
    batches = [share // n for n in range(1, share + 1) if share % n == 0]
    mixes = cfg.model != "dpt"  # BatchNorm mixes the samples of a batch
    for amp in ("none", "bf16"):
        lines = {again: _memory_by_batch(cfg, method, amp, again, gpus) for again in ("none", "backbone", "all")}
        for batch in batches:
            if mixes and batch * gpus < 2:
                continue
            for again, memory in lines.items():
                accumulate = share // batch
                exact = "16-bit forward passes" if amp != "none" else "as published"
                if accumulate > 1 and (mixes or method == "unimatch_v2"):
                    exact += f"; BatchNorm over {batch * gpus} of {total}" if mixes else "; CutMix in smaller batches"
                yield Setting(batch, accumulate, again, amp, memory(batch, accumulate) / 1e9, exact)


def _memory_by_batch(cfg: Config, method: str, amp: str, again: str, gpus: int) -> Callable[[int, int], float]:
    """Peak bytes as a function of batch size and accumulate: a straight line through two batch sizes."""
    change = {"amp": amp, "checkpoint_activations": again, "compile": False, "cuda_graphs": False}
    costs = [step_cost(replace(cfg, batch_size=b, **change), method, gradients_stay=True) for b in (2, 4)]
    slope = (costs[1].peak - costs[0].peak) / 2
    alone = step_cost(replace(cfg, batch_size=2, **change), method).peak - costs[0].peak if gpus == 1 else 0
    return lambda b, n: costs[0].kept + costs[0].peak + slope * (b - 2) + (alone if n == 1 else 0)


def describe(cfg: Config, method: str, gpus: int, tflops: float, lists: tuple[int, int | None] | None) -> Iterator[str]:
    """Lines on the run as it is configured; `lists` are the numbers of labelled and unlabelled images."""
    cost = step_cost(cfg, method, gradients_stay=gpus > 1 or cfg.accumulate > 1, count_flops=True)
    with torch.device("meta"):
        model = build_model(cfg, pretrained=False)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() for parameter in model.parameters())
    total = cfg.step_images * gpus
    kinds = 1 if method == "supervised" else 2
    yield f"{method}: {cfg.model} on {cfg.backbone}, crop {cfg.crop_size}, {gpus} process{'es' * (gpus > 1)}"
    yield f"parameters: {weights / 1e6:.1f} million, {sum(p.numel() for p in learned) / 1e6:.1f} million learned"
    yield f"step: {total} labelled images ({cfg.batch_size} x {gpus} x {cfg.accumulate} accumulated)" + (
        "" if kinds == 1 else f" and {total} unlabelled"
    )
    yield f"operations: {cfg.accumulate * cost.flops / 1e12:.2f} TFLOP a step on each process (forward and backward)"
    yield (
        f"memory: {cost.kept / 1e9:.2f} GB stay (weights, optimiser{_teacher(cfg, method)}), {cost.peak / 1e9:.2f} GB "
        "more at the step's peak (activations, gradients, batch)"
    )
    yield f"checkpoint: {cost.kept / 1e9:.2f} GB"
    if lists:
        sampler = EpochSampler(
            *lists, cfg.batch_size, 0, 0, gpus, repeat_labeled_to=cfg.supervised_epoch, accumulate=cfg.accumulate
        )
        steps = len(sampler) // cfg.step_images
        yield f"iterations: {steps} an epoch, {steps * cfg.epochs} in {cfg.epochs} epochs"
    else:
        yield "iterations: not known without --labeled-id-path"
    if gpus > 1:
        gradients = _bytes(learned)
        ring = 2 * (gpus - 1) / gpus * gradients
        yield (
            f"communication: {gradients / 1e6:.0f} MB of gradients a step, for which each process of a ring sends "
            f"{ring / 1e6:.0f} MB; BatchNorm: {cfg.accumulate * cost.messages} messages, "
            f"{4 * cfg.accumulate * cost.synced / 1e6:.2f} MB"
        )
    seconds = cfg.accumulate * cost.flops / (tflops * 1e12)
    yield (
        f"data: at {tflops:g} TFLOP/s, as a guess (--tflops), a step takes {seconds:.2f} s, so disk and workers must "
        f"give {kinds * total / seconds:.0f} images/s ({kinds * total / seconds / gpus:.0f} for each process)"
    )


def _teacher(cfg: Config, method: str) -> str:
    return ", teacher" if has_teacher(cfg, method) else ""


def table(rows: Iterable[Setting], gigabytes: float | None) -> Iterator[str]:
    """The settings as lines, then the first that fits."""
    yield f"{'batch_size':>10} {'accumulate':>10} {'checkpoint_activations':>22} {'amp':>5} {'GB':>7}  result"
    first = None
    for row in rows:
        if first is None and gigabytes is not None and _fits(row, gigabytes):
            first = row
        fits = "" if gigabytes is None else "fits   " if _fits(row, gigabytes) else "too big"
        yield (
            f"{row.batch_size:>10} {row.accumulate:>10} {row.checkpoint_activations:>22} {row.amp:>5} "
            f"{row.gigabytes:>7.2f}  {fits}  {row.exact}".rstrip()
        )
    yield "channels_last changes speed, not memory"
    if gigabytes is not None:
        keys = ("batch_size", "accumulate", "checkpoint_activations", "amp")
        yield (
            f"none of these fits {gigabytes:g} GB: use more processes, a smaller crop_size or a smaller backbone"
            if first is None
            else f"first that fits {gigabytes:g} GB: --set " + " ".join(f"{key}={getattr(first, key)}" for key in keys)
        )


def _fits(row: Setting, gigabytes: float) -> bool:
    return row.gigabytes <= SPARE * gigabytes


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="scripts.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("--method", choices=METHODS, help="default: unimatch_v2 on model: dpt, else unimatch")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes, a GPU each (default: 1)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU: says which settings fit")
    parser.add_argument("--labeled-id-path", metavar="F", help="list of labelled images: says how many iterations")
    parser.add_argument("--unlabeled-id-path", metavar="F", help="as for training (default: the config's)")
    parser.add_argument("--tflops", type=float, default=20.0, help="what a GPU sustains (default: 20)")
    args = parser.parse_args(argv)
    for name in ("gpus", "gpu_memory", "tflops"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0")
    cfg = load_config(args.config, args.overrides)
    method = args.method or ("unimatch_v2" if cfg.model == "dpt" else "unimatch")
    cfg = for_method(cfg, method)
    lists = _count(cfg, method, args.labeled_id_path, args.unlabeled_id_path) if args.labeled_id_path else None
    check_batch(cfg, method, args.gpus, *(lists or (10**9, None)))
    for line in describe(cfg, method, args.gpus, args.tflops, lists):
        print(line, flush=True)
    total = cfg.step_images * args.gpus
    print(f"\nWays to take {total} labelled images a step on {args.gpus} (batch_size x processes x accumulate):\n")
    for line in table(settings(cfg, method, args.gpus, total), args.gpu_memory):
        print(line, flush=True)


def _count(cfg: Config, method: str, labeled: str, unlabeled: str | None) -> tuple[int, int | None]:
    listed = read_list(resolve_path(labeled))
    found = None if method == "supervised" else list_unlabeled(cfg, unlabeled, listed)
    return len(listed), None if found is None else len(found)


if __name__ == "__main__":
    run_main(main)
