"""dataset/transform.py: what is drawn, against its distributions; how it is applied, against the reference figures."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import transforms as T

from dataset.resize import resized_size
from dataset.transform import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Box,
    Geometry,
    Photometry,
    apply_geometry,
    apply_photometry,
    box_mask,
    crop_pixels,
    draw_cutmix_box,
    draw_geometry,
    draw_photometry,
    normalize,
    padding_mask,
    rows_needed,
    to_tensor,
    visible_extent,
)
from scripts.benchmark.naive_data import resize_whole, whole_photometry
from tests.reference import formulas
from tests.reference.weights import check_summary

FIGURES = json.loads((Path(__file__).parent / "reference" / "figures.json").read_text())
FIGURES_V2 = json.loads((Path(__file__).parent / "reference" / "figures_v2.json").read_text())
SEED = FIGURES["seed"]
IDENTITY = Photometry(jitter=(), grey=False, blur_radius=None)
ODD_SIZES = [(1, 1), (1, 2), (2, 1), (1, 701), (701, 1), (3, 500), (500, 3), (20, 20)]


def _picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(formulas.picture(seed, height, width)[0])


def _sums(image: Image.Image) -> tuple[int, int]:
    """Sum, and sum of value * (flat index modulo 9973), as the figures have them."""
    values = np.asarray(image).astype(np.int64).ravel()
    return int(values.sum()), int((values * (np.arange(values.size) % 9973)).sum())


def _random_draws(count: int, seed: int = 0):
    """`count` random (width, height, crop size, geometry), images small and large against the crop."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        width, height, size = (int(rng.integers(1, 90)) for _ in range(3))
        yield width, height, size, draw_geometry(width, height, size, rng)


# Geometry


def _padding(width, height, geometry, size):
    """The padding mask of one crop."""
    return padding_mask(torch.tensor([visible_extent(width, height, geometry, size)]), size)[0]


@pytest.mark.parametrize("case", FIGURES["geometry"], ids=lambda c: f"{c['w']}x{c['h']}-to-{c['long_side']}")
def test_geometry_gives_the_reference_sums_exactly(case):
    picture, label = (Image.fromarray(array) for array in formulas.picture(case["image_seed"], case["h"], case["w"]))
    geometry = Geometry(case["long_side"], case["x"], case["y"], bool(case["flip"]))
    assert list(resized_size(case["w"], case["h"], case["long_side"])) == case["resized"]
    size, ignore = case["size"], case["ignore"]
    image = apply_geometry(picture, geometry, size, 0, Image.Resampling.BILINEAR)
    label = apply_geometry(label, geometry, size, ignore, Image.Resampling.NEAREST)
    assert image.size == label.size == (size, size) and (image.mode, label.mode) == ("RGB", "L")
    assert _sums(image) == (case["image_sum"], case["image_weighted"])
    assert _sums(label) == (case["mask_sum"], case["mask_weighted"])
    assert int((np.asarray(label) == ignore).sum()) == case["padding_pixels"]
    padding = _padding(case["w"], case["h"], geometry, size)
    assert int((padding == 255).sum()) == case["padding_pixels"]


@pytest.mark.parametrize(
    ("size", "long_side", "short_side"), [((500, 375), 333, 250), ((500, 375), 331, 248), ((9, 1), 2, 1)]
)
def test_the_shorter_side_is_rounded_alike_for_wide_and_for_tall_images(size, long_side, short_side):
    """249.75 becomes 250, 248.25 becomes 248, and 0.22 one pixel."""
    assert resized_size(*size, long_side) == (long_side, short_side)
    assert resized_size(*size[::-1], long_side) == (short_side, long_side)


def test_the_padding_mask_is_what_geometry_makes_of_an_empty_label():
    padded = 0
    for width, height, size, geometry in _random_draws(300):
        label = apply_geometry(Image.new("L", (width, height)), geometry, size, 255, Image.Resampling.NEAREST)
        mask = _padding(width, height, geometry, size)
        assert mask.dtype == torch.uint8
        assert torch.equal(mask, to_tensor(label)), (width, height, size, geometry)
        padded += int(mask.any())
    assert 0 < padded < 300


def test_padding_is_black_in_the_image():
    for width, height, size, geometry in _random_draws(50, seed=1):
        white = Image.new("RGB", (width, height), (255, 255, 255))
        image = to_tensor(apply_geometry(white, geometry, size, 0, Image.Resampling.BILINEAR))
        padding = _padding(width, height, geometry, size) == 255
        assert (image[:, padding] == 0).all() and (image[:, ~padding] == 255).all()


def test_the_flip_mirrors_left_and_right():
    picture = _picture(SEED, 30, 40)
    straight, flipped = (
        to_tensor(apply_geometry(picture, Geometry(40, 3, 2, flip), 25, 0, Image.Resampling.BILINEAR))
        for flip in (False, True)
    )
    assert torch.equal(flipped, straight.flip(2)) and not torch.equal(flipped, straight)
    assert torch.equal(straight, to_tensor(picture)[:, 2:27, 3:28])  # at its own size nothing is resampled


def test_drawn_geometry_is_within_its_bounds_and_reaches_their_ends():
    width, height, size = 13, 9, 7
    rng = np.random.default_rng(0)
    draws = [draw_geometry(width, height, size, rng) for _ in range(4000)]
    assert {g.long_side for g in draws} == set(range(6, 27))  # int(6.5) .. int(26.0), both ends
    seen = {}
    for geometry in draws:
        seen.setdefault(geometry.long_side, []).append(geometry)
    for long_side, group in seen.items():
        new_width, new_height = resized_size(width, height, long_side)
        room_x, room_y = max(new_width - size, 0), max(new_height - size, 0)
        assert {g.x for g in group} == set(range(room_x + 1))
        assert {g.y for g in group} == set(range(room_y + 1))
        # About 190 draws per long side: 5 standard errors.
        assert abs(len(group) - 4000 / 21) < 5 * (4000 / 21) ** 0.5
    assert abs(np.mean([g.flip for g in draws]) - 0.5) < 4 * 0.5 / 4000**0.5


def test_draws_of_geometry_come_in_the_published_order():
    rng = np.random.default_rng(5)
    long_side = rng.integers(20, 80, endpoint=True)
    width, height = long_side, int(30 * long_side / 40 + 0.5)
    x, y = (rng.integers(0, max(side - 16, 0), endpoint=True) for side in (width, height))
    assert draw_geometry(40, 30, 16, np.random.default_rng(5)) == Geometry(long_side, x, y, rng.random() < 0.5)


@pytest.mark.parametrize("width, height", ODD_SIZES)
def test_thin_and_tiny_images_give_whole_views(width, height):
    picture = _picture(SEED, height, width)
    rng = np.random.default_rng(0)
    smallest = Geometry(max(1, max(width, height) // 2), 0, 0, False)
    for geometry in [smallest, *(draw_geometry(width, height, 24, rng) for _ in range(20))]:
        assert min(resized_size(width, height, geometry.long_side)) >= 1
        image = apply_geometry(picture, geometry, 24, 0, Image.Resampling.BILINEAR)
        strong = apply_photometry(image, draw_photometry(rng))
        mask = _padding(width, height, geometry, 24)
        assert image.size == strong.size == (24, 24) and mask.shape == (24, 24)
        assert not mask.all()  # some of the image shows, however thin it is


# Photometry


@pytest.fixture(scope="module")
def photometries() -> list[Photometry]:
    rng = np.random.default_rng(7)
    return [draw_photometry(rng) for _ in range(12000)]


def test_photometry_happens_with_the_published_probabilities(photometries):
    jittered = [bool(p.jitter) for p in photometries]
    grey = [p.grey for p in photometries]
    blurred = [p.blur_radius is not None for p in photometries]
    for happened, probability in ((jittered, 0.8), (grey, 0.2), (blurred, 0.5)):
        error = (probability * (1 - probability) / len(photometries)) ** 0.5
        assert abs(np.mean(happened) - probability) < 4 * error
    # Each on its own: none of them says anything about another.
    assert np.abs(np.corrcoef([jittered, grey, blurred]) - np.eye(3)).max() < 4 / len(photometries) ** 0.5


@pytest.mark.parametrize(
    "name, low, high",
    [("brightness", 0.5, 1.5), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("hue", -0.25, 0.25)],
)
def test_jitter_factors_are_uniform_over_the_published_ranges(photometries, name, low, high):
    factors = np.array([dict(p.jitter)[name] for p in photometries if p.jitter])
    _check_uniform(factors, low, high)


def test_blur_radii_are_uniform_over_the_published_range(photometries):
    _check_uniform(np.array([p.blur_radius for p in photometries if p.blur_radius is not None]), 0.1, 2.0)


def _check_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert low <= values.min() < low + 0.005 * (high - low)
    assert high - 0.005 * (high - low) < values.max() <= high
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is passed once in a thousand samples.
    shares = (np.sort(values) - low) / (high - low)
    assert np.abs(shares - (np.arange(len(values)) + 0.5) / len(values)).max() < 1.95 / len(values) ** 0.5


def test_the_jitter_operations_come_in_every_order_equally_often(photometries):
    orders = [tuple(name for name, _ in p.jitter) for p in photometries if p.jitter]
    expected = len(orders) / 24
    for order in permutations(("brightness", "contrast", "saturation", "hue")):
        assert abs(orders.count(order) - expected) < 4 * expected**0.5


def test_jitter_equals_torchvisions_color_jitter_with_the_same_factors(monkeypatch):
    picture = _picture(SEED, 40, 50)
    names = ("brightness", "contrast", "saturation", "hue")
    rng = np.random.default_rng(3)
    for order in permutations(range(4)):
        factors = [*rng.uniform(0.5, 1.5, 3), rng.uniform(-0.25, 0.25)]
        color_jitter = T.ColorJitter(0.5, 0.5, 0.5, 0.25)
        monkeypatch.setattr(color_jitter, "get_params", lambda *_, o=order, f=factors: (torch.tensor(o), *f))
        jitter = tuple((names[i], float(factors[i])) for i in order)
        ours = apply_photometry(picture, IDENTITY._replace(jitter=jitter))
        assert np.array_equal(np.asarray(ours), np.asarray(color_jitter(picture))), jitter


def test_grey_scale_equals_torchvisions_and_keeps_three_channels():
    picture = _picture(SEED, 40, 50)
    ours = np.asarray(apply_photometry(picture, IDENTITY._replace(grey=True)))
    assert np.array_equal(ours, np.asarray(T.RandomGrayscale(p=1)(picture)))
    assert ours.shape == (40, 50, 3) and (ours == ours[..., :1]).all()


@pytest.mark.parametrize("case", FIGURES["blur"], ids=lambda c: f"sigma-{c['sigma']}")
def test_blur_gives_the_reference_sums_exactly(case):
    picture = _picture(SEED + 7, 49, 49)
    assert _sums(apply_photometry(picture, IDENTITY._replace(blur_radius=case["sigma"]))) == (
        case["sum"],
        case["weighted"],
    )


def test_photometry_leaves_its_input_as_it_is():
    picture = _picture(SEED, 20, 20)
    before = np.array(picture)
    strong = apply_photometry(picture, Photometry((("brightness", 1.4), ("hue", 0.2)), True, 1.5))
    assert np.array_equal(before, np.asarray(picture)) and not np.array_equal(before, np.asarray(strong))
    assert np.array_equal(before, np.asarray(apply_photometry(picture, IDENTITY)))


# CutMix


@pytest.fixture(scope="module", params=[321, 518])
def cutmix(request) -> tuple[int, list[Box | None], dict]:
    """The side of a crop, boxes in it, and the reference figures: UniMatch's or UniMatch V2's."""
    size, rng = request.param, np.random.default_rng(SEED)
    figures = FIGURES["cutmix_321"] if size == 321 else FIGURES_V2["cutmix_518"]
    return size, [draw_cutmix_box(size, rng) for _ in range(figures["n"])], figures


def test_half_of_the_boxes_are_empty_and_the_area_is_the_references(cutmix):
    size, boxes, figures = cutmix
    share_empty = np.mean([box is None for box in boxes])
    assert abs(share_empty - 0.5) < 4 * 0.5 / len(boxes) ** 0.5
    areas = np.array([box.width * box.height for box in boxes if box]) / size**2
    assert areas.mean() == pytest.approx(figures["area_mean"], rel=0.02)
    assert abs(areas.mean() - 0.2086) < 4 * areas.std() / len(areas) ** 0.5


@pytest.mark.parametrize("name", ["area", "height", "width", "log_aspect_h_over_w"])
def test_box_statistics_are_the_references(cutmix, name):
    size, boxes, figures = cutmix
    width, height = np.array([(box.width, box.height) for box in boxes if box], float).T
    values = {
        "area": width * height / size**2,
        "height": height,
        "width": width,
        "log_aspect_h_over_w": np.log(height / width),
    }[name]
    for q, expected in zip(figures["quantiles"], figures[name], strict=True):
        # Both are samples: the reference lies within 4 standard errors of the rank that it stands for.
        slack = 4 * (q * (1 - q) * 2 / len(values)) ** 0.5
        low, high = np.quantile(values, [max(q - slack, 0), min(q + slack, 1)])
        assert low - 1e-4 <= expected <= high + 1e-4, (q, expected)
        if name in ("height", "width"):
            assert abs(np.quantile(values, q) - expected) < 6 * size / 321


@pytest.mark.parametrize("size", [16, 49, 321])
def test_a_box_lies_inside_the_crop_and_keeps_the_area_rule(size):
    rng = np.random.default_rng(2)
    drawn = [box for box in (draw_cutmix_box(size, rng) for _ in range(1500)) if box]
    for x, y, width, height in drawn:
        assert x >= 0 and y >= 0 and width >= 1 and height >= 1
        assert x + width <= size and y + height <= size
        # Both sides are cut down to whole pixels: the area drawn is less than one row and one column away.
        assert width * height <= 0.4 * size**2 and (width + 1) * (height + 1) > 0.02 * size**2
        assert (height + 1) / width > 0.3 and height / (width + 1) < 1 / 0.3
    assert min(box.x for box in drawn) == min(box.y for box in drawn) == 0
    assert max(x + width for x, _, width, _ in drawn) == max(y + height for _, y, _, height in drawn) == size


def test_a_large_area_is_drawn_as_often_as_a_small_one(cutmix):
    size, boxes, _ = cutmix
    areas = np.array([box.width * box.height for box in boxes if box]) / size**2
    assert abs((areas > 0.2086).mean() - 0.5) < 4 * 0.5 / len(areas) ** 0.5


def test_the_box_mask_is_true_inside_the_box_only():
    mask, none = box_mask(torch.tensor([Box(x=2, y=5, width=3, height=1), (0, 0, 0, 0)]), 8)
    assert [tuple(point) for point in mask.nonzero().tolist()] == [(5, 2), (5, 3), (5, 4)]
    assert mask.dtype == torch.bool and not none.any() and none.shape == (8, 8)


# Normalisation


def test_normalize_gives_the_reference_summary(device):
    image = normalize(to_tensor(formulas.picture(SEED + 7, 49, 49)[0]).to(device))
    assert image.dtype == torch.float32 and image.device.type == device.type
    check_summary(image.cpu(), FIGURES["normalize"], rtol=1e-5)


@pytest.mark.parametrize("height, width", [(7, 5), (1, 1), (1, 9)])
def test_pillow_array_tensor_and_batch_are_normalised_alike(height, width):
    array = formulas.picture(SEED, height, width)[0]
    expected = (array.astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    from_array = normalize(array)
    np.testing.assert_allclose(from_array.permute(1, 2, 0), expected, rtol=0, atol=1e-6)
    tensor = to_tensor(array)
    before = tensor.clone()
    assert torch.equal(normalize(Image.fromarray(array)), from_array)
    assert torch.equal(normalize(tensor), from_array)
    assert torch.equal(normalize(torch.stack([tensor, tensor])), torch.stack([from_array, from_array]))
    assert torch.equal(tensor, before)


def test_normalize_reads_nothing_back_from_the_device():
    with FakeTensorMode():
        image = normalize(torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="cuda"))
    assert image.device.type == "cuda" and image.dtype == torch.float32


def test_to_tensor_keeps_values_and_puts_channels_first():
    array, label = formulas.picture(SEED, 6, 4)
    tensor = to_tensor(Image.fromarray(array))
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous() and tensor.shape == (3, 6, 4)
    assert np.array_equal(tensor.permute(1, 2, 0), array)
    assert np.array_equal(to_tensor(Image.fromarray(label)), label)


# The crop alone is resized


def _photograph(width: int, height: int, seed: int) -> Image.Image:
    """Smooth shapes with a little noise, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("width, height, size", [(500, 375, 321), (375, 500, 321), (260, 700, 321), (900, 450, 401)])
def test_a_crop_is_that_of_the_whole_resized_picture_up_to_a_level_in_few_pixels(width, height, size):
    picture, rng = _photograph(width, height, seed=width), np.random.default_rng(height)
    label = Image.fromarray(rng.integers(0, 21, (height, width), dtype=np.uint8))
    off = []
    for _ in range(8):
        geometry = draw_geometry(width, height, size, rng)
        for nearest in (np.asarray(label), label):
            found, expected = (
                np.asarray(way(x, geometry, size, 255, Image.Resampling.NEAREST))
                for way, x in ((apply_geometry, nearest), (resize_whole, label))
            )
            assert np.array_equal(found, expected)
        found, expected = (
            np.asarray(way(picture, geometry, size, 0, Image.Resampling.BILINEAR)).astype(int)
            for way in (apply_geometry, resize_whole)
        )
        assert np.abs(found - expected).max() <= 2
        off.append((found != expected).any(axis=2).mean())
    assert np.mean(off) <= 0.003


def test_only_the_pixels_that_a_crop_depends_on_are_read():
    """All others are changed, and the crop is the same."""
    pixels, size = np.asarray(_photograph(700, 600, seed=1)).copy(), 128
    for geometry in (Geometry(1400, 300, 500, False), Geometry(500, 40, 200, True), Geometry(700, 572, 472, False)):
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.NEAREST):
            before = np.asarray(apply_geometry(pixels, geometry, size, 0, resample))
            scale = 700 / geometry.long_side
            kept = [
                slice(max(int(p * scale) - 5, 0), int((p + size + 16) * scale) + 5) for p in (geometry.y, geometry.x)
            ]
            changed = 255 - pixels
            changed[tuple(kept)] = pixels[tuple(kept)]
            assert np.array_equal(before, np.asarray(apply_geometry(changed, geometry, size, 0, resample)))


@pytest.mark.parametrize("width, height, size", [(700, 600, 128), (300, 900, 200), (120, 90, 64)])
def test_below_the_rows_needed_no_pixel_counts(width, height, size):
    pixels, rng = np.asarray(_photograph(width, height, seed=1)), np.random.default_rng(5)
    left_out = 0
    for _ in range(40):
        geometry = draw_geometry(width, height, size, rng)
        rows = rows_needed(width, height, geometry, size)
        cut = pixels.copy()
        cut[rows:] = 0
        left_out += rows < height
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.NEAREST):
            ways = (apply_geometry(x, geometry, size, 0, resample) for x in (pixels, Image.fromarray(cut)))
            assert np.array_equal(*map(np.asarray, ways))
    assert (left_out > 10) == (width > 120)  # the smallest are resized whole


def test_pixels_in_any_layout_and_pillow_images_give_the_same_crop():
    picture = _photograph(500, 375, seed=4)
    pixels = np.asarray(picture)
    planar = np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)
    larger = np.zeros((400, 600, 3), np.uint8)
    larger[10:385, 7:507] = pixels
    for geometry in (Geometry(900, 200, 150, True), Geometry(400, 3, 0, False), Geometry(260, 0, 0, True)):
        expected = crop_pixels(picture, geometry, 321, 0, Image.Resampling.BILINEAR)
        assert expected.flags.writeable and expected.flags.owndata
        for way in (pixels, planar, larger[10:385, 7:507]):
            assert np.array_equal(crop_pixels(way, geometry, 321, 0, Image.Resampling.BILINEAR), expected)


def test_photometry_inside_a_box_is_that_of_the_whole_picture():
    picture, rng = _photograph(60, 60, seed=2), np.random.default_rng(3)
    boxes = 0
    for _ in range(200):
        photometry, box = draw_photometry(rng), draw_cutmix_box(60, rng)
        whole = np.asarray(whole_photometry(picture, photometry))
        assert np.array_equal(whole, np.asarray(apply_photometry(picture, photometry)))
        if box is not None:
            boxes += 1
            part = np.asarray(apply_photometry(picture, photometry, box))
            assert np.array_equal(part, whole[box.y : box.y + box.height, box.x : box.x + box.width])
    assert boxes > 60
