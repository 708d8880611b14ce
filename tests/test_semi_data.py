"""dataset/semi.py: samples as functions of their keys, batches, their way to the device, and validation shares."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import dataset.semi
import dataset.source
from dataset.lists import Sample
from dataset.loader import LoaderOptions, default_workers, train_loader, val_loader
from dataset.packing import collate, to_device
from dataset.sampler import EpochSampler, Key
from dataset.semi import TrainDataset
from dataset.source import DataSource
from dataset.transform import IMAGENET_STD, normalize, to_tensor
from scripts.benchmark.naive import paste_partner
from scripts.benchmark.naive_data import NaiveDataset, collate_naive
from tests.reference import formulas

SIZE = 24
LABELED, UNLABELED = 3, 7


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Labelled and unlabelled pictures of many sizes; no unlabelled one has a label on disk."""
    root = tmp_path_factory.mktemp("data")
    for i in range(LABELED + UNLABELED):
        picture, label = formulas.picture(i, 20 + 5 * i, 50 - 3 * i)
        Image.fromarray(picture).save(root / f"{i}.png")
        if i < LABELED:
            Image.fromarray(label).save(root / f"{i}_label.png")
    return root


def _labeled() -> list[Sample]:
    return [Sample(f"{i}.png", f"{i}_label.png") for i in range(LABELED)]


def _dataset(root: Path, strong_views: int = 2, seed: int = 0, **options) -> TrainDataset:
    unlabeled = [Sample(f"{i}.png", f"{i}_no_such_label.png") for i in range(LABELED, LABELED + UNLABELED)]
    return TrainDataset(_labeled(), unlabeled, DataSource(root), SIZE, seed, strong_views, **options)


def _tensors(sample) -> list[torch.Tensor]:
    """The tensors of a sample or batch, in order, whatever holds them."""
    return [leaf for leaf in tree_leaves(sample) if isinstance(leaf, torch.Tensor)]


def _equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


# Samples


def test_a_sample_has_the_promised_shapes_and_types(root):
    data = _dataset(root)
    partners = set()
    for epoch in range(8):
        (image, label), sample = data[Key(epoch, 0, 0, 0)]
        assert image.shape == (SIZE, SIZE, 3) and label.shape == (SIZE, SIZE)
        assert sample.weak.shape == (SIZE, SIZE, 3) and len(sample.strong) == len(sample.boxes) == 2
        assert (sample.partner is not None) == any(sample.boxes)
        partners.add(sample.partner is not None)
        assert {tensor.dtype for tensor in _tensors((image, label, sample.weak, sample.strong))} == {torch.uint8}
    assert partners == {True, False}


@pytest.mark.parametrize("strong_views", [1, 2])
@pytest.mark.parametrize("partner", ["same_image", "other_image"])
def test_a_step_sees_what_the_naive_way_gives_it(root, strong_views, partner):
    """To the last bit, at 20 batches, once the partner is pasted into the naive loader's strong views."""
    fast = _dataset(root, strong_views)
    slow = NaiveDataset(fast.labeled, fast.unlabeled, DataSource(root), SIZE, fast.seed)
    sampler = EpochSampler(LABELED, UNLABELED, 3, 0, partner=partner)
    boxes = 0
    for epoch in range(10):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        for start in range(0, len(keys), 3):
            batch = keys[start : start + 3]
            labeled, u, u_mix = to_device(collate([fast[key] for key in batch]), torch.device("cpu"))
            slow_labeled, slow_u, slow_mix = collate_naive([slow[key] for key in batch])
            assert _equal(labeled, slow_labeled) and torch.equal(u.weak, slow_u.weak)
            assert torch.equal(u.ignore_mask.long(), slow_u.ignore_mask)
            mixed = paste_partner(slow_u, slow_mix)
            boxed = torch.zeros(3, dtype=torch.bool)
            for view in ("1", "2")[:strong_views]:
                box = getattr(slow_u, f"box{view}")
                assert torch.equal(getattr(u, f"box{view}").long(), box)
                boxed |= box.flatten(1).any(1)
                assert torch.equal(getattr(u, f"strong{view}"), getattr(mixed, f"strong{view}"))
            assert torch.equal(u_mix.used, boxed.nonzero()[:, 0])
            assert torch.equal(u_mix.weak, slow_mix.weak[boxed])
            assert torch.equal(u_mix.ignore_mask[boxed].long(), slow_mix.ignore_mask[boxed])
            boxes += int(boxed.sum())
    assert 10 < boxes < 60


@pytest.mark.parametrize("photometry", ["worker", "device"])
@pytest.mark.parametrize("strong_views", [1, 2])
def test_with_the_reversed_batch_as_partner_nothing_is_pasted_and_no_second_view_made(root, strong_views, photometry):
    fast = _dataset(root, strong_views, photometry=photometry)
    slow = NaiveDataset(fast.labeled, fast.unlabeled, DataSource(root), SIZE, fast.seed)
    keys = list(EpochSampler(LABELED, UNLABELED, 7, 0, partner="reversed_batch"))
    assert [key.partner for key in keys] == [-1] * 7
    same = list(EpochSampler(LABELED, UNLABELED, 7, 0))
    assert [key[:3] for key in keys] == [key[:3] for key in same]
    packed = collate([fast[key] for key in keys])
    labeled, u = to_device(packed, torch.device("cpu"))
    slow_labeled, slow_u = collate_naive([slow[key] for key in keys])
    assert len(packed[1].pixels) == 7 * (1 + strong_views * (photometry == "worker"))
    assert _equal(labeled, slow_labeled) and torch.equal(u.weak, slow_u.weak)
    assert torch.equal(u.ignore_mask.long(), slow_u.ignore_mask)
    for view in ("1", "2")[:strong_views]:
        assert torch.equal(getattr(u, f"box{view}").long(), getattr(slow_u, f"box{view}"))
        if photometry == "worker":
            assert torch.equal(getattr(u, f"strong{view}"), getattr(slow_u, f"strong{view}"))
    assert u.box1.any()
    assert (u.strong2 is None) == (u.box2 is None) == (strong_views == 1)


def test_a_sample_is_a_function_of_its_key_alone(root):
    sampler = EpochSampler(LABELED, UNLABELED, 1, 0, partner="other_image")
    sampler.set_epoch(4)
    keys = list(sampler)
    used = _dataset(root)
    for key in keys:
        used[key]
    torch.manual_seed(5)
    np.random.seed(5)
    for key in reversed(keys):
        assert _equal(used[key], _dataset(root)[key])


def test_epoch_seed_and_view_give_other_draws(root):
    key = next(Key(0, 0, i, i) for i in range(UNLABELED) if any(_dataset(root)[Key(0, 0, i, i)][1].boxes))
    labeled, views = _dataset(root)[key]
    for other_labeled, other in (_dataset(root)[key._replace(epoch=1)], _dataset(root, seed=1)[key]):
        assert not _equal(labeled, other_labeled) and not torch.equal(views.weak, other.weak)
    assert not torch.equal(views.weak, views.partner.weak)  # the same image, seen twice
    assert not torch.equal(*views.strong)


def test_repetitions_of_a_labelled_image_are_drawn_anew(root):
    data = _dataset(root)
    (first, _), (again, _) = (data[Key(0, index, 0, 0)] for index in (1, 1 + LABELED))
    assert not torch.equal(first[0], again[0])


def test_labels_follow_their_images(root):
    """Where images are their labels' grey pictures, views must agree pixel by pixel, up to interpolation at edges."""
    array = np.kron(np.arange(12).reshape(3, 4) * 20, np.ones((20, 20))).astype(np.uint8)
    Image.fromarray(array).convert("RGB").save(root / "steps.png")
    Image.fromarray(array).save(root / "steps_label.png")
    data = TrainDataset([Sample("steps.png", "steps_label.png")], None, DataSource(root), SIZE, seed=0)
    for index in range(30):
        image, label = data[Key(0, index)]
        valid = label != 255
        same = (image[..., 0].int() - label.int()).abs()[valid] <= 2
        assert same.float().mean() > 0.6 and (image[~valid] == 0).all()


def test_fixmatchs_only_strong_view_is_unimatchs_first(root):
    two, one = _dataset(root, strong_views=2), _dataset(root, strong_views=1)
    for index in range(5):
        key = Key(2, index, index, (index + 1) % UNLABELED)
        (labeled2, views2), (labeled1, views1) = two[key], one[key]
        assert _equal(labeled1, labeled2) and torch.equal(views1.weak, views2.weak)
        assert torch.equal(*views1.strong, views2.strong[0]) and views1.boxes == views2.boxes[:1]


def test_strong_views_are_now_and_then_the_weak_view_unchanged(root):
    data = _dataset(root)
    unchanged = 0
    for epoch in range(80):
        _, views = data[Key(epoch, 0, epoch % UNLABELED, 0)]
        unchanged += sum(torch.equal(views.weak, strong) for strong in views.strong)
    assert 0 < unchanged < 30  # 0.2 * 0.8 * 0.5 * 0.5 (no box) of 160 are 6


@pytest.mark.parametrize("strong_views", [1, 2])
def test_photometry_on_the_device_is_the_workers_but_for_a_level_here_and_there(tmp_path, strong_views):
    size, rng = 96, np.random.default_rng(0)
    waves = np.sin(np.linspace(0, 6, 160)[None, :, None] + np.linspace(0, 4, 140)[:, None, None] * [1, -1, 0.5])
    Image.fromarray((128 + 90 * waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8)).save(
        tmp_path / "waves.png"
    )
    Image.new("L", (160, 140)).save(tmp_path / "label.png")
    samples, source = [Sample("waves.png", "label.png")], DataSource(tmp_path)
    arguments = samples, [Sample("waves.png", None)], source, size, 0, strong_views
    worker, device = TrainDataset(*arguments), TrainDataset(*arguments, photometry="device")
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    levels, changes = [], []
    for epoch in range(20):
        expected, found = (
            to_device(collate([data[Key(epoch, 0, 0, 0)]]), torch.device("cpu")) for data in (worker, device)
        )
        assert torch.equal(found[1].weak, expected[1].weak) and _equal(found[1][3:], expected[1][3:])
        for view in range(1, 1 + strong_views):
            levels.append(255 * std * (found[1][view] - expected[1][view]).abs())
            changes.append(255 * std * (expected[1].weak - expected[1][view]).abs())
    levels, changes = torch.stack(levels), torch.stack(changes)
    assert levels.max() < 1.01 and levels.mean() < 1e-3
    assert changes.mean() > 20  # what is compared is far from the weak view


def test_an_image_that_is_its_own_partner_is_decoded_once(root, monkeypatch):
    opened = []
    open_image = dataset.source.open_image
    monkeypatch.setattr(dataset.source, "open_image", lambda path: opened.append(Path(path).name) or open_image(path))
    for epoch in range(8):
        own, other = f"{LABELED + 2}.png", f"{LABELED + 4}.png"
        opened.clear()
        _dataset(root)[Key(epoch, 1, 2, 2)]
        assert opened == ["1.png", own]
        opened.clear()
        _, views = _dataset(root)[Key(epoch, 1, 2, 4)]
        assert opened == ["1.png", own] + [other] * any(views.boxes)


@pytest.mark.parametrize("interlaced", [False, True])
def test_samples_of_large_png_are_the_same_however_far_they_are_decoded(tmp_path, monkeypatch, interlaced):
    """Pictures of 1000 x 700, of which half of the crops need no more than the upper rows."""
    rng = np.random.default_rng(0)
    for name, channels in (("image", (3,)), ("label", ())):
        coarse = rng.integers(0, 4, (70, 100, *channels), dtype=np.uint8)
        picture = Image.fromarray((80 * coarse if channels else coarse).repeat(10, 0).repeat(10, 1))
        picture.save(tmp_path / f"{name}.png")
        if interlaced:
            _interlace(tmp_path / f"{name}.png", np.asarray(picture))
    samples = [Sample("image.png", "label.png")]
    data = TrainDataset(samples, [samples[0]._replace(label=None)], DataSource(tmp_path), 200, seed=1)
    keys = [Key(epoch, 0, 0, 0) for epoch in range(12)]
    found = [data[key] for key in keys]
    cuts = []

    def whole(opened, rows, *_):
        cuts.append(rows < opened.height)
        return np.asarray(opened)

    monkeypatch.setattr(dataset.semi, "decode_image", whole)
    monkeypatch.setattr(dataset.source, "decode_label", whole)
    assert all(_equal(data[key], views) for key, views in zip(keys, found, strict=True))
    assert sum(cuts) > 18


def _interlace(path: Path, pixels: np.ndarray) -> None:
    """Write an interlaced PNG, which Pillow only reads: seven passes, each its lines without a filter."""
    lines, passes = (
        b"",
        ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
    )
    for y, x, dy, dx in passes:
        lines += b"".join(b"\0" + line.tobytes() for line in pixels[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2 if pixels.ndim == 3 else 0, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert np.array_equal(np.asarray(Image.open(path)), pixels)


def test_other_image_works_with_one_image_per_process(root):
    sampler = EpochSampler(LABELED, UNLABELED, 1, 0, partner="other_image")
    batches = list(train_loader(_dataset(root), sampler, LoaderOptions()))
    assert len(batches) == UNLABELED
    # A partner's view is drawn for the sample that it is pasted into, from the other image.
    key, (_, views) = next((key, batch) for key, batch in zip(sampler, batches, strict=True) if len(batch[1].used))
    _, same = _dataset(root)[key._replace(partner=key.unlabeled)]
    assert torch.equal(views.weak[0], same.weak) and not torch.equal(views.partner[0], same.partner.weak)


def test_labels_of_unlabelled_images_are_never_opened(root, monkeypatch):
    opened = set()
    open_label = dataset.source.open_label

    def noted(path, *rest):
        opened.add(Path(path).name)
        return open_label(path, *rest)

    monkeypatch.setattr(dataset.source, "open_label", noted)
    for partner in ("same_image", "other_image"):
        sampler = EpochSampler(LABELED, UNLABELED, 1, 0, partner=partner)
        assert len(list(train_loader(_dataset(root), sampler, LoaderOptions()))) == UNLABELED
    assert opened == {sample.label for sample in _labeled()}


# Batches


@pytest.mark.parametrize("strong_views", [1, 2])
def test_batches_are_bit_identical_whatever_the_number_of_workers(root, strong_views):
    def batches(workers: int) -> list:
        sampler = EpochSampler(LABELED, UNLABELED, 2, 0)
        loader = train_loader(_dataset(root, strong_views), sampler, LoaderOptions(workers))
        assert len(loader) == UNLABELED // 2
        seen = []
        for epoch in range(2):  # workers persist from one epoch to the next
            loader.sampler.set_epoch(epoch)
            seen += list(loader)
        return seen

    expected = batches(0)
    assert len(expected) == 6 and not _equal(expected[0], expected[3])
    for workers in (1, 2):
        assert _equal(batches(workers), expected)


def test_collate_stacks_samples_and_keeps_only_the_partners_that_are_used(root):
    for strong_views in (1, 2):
        samples = [_dataset(root, strong_views)[Key(3, i, i, i)] for i in range(UNLABELED)]
        (image, label), views = collate(samples)
        partners = [index for index, (_, sample) in enumerate(samples) if sample.partner is not None]
        assert views.used.tolist() == partners and 0 < len(partners) < UNLABELED
        assert len(views.strong) == strong_views and views.boxes.shape == (UNLABELED, strong_views, 4)
        for i, ((own_image, own_label), sample) in enumerate(samples):
            in_batch = (image[i], label[i], views.weak[i], *(view[i] for view in views.strong))
            assert _equal(in_batch, (own_image, own_label, sample.weak, *sample.strong))
        assert torch.equal(views.partner, torch.stack([samples[index][1].partner.weak for index in partners]))


def test_a_batch_without_any_box_has_no_partner(root):
    data = _dataset(root)
    sample = next(data[key] for key in (Key(epoch, 0, 0, 0) for epoch in range(99)) if not any(data[key][1].boxes))
    _, u, u_mix = to_device(collate([sample, sample]), torch.device("cpu"))
    assert u_mix.weak.shape == (0, 3, SIZE, SIZE) and u_mix.used.shape == (0,)
    assert not u.box1.any() and not u.box2.any()


def test_a_step_gets_normalised_floats_and_int64_labels(root):
    batch = collate([_dataset(root)[Key(0, i, i, i)] for i in range(3)])
    (image, label), views, partner = to_device(batch, torch.device("cpu"))
    assert label.dtype == torch.int64 and torch.equal(label, batch[0][1].long())
    assert torch.equal(image, normalize(batch[0][0].permute(0, 3, 1, 2))) and image.is_contiguous()
    assert {tensor.dtype for tensor in (*views[:3], partner.weak)} == {torch.float32}
    assert {views.ignore_mask.dtype, partner.ignore_mask.dtype} == {torch.uint8}
    assert {views.box1.dtype, views.box2.dtype} == {torch.bool}
    assert partner.used.dtype == torch.int64


def test_supervised_and_single_view_batches_reach_the_device_too(root):
    device = torch.device("cpu")
    supervised = TrainDataset(_labeled(), None, DataSource(root), SIZE, 0)
    sampler = EpochSampler(LABELED, None, 3, 0)
    (batch,) = train_loader(supervised, sampler, LoaderOptions())
    image, label = to_device(batch, device)
    assert image.shape == (3, 3, SIZE, SIZE) and label.shape == (3, SIZE, SIZE) and label.dtype == torch.int64
    _, views, _ = to_device(collate([_dataset(root, 1)[Key(0, 0, 0, 0)]]), device)
    assert views.strong2 is None and views.box2 is None and views.strong1.dtype == torch.float32


@pytest.mark.parametrize("photometry", ["worker", "device"])
def test_a_batch_goes_to_the_device_without_a_value_being_read_back(root, photometry):
    batch = collate([_dataset(root, photometry=photometry)[Key(0, i, i, i)] for i in range(UNLABELED)])
    with FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, batch)
        moved = to_device(fake, torch.device("cuda"))
    assert {tensor.device.type for tensor in _tensors(moved)} == {"cuda"}


# Validation


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_each_validation_image_goes_to_exactly_one_process(root, processes, workers):
    shares = [
        list(val_loader(_labeled(), DataSource(root), LoaderOptions(workers), rank, processes))
        for rank in range(processes)
    ]
    assert sum(len(share) for share in shares) == LABELED
    assert max(len(share) for share in shares) - min(len(share) for share in shares) <= 1
    seen = sorted(tuple(image.shape) for share in shares for image, _ in share)
    assert seen == sorted((1, 3, 20 + 5 * i, 50 - 3 * i) for i in range(LABELED))  # native size


def test_more_processes_than_validation_images_leave_some_shares_empty(root):
    shares = [list(val_loader(_labeled()[:2], DataSource(root), LoaderOptions(), rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 0]


def test_validation_samples_are_the_files_as_they_are(root):
    (image, label), *_ = val_loader(_labeled(), DataSource(root), LoaderOptions())
    assert torch.equal(image[0], to_tensor(Image.open(root / "0.png")))
    assert torch.equal(label[0], to_tensor(Image.open(root / "0_label.png")))


def test_every_process_gets_at_least_one_worker_and_at_most_eight():
    assert default_workers(10_000) == 1
    assert 1 <= default_workers(1) <= 8
