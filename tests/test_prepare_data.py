"""scripts/prepare_data.py: miniature downloads in the official formats, and what must come out of them."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from dataset import DataError
from dataset.catalog import CATALOG
from dataset.prepare.archives import find_sources, members, new_file
from dataset.prepare.downloads import (
    RECIPES,
    CocoImage,
    CocoObject,
    ade20k_label,
    cityscapes_label,
    coco_label,
    read_instances,
    sbd_label,
)
from scripts import prepare_data
from tests.helpers import PROJECT_ROOT, refusal

# pycocotools's own affair
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

VOC_TAR, SBD_TGZ = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"

# cityscapesscripts/helpers/labels.py, in its order: name, id, trainId.
CITYSCAPES_LABELS = """
    unlabeled 0 255, ego vehicle 1 255, rectification border 2 255, out of roi 3 255, static 4 255, dynamic 5 255,
    ground 6 255, road 7 0, sidewalk 8 1, parking 9 255, rail track 10 255, building 11 2, wall 12 3, fence 13 4,
    guard rail 14 255, bridge 15 255, tunnel 16 255, pole 17 5, polegroup 18 255, traffic light 19 6,
    traffic sign 20 7, vegetation 21 8, terrain 22 9, sky 23 10, person 24 11, rider 25 12, car 26 13, truck 27 14,
    bus 28 15, caravan 29 255, trailer 30 255, train 31 16, motorcycle 32 17, bicycle 33 18, license plate -1 -1
"""
CITYSCAPES_LABELS = [item.strip().rsplit(" ", 2) for item in CITYSCAPES_LABELS.split(",")]

# The ids of annotations_trainval2017's categories: 1 to 90 without these ten.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


# ---- miniature downloads


def jpeg(rng, width, height):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def png(array, palette=None):
    image = Image.fromarray(np.asarray(array, np.uint8))
    if palette:
        image.putpalette([value for colour in palette for value in colour])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def mat(segmentation):
    """A file of SBD's `cls` folder: MATLAB 5, compressed, with its three fields."""
    boundaries = np.empty((20, 1), object)
    for index in range(20):
        boundaries[index, 0] = scipy.sparse.csc_matrix(segmentation == index + 1)
    present = np.setdiff1d(np.unique(segmentation), [0]).astype(np.uint8)[:, None]
    content = {"Boundaries": boundaries, "Segmentation": segmentation, "CategoriesPresent": present}
    file = io.BytesIO()
    scipy.io.savemat(file, {"GTcls": content}, do_compression=True)
    return file.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        folders = {parent.as_posix() for name in files for parent in Path(name).parents if parent.name}
        for folder in sorted(folders):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in sorted({f"{Path(name).parent.as_posix()}/" for name in files if "/" in name}):
            archive.mkdir(folder) if hasattr(archive, "mkdir") else archive.writestr(folder, "")
        for name, data in files.items():
            archive.writestr(name, data)


def unpack(folder, *contents):
    for name, data in itertools.chain(*(files.items() for files in contents)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_lists(folder, **lists):
    for name, lines in lists.items():
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))
    return folder


class Pascal:
    """VOC has labels of the first four images, SBD of images 2 to 9; the lists name eight, 0 for validation."""

    def __init__(self, folder, count=10, size=(31, 22)):
        contents = [self._content(seed, *size) for seed in range(10)]
        self.ids = [f"20{7 + i // 3:02d}_{i:06d}" for i in range(count)]
        self.folder, self.voc, self.sbd = folder, {}, {}
        self.listed, self.expected = self.ids[:-2], {}
        voc, sbd = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
        for i, name in enumerate(self.ids):
            image, own_label, sbd_mat, sbd_label = contents[i % 10]
            self.voc[f"{voc}/Annotations/{name}.xml"] = b"<annotation/>"
            self.voc[f"{voc}/JPEGImages/{name}.jpg"] = image
            if i >= 2:
                self.sbd[f"{sbd}/cls/{name}.mat"] = sbd_mat
                self.sbd[f"{sbd}/img/{name}.jpg"] = b"not used"
                self.sbd[f"{sbd}/inst/{name}.mat"] = b"not used"
                self.expected[name] = sbd_label
            if i < 4:
                self.voc[f"{voc}/SegmentationClass/{name}.png"] = png(own_label, CATALOG["pascal"].palette)
                self.voc[f"{voc}/SegmentationObject/{name}.png"] = png(own_label // 2)
                self.expected[name] = own_label
        folder.mkdir(parents=True)
        line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png".format
        lines = [line(name) for name in self.listed]
        self.splits = write_lists(folder / "lists", train=lines[1:], val=lines[:1], **{"few/labeled": lines[1:4]})

    @staticmethod
    def _content(seed, width, height):
        """An image, VOC's label, SBD's file and its label, which differs from VOC's."""
        rng = np.random.default_rng(seed)
        own, other = rng.integers(0, [[[22]], [[21]]], (2, height, width), dtype=np.uint8)
        own[own == 21] = 255
        return jpeg(rng, width, height), own, mat(other), other

    def archives(self):
        downloads = self.folder / "downloads"
        downloads.mkdir()
        write_tar(downloads / VOC_TAR, self.voc)
        write_tar(downloads / SBD_TGZ, self.sbd, "w:gz")
        return downloads

    def check(self, root):
        files = {f"JPEGImages/{name}.jpg" for name in self.listed}
        assert set(tree(root)) == files | {f"SegmentationClass/{name}.png" for name in self.listed}
        for name in self.listed:
            image = (root / f"JPEGImages/{name}.jpg").read_bytes()
            assert image == self.voc[f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg"]
            with Image.open(root / f"SegmentationClass/{name}.png") as label:
                assert label.mode == "P" and label.getpalette()[45:48] == [192, 128, 128]  # person
                assert np.array_equal(np.asarray(label), self.expected[name])


class Cityscapes:
    """Two cities for training, one for validation, one for testing, which no list names; every id occurs."""

    def __init__(self, folder):
        rng = np.random.default_rng(1)
        self.folder, self.images, self.labels, self.expected = folder, {}, {}, {}
        train_id = {int(number) % 256: int(value) % 256 for _, number, value in CITYSCAPES_LABELS}
        names = [("train", "aachen"), ("train", "bad-honnef"), ("val", "munster"), ("test", "berlin")]
        lists = {"train": [], "val": [], "test": []}
        for (part, city), number in itertools.product(names, range(2)):
            stem = f"{part}/{city}/{city}_{number:06d}_000019"
            ids = rng.permutation(np.resize([*range(34), 255], 40 * 24)).reshape(24, 40).astype(np.uint8)
            self.images[f"leftImg8bit/{stem}_leftImg8bit.png"] = png(rng.integers(0, 256, (24, 40, 3)))
            self.labels[f"gtFine/{stem}_gtFine_labelIds.png"] = png(ids)
            self.labels[f"gtFine/{stem}_gtFine_instanceIds.png"] = png(ids // 2)
            self.labels[f"gtFine/{stem}_gtFine_color.png"] = png(rng.integers(0, 256, (24, 40, 4)))
            self.labels[f"gtFine/{stem}_gtFine_polygons.json"] = b"{}"
            self.expected[stem] = np.array([[train_id[value] for value in row] for row in ids.tolist()])
            lists[part].append(f"leftImg8bit/{stem}_leftImg8bit.png gtFine/{stem}_gtFine_labelTrainIds.png")
        folder.mkdir(parents=True)
        self.splits = write_lists(folder / "lists", train=lists["train"], val=lists["val"])

    def archives(self):
        downloads = self.folder / "downloads"
        downloads.mkdir()
        notice = {"license.txt": b"", "README": b""}
        write_zip(downloads / "leftImg8bit_trainvaltest.zip", {**notice, **self.images})
        write_zip(downloads / "gtFine_trainvaltest.zip", {**notice, **self.labels})
        return downloads

    def check(self, root):
        expected = {}
        for stem in self.expected:
            if not stem.startswith("test"):
                expected[f"leftImg8bit/{stem}_leftImg8bit.png"] = self.images[f"leftImg8bit/{stem}_leftImg8bit.png"]
                label = root / f"gtFine/{stem}_gtFine_labelTrainIds.png"
                assert np.array_equal(np.asarray(Image.open(label)), self.expected[stem])
                expected[label.relative_to(root).as_posix()] = label.read_bytes()
        assert tree(root) == expected


class Coco:
    """Training images: three listed, one not listed, one without annotations; two for validation."""

    def __init__(self, folder):
        rng = np.random.default_rng(2)
        self.folder, self.images, self.expected = folder, {}, {}
        self.instances = {part: self._instances(part) for part in ("train", "val")}
        annotation_id = itertools.count(1000)
        for part, index in [*(("train", i) for i in range(5)), ("val", 5), ("val", 6)]:
            image_id, width, height = 100 + 7 * index, 30 + index, 25 - index
            name = f"{image_id:012d}"
            self.images[f"{part}2017/{name}.jpg"] = jpeg(rng, width, height)
            self.instances[part]["images"].append(
                {"license": 4, "file_name": f"{name}.jpg", "height": height, "width": width, "id": image_id}
            )
            objects = []
            for kind in [] if index == 4 else ["polygon", "runs", "crowd", "compressed", "twin", "parts", "twin"] * 2:
                segmentation, mask = shape(kind, width, height, rng)
                category = int(rng.choice(COCO_IDS))
                item = {
                    "segmentation": segmentation,
                    "area": float(rng.random()),  # not what counts
                    "iscrowd": int(kind == "crowd"),
                    "image_id": image_id,
                    "bbox": [0, 0, 1, 1],
                    "category_id": category,
                    "id": next(annotation_id),
                }
                objects.append((kind != "crowd", -mask.sum(), item["id"], COCO_IDS.index(category) + 1, mask))
                self.instances[part]["annotations"].append(item)
            self.expected[name] = paint(objects, width, height)
        for part in self.instances.values():
            rng.shuffle(part["annotations"])
        names = sorted(self.expected)
        folder.mkdir(parents=True)
        train = [f"train2017/{name}.jpg masks/{name}.png" for name in names[:3]]
        val = [f"val2017/{name}.jpg masks/{name}.png" for name in names[5:]]
        self.splits = write_lists(folder / "lists", val=val, **{"1_2/labeled": train})

    def _instances(self, part):
        names = CATALOG["coco"].classes[1:]
        categories = [{"supercategory": "x", "id": i, "name": n} for i, n in zip(COCO_IDS, names, strict=True)]
        return {"info": {"description": part}, "images": [], "annotations": [], "categories": categories[::-1]}

    def annotation_files(self):
        files = {f"annotations/instances_{p}2017.json": json.dumps(c).encode() for p, c in self.instances.items()}
        return {**files, "annotations/captions_val2017.json": b"{}"}

    def archives(self):
        downloads = self.folder / "downloads"
        downloads.mkdir()
        for part in ("train", "val"):
            files = {name: data for name, data in self.images.items() if name.startswith(part)}
            write_zip(downloads / f"{part}2017.zip", files)
        write_zip(downloads / "annotations_trainval2017.zip", self.annotation_files())
        return downloads

    def check(self, root):
        files = tree(root)
        assert set(files) == set(self.images) | {f"masks/{name}.png" for name in self.expected}
        assert {name: data for name, data in files.items() if not name.startswith("masks")} == self.images
        for name, expected in self.expected.items():
            assert np.array_equal(np.asarray(Image.open(root / f"masks/{name}.png")), expected)


class Ade20k:
    """Three training images, one of which no list names, and one for validation; every official label occurs."""

    def __init__(self, folder):
        rng = np.random.default_rng(3)
        self.folder, self.images, self.labels, self.expected = folder, {}, {}, {}
        names = [("training", f"ADE_train_{i:08}") for i in (1, 2, 3)] + [("validation", "ADE_val_00000001")]
        for part, name in names:
            official = rng.permutation(np.resize(np.arange(151), 24 * 20)).reshape(20, 24)
            self.images[f"images/{part}/{name}.jpg"] = jpeg(rng, 24, 20)
            self.labels[f"annotations/{part}/{name}.png"] = png(official)
            self.expected[f"annotations/{part}/{name}.png"] = np.where(official == 0, 255, official - 1)
        folder.mkdir(parents=True)
        lines = [f"{image} {label}" for image, label in zip(self.images, self.labels, strict=True)]
        self.splits = write_lists(folder / "lists", val=lines[3:], **{"1_2/labeled": lines[:2]})

    def archives(self):
        downloads = self.folder / "downloads"
        downloads.mkdir()
        files = {**self.images, **self.labels, "objectInfo150.txt": b"", "sceneCategories.txt": b""}
        files = {f"ADEChallengeData2016/{name}": data for name, data in files.items()}
        write_zip(downloads / "ADEChallengeData2016.zip", files)
        return downloads

    def check(self, root):
        files = tree(root)
        assert set(files) == set(self.images) | set(self.labels)
        assert {name: files[name] for name in self.images} == self.images
        for name, expected in self.expected.items():
            assert np.array_equal(np.asarray(Image.open(root / name)), expected)


DATASETS = {"pascal": Pascal, "cityscapes": Cityscapes, "coco": Coco, "ade20k": Ade20k}


# ---- slow computations of COCO's masks


def shape(kind, width, height, rng):
    """A COCO segmentation of a kind, and its pixels, found one by one."""
    x, y = int(rng.integers(0, width - 8)), int(rng.integers(0, height - 8))
    if kind in ("polygon", "parts"):
        # Staircases and slopes that keep clear of pixel centres, so that no convention of borders matters.
        stairs = [x, y, x + 6, y, x + 6, y + 3, x + 3, y + 3, x + 3, y + 7, x, y + 7]
        slope = [x + 0.5, y, x + 8, y, x + 8, y + 7.5]
        polygons = [stairs] if kind == "polygon" else [stairs, slope, [x, y, x + 1, y + 1]]
        return polygons, pixels(lambda i, j: any(inside(i + 0.5, j + 0.5, p) for p in polygons), width, height)
    if kind == "twin":  # all have equally many pixels
        return [[x, y, x + 5, y, x + 5, y + 4, x, y + 4]], pixels(
            lambda i, j: x <= i < x + 5 and y <= j < y + 4, width, height
        )
    counts, left = [], width * height
    while left:
        counts.append(min(left, int(rng.integers(0 if not counts else 1, 70))))
        left -= counts[-1]
    mask = np.zeros((height, width), bool)
    position = 0
    for index, count in enumerate(counts):  # runs go down the columns; the first is of zeros
        for _ in range(count):
            mask[position % height, position // height] = index % 2
            position += 1
    return {"size": [height, width], "counts": compress(counts) if kind == "compressed" else counts}, mask


def pixels(contains, width, height):
    return np.array([[contains(i, j) for i in range(width)] for j in range(height)], bool)


def inside(x, y, polygon):
    """Whether a ray from the point crosses the polygon's border an odd number of times."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    odd = False
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            odd = not odd
    return odd


def compress(counts):
    """Runs as COCO's text: differences to the run before the last, in groups of five bits."""
    text = ""
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            group, value = value & 31, value >> 5
            last = value == (-1 if group & 16 else 0)
            text += chr(48 + group + (0 if last else 32))
            if last:
                break
    return text


def paint(objects, width, height):
    """At each pixel, the class of the highest of (single or crowd, fewer pixels, id) there, or background."""
    label = np.zeros((height, width), int)
    for y, x in itertools.product(range(height), range(width)):
        here = [item[:4] for item in objects if item[4][y, x]]
        label[y, x] = max(here)[3] if here else 0
    return label


# ---- running it


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def times(root):
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


def prepare(dataset, made, root, *sources, workers=1):
    words = [dataset, "--root", str(root), "--splits", str(made.splits), "--workers", str(workers)]
    prepare_data.main(words + [word for source in sources for word in ("--source", str(source))])


def complaint(capsys, *arguments, **options):
    """The one line with which a command is refused."""
    return refusal(capsys, lambda: prepare(*arguments, **options))


@pytest.fixture(params=DATASETS)
def dataset(request):
    return request.param


@pytest.fixture
def made(dataset, tmp_path):
    return DATASETS[dataset](tmp_path / "made")


@pytest.fixture
def pascal(tmp_path):
    return Pascal(tmp_path / "made")


@pytest.fixture
def coco(tmp_path):
    return Coco(tmp_path / "made")


def test_every_pixel_of_prepared_archives_is_right(dataset, made, tmp_path, capsys):
    prepare(dataset, made, tmp_path / "root", made.archives())
    made.check(tmp_path / "root")
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert f"{len(tree(tmp_path / 'root'))} files written" in line


def test_processes_write_the_same_files(dataset, made, tmp_path):
    downloads = made.archives()
    prepare(dataset, made, tmp_path / "root", *downloads.iterdir(), workers=2)
    made.check(tmp_path / "root")


def test_a_second_run_writes_nothing(dataset, made, tmp_path, capsys):
    downloads = made.archives()
    prepare(dataset, made, tmp_path / "root", downloads)
    before = times(tmp_path / "root")
    for source in (downloads, tmp_path / "gone"):
        prepare(dataset, made, tmp_path / "root", source)
        assert times(tmp_path / "root") == before
    assert "prepared already, nothing written" in capsys.readouterr().out


def test_a_folder_that_is_prepared_already_is_only_checked(dataset, made, tmp_path, capsys):
    prepare(dataset, made, tmp_path / "release", made.archives())
    before = times(tmp_path / "release")
    prepare(dataset, made, tmp_path / "root", tmp_path / "release")
    assert times(tmp_path / "release") == before and not (tmp_path / "root").exists()
    assert f"set data_root: {tmp_path / 'release'}" in capsys.readouterr().out


@pytest.mark.parametrize(("in_place", "workers"), [(False, 1), (True, 2)], ids=["elsewhere", "in place"])
def test_unpacked_folders_serve_as_well_as_archives(tmp_path, in_place, workers):
    for name, contents in (
        ("pascal", ["voc", "sbd"]),
        ("cityscapes", ["images", "labels"]),
        ("coco", ["images", "annotation_files"]),
    ):
        made = DATASETS[name](tmp_path / f"{name}-made")
        files = [getattr(made, content) for content in contents]
        source = unpack(tmp_path / name, *(content() if callable(content) else content for content in files))
        root = source if in_place else tmp_path / f"{name}-root"
        prepare(name, made, root, source, workers=workers)
        expected = tmp_path / f"{name}-expected"
        prepare(name, made, expected, made.archives())
        written = tree(root)
        assert tree(expected).items() <= written.items()
        assert in_place or len(tree(expected)) == len(written)


def test_what_a_first_run_left_out_is_made_by_another(pascal, tmp_path):
    downloads, root = pascal.archives(), tmp_path / "root"
    few = write_lists(tmp_path / "few", val=["JPEGImages/2009_000006.jpg SegmentationClass/2009_000006.png"])
    prepare_data.main(["pascal", "--root", str(root), "--source", str(downloads), "--splits", str(few)])
    first = times(root)
    assert len(tree(root)) == 2
    prepare("pascal", pascal, root, downloads)
    pascal.check(root)
    assert all(times(root)[path] == first[path] for path in first if path.is_file())


def test_ade20k_s_unpacked_download_is_converted_into_another_folder_and_never_in_place(tmp_path, capsys):
    made = Ade20k(tmp_path / "made")
    official = unpack(tmp_path / "ADEChallengeData2016", made.images, made.labels)
    before = tree(official)
    assert "class indices would replace them" in complaint(capsys, "ade20k", made, official, official)
    prepare("ade20k", made, tmp_path / "root", official)
    made.check(tmp_path / "root")
    assert tree(official) == before
    prepare("ade20k", made, tmp_path / "root", official)  # complete now: nothing is converted twice
    made.check(tmp_path / "root")


def test_ade20k_s_labels_without_an_ignored_pixel_are_known_as_converted_too(tmp_path, capsys):
    made = Ade20k(tmp_path / "made")
    for name, data in made.labels.items():
        official = np.maximum(np.asarray(Image.open(io.BytesIO(data))), 1)
        made.labels[name], made.expected[name] = png(official), official - 1
    official = unpack(tmp_path / "ADEChallengeData2016", made.images, made.labels)
    assert "class indices would replace them" in complaint(capsys, "ade20k", made, official, official)
    for _ in range(2):
        prepare("ade20k", made, tmp_path / "root", official)
        made.check(tmp_path / "root")


def test_ade20k_s_labels_beyond_150_are_refused():
    with pytest.raises(ValueError, match="labels up to 151"):
        ade20k_label(png(np.array([[0, 151]])))


# ---- the conversions


def test_the_rules_give_every_file_of_the_published_splits(dataset):
    samples = prepare_data.read_lists(PROJECT_ROOT / "splits" / dataset)
    # COCO's five splits have 6,808 labelled images between them.
    counts = {"pascal": 10_582 + 1_449, "cityscapes": 2_975 + 500, "coco": 6_808 + 5_000, "ade20k": 10_105 + 2_000}
    assert len(samples) == counts[dataset]
    for name in prepare_data.listed_files(samples):
        path = name.replace("labelTrainIds", "labelIds")
        if dataset == "pascal" and path.endswith(".png"):
            path = path.replace("SegmentationClass", "benchmark_RELEASE/dataset/cls").replace(".png", ".mat")
        if not name.startswith("masks/"):  # these come out of the annotation files
            found = [(rule, re.search(rf"(?:^|/){rule.found}$", path)) for rule in RECIPES[dataset].rules]
            assert [rule.target.format(**match.groupdict()) for rule, match in found if match] == [name]


def test_sbd_is_only_taken_where_voc_has_no_label(pascal, tmp_path):
    downloads = pascal.archives()
    prepare("pascal", pascal, tmp_path / "root", downloads / SBD_TGZ, downloads / VOC_TAR)
    pascal.check(tmp_path / "root")
    both = pascal.ids[2]
    assert not np.array_equal(sbd_label(pascal.sbd[f"benchmark_RELEASE/dataset/cls/{both}.mat"]), pascal.expected[both])


def test_the_splits_of_voc_s_own_labels_need_no_sbd(pascal, tmp_path):
    downloads = pascal.archives()
    splits = pascal.splits / "few"
    words = ["pascal", "--root", str(tmp_path / "root"), "--splits", str(splits), "--workers", "1"]
    prepare_data.main([*words, "--source", str(downloads / VOC_TAR)])
    assert len(tree(tmp_path / "root")) == 6


def test_sbd_never_stands_in_for_labels_of_voc_that_are_missing(pascal, tmp_path, capsys):
    images = {name: data for name, data in pascal.voc.items() if "SegmentationClass" not in name}
    source = unpack(tmp_path / "unpacked", images, pascal.sbd)
    del pascal.listed[:2]  # SBD has labels of all others
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png".format
    shutil.rmtree(pascal.splits)
    write_lists(pascal.splits, train=[line(name) for name in pascal.listed])
    error = complaint(capsys, "pascal", pascal, tmp_path / "root", source)
    assert VOC_TAR in error and "labels" in error
    assert not (tmp_path / "root").exists()


def test_the_table_of_cityscapes_is_the_official_one():
    assert len(CITYSCAPES_LABELS) == 35
    ids = np.array([[int(number) for _, number, _ in CITYSCAPES_LABELS]]).astype(np.uint8)
    expected = np.array([[int(value) for _, _, value in CITYSCAPES_LABELS]]).astype(np.uint8)
    assert np.array_equal(cityscapes_label(png(ids)), expected)
    names = [name for name, _, value in CITYSCAPES_LABELS if 0 <= int(value) < 255]
    assert tuple(names) == CATALOG["cityscapes"].classes
    with pytest.raises(ValueError, match="ids up to 34, but Cityscapes has 0 to 33"):
        cityscapes_label(png([[0, 34]]))


def test_train_ids_that_exist_are_used(tmp_path):
    made = Cityscapes(tmp_path / "made")
    stem = "train/aachen/aachen_000001_000019"
    made.expected[stem] = np.full((24, 40), 5)
    made.labels[f"gtFine/{stem}_gtFine_labelTrainIds.png"] = png(made.expected[stem])
    prepare("cityscapes", made, tmp_path / "root", made.archives())
    made.check(tmp_path / "root")


def test_coco_s_smaller_objects_lie_on_larger_ones_and_all_on_crowds():
    def runs(first, last):  # columns of a 4 x 10 image
        return {"size": [4, 10], "counts": [4 * first, 4 * (last - first), 40 - 4 * last]}

    boxes = [(1, False, 0, 9), (2, False, 2, 4), (3, True, 3, 10), (4, False, 5, 7), (5, False, 6, 8), (6, True, 0, 1)]
    for order in (boxes, boxes[::-1]):
        objects = [CocoObject(1, index, index, crowd, runs(*span)) for index, crowd, *span in order]
        label = coco_label(CocoImage(1, "1.jpg", 4, 10, objects))
        assert label.tolist() == [[1, 1, 2, 2, 1, 4, 5, 5, 1, 3]] * 4


def test_coco_s_images_without_annotations_are_background():
    label = coco_label(CocoImage(1, "1.jpg", 3, 5, []))
    assert label.shape == (3, 5) and label.dtype == np.uint8 and not label.any()


def test_coco_s_runs_must_fill_the_image():
    for counts, size in (([3, 4], [2, 4]), ([3, 5], [4, 2])):
        item = CocoObject(1, 1, 1, False, {"size": size, "counts": counts})
        with pytest.raises(ValueError, match=r"runs of 7 pixels|a mask of"):
            coco_label(CocoImage(1, "1.jpg", 2, 4, [item]))


def test_categories_other_than_coco_s_are_refused(coco, tmp_path, capsys):
    coco.instances["val"]["categories"][0]["name"] = "unicorn"
    with pytest.raises(ValueError, match="not COCO's 80"):
        read_instances(json.dumps(coco.instances["val"]).encode())
    error = complaint(capsys, "coco", coco, tmp_path / "root", coco.archives())
    assert "instances_val2017.json" in error and "not COCO's 80" in error


# ---- interrupted


def children(pid):
    return {int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_a_killed_preparation_goes_on_to_the_same_result(tmp_path):
    made = Pascal(tmp_path / "made", count=200, size=(300, 200))
    source, root, expected = made.archives(), tmp_path / "root", tmp_path / "expected"
    arguments = ["pascal", "--source", source, "--splits", made.splits, "--workers", "2", "--root"]
    command = [sys.executable, "-m", "scripts.prepare_data", *map(str, arguments)]
    process = subprocess.Popen([*command, str(root)], cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
    labels = root / "SegmentationClass"
    deadline = time.monotonic() + 200
    while not labels.is_dir() or len(list(labels.iterdir())) < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    workers = children(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert workers
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.01)

    finished = {path: path.stat().st_mtime_ns for path in root.rglob("[!.]*") if path.is_file()}
    prepare("pascal", made, expected, source, workers=2)
    assert 20 <= len(finished) < len(tree(expected))
    for path in finished:
        assert path.read_bytes() == (expected / path.relative_to(root)).read_bytes()
    (labels / ".2007_000000.png.123.tmp").write_bytes(b"half a label")
    prepare("pascal", made, root, source, workers=2)
    assert tree(root) == tree(expected)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


def test_unlisted_files_come_first_so_that_listed_ones_mean_completeness(coco, tmp_path, monkeypatch):
    order = []
    run = prepare_data.run
    monkeypatch.setattr(prepare_data, "run", lambda job: (order.append(job.target.stem), run(job)))
    prepare("coco", coco, tmp_path / "root", coco.archives())
    names = sorted(coco.expected)
    unlisted = set(names[3:5])
    assert set(order[:4]) == unlisted and not unlisted & set(order[4:])


run_job = prepare_data.run


def die_converting(job):
    os._exit(9) if job.convert else run_job(job)


def test_a_process_that_dies_ends_the_preparation_with_a_line(pascal, tmp_path, capsys, monkeypatch):
    downloads = pascal.archives()
    monkeypatch.setattr(prepare_data, "run", die_converting)
    error = complaint(capsys, "pascal", pascal, tmp_path / "root", downloads, workers=2)
    assert error.startswith("a process was killed") and "start again" in error
    monkeypatch.undo()
    prepare("pascal", pascal, tmp_path / "root", downloads)
    pascal.check(tmp_path / "root")


def test_an_unfinished_file_is_never_visible(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists() and temporary.name.startswith(".")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# ---- what users get wrong, and archives that mean harm


def test_a_missing_download_is_named(dataset, made, tmp_path, capsys):
    downloads = made.archives()
    official = {
        "pascal": [VOC_TAR, SBD_TGZ],
        "cityscapes": ["leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"],
        "coco": ["train2017.zip", "val2017.zip", "annotations_trainval2017.zip"],
        "ade20k": ["ADEChallengeData2016.zip"],
    }[dataset]
    error = complaint(capsys, dataset, made, tmp_path / "root")
    assert all(name in error for name in official)
    for name in official:
        (downloads / name).rename(downloads / "elsewhere")
        error = complaint(capsys, dataset, made, tmp_path / "root", downloads)
        assert re.findall(r"\S+\.(?:zip|tar|tgz)", error) == [name]
        (downloads / "elsewhere").rename(downloads / name)
    assert not (tmp_path / "root").exists()
    assert "no such file" in complaint(capsys, dataset, made, tmp_path / "root", tmp_path / "nowhere")


def test_a_damaged_archive_is_named_before_anything_is_written(dataset, made, tmp_path, capsys):
    downloads = made.archives()
    for path in downloads.iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
        error = complaint(capsys, dataset, made, tmp_path / "root", downloads)
        assert path.name in error and ("download it again" in error)
        path.write_bytes(whole)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("fault", ["cut off", "damaged"])
def test_a_tar_that_seems_to_end_early_is_noticed(pascal, tmp_path, capsys, fault):
    # What comes after, VOC's labels, would silently be replaced by SBD's.
    path = pascal.archives() / VOC_TAR
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        first = archive.getmember(f"VOCdevkit/VOC2012/SegmentationClass/{pascal.ids[1]}.png").offset
    path.write_bytes(content[:first] if fault == "cut off" else content[:first] + b"x" * 512 + content[first + 512 :])
    error = complaint(capsys, "pascal", pascal, tmp_path / "root", path.parent)
    assert error == f"{path}: damaged or incomplete (its end is missing); download it again"


def test_damage_inside_an_archive_is_named_and_mended_by_another_run(tmp_path, capsys):
    made = Cityscapes(tmp_path / "made")
    downloads = made.archives()
    path = downloads / "gtFine_trainvaltest.zip"
    whole = path.read_bytes()
    name = b"gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png"
    start = whole.index(name) + len(name)
    path.write_bytes(whole[: start + 40] + bytes(20) + whole[start + 60 :])
    error = complaint(capsys, "cityscapes", made, tmp_path / "root", downloads)
    assert str(path) in error and "download it again" in error
    path.write_bytes(whole)
    prepare("cityscapes", made, tmp_path / "root", downloads)
    made.check(tmp_path / "root")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_label_of_another_format_is_named(pascal, tmp_path, capsys, workers):
    name = f"benchmark_RELEASE/dataset/cls/{pascal.ids[5]}.mat"
    pascal.sbd[name] = b"MATLAB 5.0 MAT-file" + bytes(200)
    error = complaint(capsys, "pascal", pascal, tmp_path / "root", pascal.archives(), workers=workers)
    assert f"{SBD_TGZ}: {name}: not as in the official download" in error


@pytest.mark.parametrize(
    ("change", "complains"),
    [
        ({"name": "../../JPEGImages/2007_000000.jpg"}, "leads out of"),
        ({"name": "/etc/JPEGImages/2007_000000.jpg"}, "leads out of"),
        ({"name": "a/../../x"}, "leads out of"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link or a device"),
        ({"type": tarfile.LNKTYPE, "linkname": "../../../etc/passwd"}, "link or a device"),
        ({"type": tarfile.CHRTYPE}, "link or a device"),
        ({"type": tarfile.FIFOTYPE}, "link or a device"),
    ],
    ids=["dots", "absolute", "dots within", "symlink", "hard link", "device", "fifo"],
)
def test_a_tar_with_a_way_out_of_it_is_refused(pascal, tmp_path, capsys, change, complains):
    downloads = pascal.archives()
    info = tarfile.TarInfo("VOCdevkit/VOC2012/JPEGImages/2007_000000.jpg")
    for key, value in change.items():
        setattr(info, key, value)
    with tarfile.open(downloads / VOC_TAR, "a") as archive:
        archive.addfile(info)
    before = tree(tmp_path)
    error = complaint(capsys, "pascal", pascal, tmp_path / "root", downloads)
    assert complains in error and info.name in error
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["../val2017/000000000100.jpg", "/val2017/1.jpg", "val2017\\..\\..\\1.jpg", "C:/1.jpg"]
)
def test_a_zip_with_a_way_out_of_it_is_refused(coco, tmp_path, capsys, name):
    downloads = coco.archives()
    with zipfile.ZipFile(downloads / "val2017.zip", "a") as archive:
        archive.writestr(name, b"x")
    assert "leads out of" in complaint(capsys, "coco", coco, tmp_path / "root", downloads)
    assert not (tmp_path / "root").exists()


def test_a_zip_with_a_link_is_refused(coco, tmp_path, capsys):
    downloads = coco.archives()
    info = zipfile.ZipInfo("val2017/000000000149.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(downloads / "val2017.zip", "a") as archive:
        archive.writestr(info, "/etc/passwd")
    assert "link or a device" in complaint(capsys, "coco", coco, tmp_path / "root", downloads)


def test_a_disk_that_is_too_small_is_noticed_first(dataset, made, tmp_path, capsys, monkeypatch):
    downloads = made.archives()
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 10_000))
    error = complaint(capsys, dataset, made, tmp_path / "root", downloads)
    assert "GB are needed" in error and "GB left" in error
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(("dataset", "package"), [("pascal", "scipy"), ("coco", "pycocotools")])
def test_a_missing_package_is_named_with_its_remedy(dataset, package, made, tmp_path, capsys, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    error = complaint(capsys, dataset, made, tmp_path / "root", made.archives())
    assert package in error and "pip install -r requirements-data.txt" in error
    assert not (tmp_path / "root").exists()


def test_cityscapes_needs_no_further_package(tmp_path, monkeypatch):
    made = Cityscapes(tmp_path / "made")
    for package in ("scipy", "pycocotools"):
        monkeypatch.setitem(sys.modules, package, None)
    prepare("cityscapes", made, tmp_path / "root", made.archives())
    made.check(tmp_path / "root")


def test_the_packages_of_the_recipes_are_in_both_requirement_files():
    packages = {rule.module.split(".")[0] for recipe in RECIPES.values() for rule in recipe.rules if rule.module}
    assert packages == {"scipy", "pycocotools"}
    for name in ("requirements-data.txt", "requirements-dev.txt"):
        lines = (PROJECT_ROOT / name).read_text().splitlines()
        assert packages <= {line.split(">=")[0] for line in lines}


def test_wrong_arguments_are_named(pascal, tmp_path, capsys):
    assert "--workers 0" in complaint(capsys, "pascal", pascal, tmp_path / "root", workers=0)
    (tmp_path / "file").write_text("")
    error = complaint(capsys, "pascal", pascal, tmp_path / "file", pascal.archives())
    assert error.startswith(f"{tmp_path / 'file'}/") and "cannot be written" in error
    (pascal.splits / "few/labeled.txt").write_text("images/1.jpg labels/1.png")
    error = complaint(capsys, "pascal", pascal, tmp_path / "root", pascal.folder / "downloads")
    assert "images/1.jpg" in error and "JPEGImages/{id}.jpg" in error
    shutil.rmtree(pascal.splits)
    assert "no list (.txt)" in complaint(capsys, "pascal", pascal, tmp_path / "root")


def test_a_fault_in_a_prepared_folder_is_named(pascal, tmp_path, capsys):
    prepare("pascal", pascal, tmp_path / "root", pascal.archives())
    label = tmp_path / f"root/SegmentationClass/{pascal.ids[0]}.png"
    for content, complains in ((png(np.full((22, 31), 21)), "allowed are 0..20"), (png([[0]]), "1 x 1 pixels")):
        label.write_bytes(content)
        error = complaint(capsys, "pascal", pascal, tmp_path / "root")
        assert str(label) in error and complains in error and "delete it" in error
        assert label.read_bytes() == content


def test_folders_are_searched_for_archives_and_read_in_order(tmp_path):
    folder = unpack(
        tmp_path / "d", {"b/c.txt": b"1", "a.txt": b"22", "train2017.zip": b"", "other.zip": b"", ".b.png.1.tmp": b"3",
                         "._train2017.zip": b"4", ".trash/d.txt": b"5", "__MACOSX/._a.txt": b"6"}
    )  # fmt: skip
    assert find_sources(folder, ("train2017*",)) == [folder, folder / "train2017.zip"]
    assert [(m.path, m.size, m.read()) for m in members(folder) if m.size] == [
        ("a.txt", 2, b"22"),
        ("b/c.txt", 1, b"1"),
    ]
    with pytest.raises(DataError, match="no such file or folder"):
        find_sources(tmp_path / "none", ())
    link = tmp_path / "link"
    os.symlink(folder, link)
    os.symlink("..", folder / "b/back")
    assert len(list(members(link))) == 4


def test_hidden_files_of_archives_and_hidden_lists_are_left_out(tmp_path):
    """As macOS adds them to archives, and an editor's copies to a folder of lists."""
    names = ["VOC/a.jpg", "__MACOSX/VOC/._a.jpg", "VOC/._a.jpg", "VOC/.DS_Store"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped, tarfile.open(tmp_path / "a.tar", "w") as tarred:
        for name in names:
            zipped.writestr(name, b"1")
            tarred.addfile(tarfile.TarInfo(name))
    for source in ("a.zip", "a.tar"):
        assert [member.path for member in members(tmp_path / source)] == ["VOC/a.jpg"]
    unpack(tmp_path / "lists", {"a/all.txt": b"a.jpg\n", ".ipynb_checkpoints/all-checkpoint.txt": b"b.jpg\n"})
    assert [sample.image for sample in prepare_data.read_lists(tmp_path / "lists")] == ["a.jpg"]


@pytest.mark.parametrize("place", ["locks", "processes"])
def test_processes_that_the_system_refuses_are_one_line(pascal, tmp_path, capsys, monkeypatch, place):
    def refuse(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    target = {"locks": "ProcessPoolExecutor.__init__", "processes": "ProcessPoolExecutor.submit"}[place]
    monkeypatch.setattr(f"concurrent.futures.{target}", refuse)
    line = complaint(capsys, "pascal", pascal, tmp_path / "root", pascal.archives(), workers=2)
    assert line.startswith("converting processes: they cannot be started: ")
    assert line.endswith("Resource temporarily unavailable; --workers 1 needs none")
