"""The official downloads: what is taken from them (`RECIPES`), and their labels as arrays of class indices.

SciPy (SBD) and pycocotools (COCO) are imported where they are needed: nothing else does (`requirements-data.txt`).
"""

from __future__ import annotations

import importlib
import io
import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dataset.catalog import CATALOG, RGB, voc_palette
from dataset.errors import DataError
from dataset.files import IGNORE_INDEX, decode_label, open_label

# The Cityscapes ids of the 19 classes in order of trainId (cityscapesscripts, helpers/labels.py). All others are
# ignored: 0 to 6 (unlabeled, ego vehicle, ..., ground), 9, 10, 14, 15, 16, 18, 29, 30, and the licence plate's -1.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LAST_CITYSCAPES_ID = 33
ADE20K_CLASSES = 150
MARK = "class indices, written by scripts.prepare_data"


def require(module: str) -> ModuleType:
    """Import an optional module. Raises DataError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise DataError(f"{package} cannot be imported ({error}): pip install -r requirements-data.txt") from None


def sbd_label(data: bytes) -> np.ndarray:
    """`GTcls.Segmentation` of a .mat file of SBD's `cls` folder: uint8 (H, W), 0 to 20 (VOC's classes)."""
    loadmat = require("scipy.io").loadmat
    label = loadmat(io.BytesIO(data), variable_names=["GTcls"])["GTcls"][0, 0]["Segmentation"]
    if label.ndim != 2 or label.dtype != np.uint8:
        raise ValueError(f"Segmentation is {label.dtype} {label.shape}, not 8-bit and two-dimensional")
    return label


def cityscapes_label(data: bytes) -> np.ndarray:
    """A `labelIds` PNG of Cityscapes as trainIds: uint8 (H, W), 0 to 18, and 255 for ids that are not evaluated.

    255 in the file is the licence plate's -1, as 8 bits hold it.
    """
    with Image.open(io.BytesIO(data)) as image:
        ids = np.array(image)
    if ids.ndim != 2 or ids.dtype != np.uint8:
        raise ValueError(f"a {image.mode} image, not one 8-bit channel")
    if ((ids > LAST_CITYSCAPES_ID) & (ids != 255)).any():
        raise ValueError(f"ids up to {ids[ids != 255].max()}, but Cityscapes has 0 to {LAST_CITYSCAPES_ID}")
    train_ids = np.full(256, IGNORE_INDEX, np.uint8)
    train_ids[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return train_ids[ids]


def ade20k_label(data: bytes) -> np.ndarray:
    """An annotation of ADE20K's scene parsing set as class indices: uint8 (H, W), the official label minus 1.

    Official 0, "other objects", becomes 255.
    """
    with Image.open(io.BytesIO(data)) as image:
        label = np.array(image)
    if label.ndim != 2 or label.dtype != np.uint8:
        raise ValueError(f"a {image.mode} image, not one 8-bit channel")
    if (last := int(label.max())) > ADE20K_CLASSES:
        raise ValueError(f"labels up to {last}, but the official ones are 0 to {ADE20K_CLASSES}")
    return label - np.uint8(1)  # 0 wraps around to 255


def mark() -> PngInfo:
    """What distinguishes a label made here from an official one with the same values: a line of text in the PNG."""
    info = PngInfo()
    info.add_text("Comment", MARK)
    return info


def ade20k_is_converted(labels: Iterable[Path]) -> bool:
    """Whether labels are class indices already: marked, or with a 255, which official labels have as 0."""
    for path in labels:
        with open_label(path) as label:
            if label.info.get("Comment") == MARK or IGNORE_INDEX in decode_label(label):
                return True
    return False


class CocoObject(NamedTuple):
    """An annotation of COCO; `segmentation` is polygons (x0, y0, x1, y1, ...) or a run-length encoding."""

    image_id: int
    category_id: int
    id: int
    crowd: bool
    segmentation: list[array] | dict[str, Any]


class CocoImage(NamedTuple):
    """An image of COCO with its objects; `category_id` is replaced by the class, 1 to 80."""

    id: int
    file_name: str
    height: int
    width: int
    objects: list[CocoObject]


def read_instances(data: bytes) -> list[CocoImage]:
    """The images of an `instances_*.json`, each with its objects, in the file's order.

    Each annotation is packed as it is parsed: those of train2017 then take about 1 GB, and 2 GB at the peak.
    Raises ValueError for other categories than COCO's 80; another format raises what it meets.
    """
    content = json.loads(data, object_hook=_pack)
    categories = sorted((category["id"], category["name"]) for category in content["categories"])
    if tuple(name for _, name in categories) != CATALOG["coco"].classes[1:]:
        raise ValueError(f"{len(categories)} categories, which are not COCO's 80")
    class_of = {category: index for index, (category, _) in enumerate(categories, 1)}
    images = {image.id: image for image in content["images"]}
    for item in content["annotations"]:
        images[item.image_id].objects.append(item._replace(category_id=class_of[item.category_id]))
    return list(images.values())


def _pack(value: dict[str, Any]) -> Any:
    if "segmentation" in value:
        shape = value["segmentation"]
        if isinstance(shape, list):
            shape = [array("d", polygon) for polygon in shape]
        elif isinstance(shape["counts"], list):
            shape = {**shape, "counts": array("I", shape["counts"])}
        return CocoObject(value["image_id"], value["category_id"], value["id"], bool(value.get("iscrowd")), shape)
    if "file_name" in value:
        return CocoImage(value["id"], value["file_name"], value["height"], value["width"], [])
    return value


def coco_label(image: CocoImage) -> np.ndarray:
    """The classes of an image's pixels: uint8 (H, W), 0 background, 1 to 80 the things.

    Where objects overlap, the one with fewer pixels lies on top; of equally large ones, that with the higher
    annotation id. Crowd regions get their class too, but lie below all single objects. What no object covers is
    background, so an image without annotations is background altogether.
    """
    codec = require("pycocotools.mask")
    layers = []
    for item in image.objects:
        mask = _coco_mask(item.segmentation, image.height, image.width, codec)
        layers.append((not item.crowd, -int(mask.sum()), item.id, item.category_id, mask))
    label = np.zeros((image.height, image.width), np.uint8)
    for *_, index, mask in sorted(layers, key=lambda layer: layer[:3]):
        label[mask] = index
    return label


def _coco_mask(segmentation: list[array] | dict[str, Any], height: int, width: int, codec: ModuleType) -> np.ndarray:
    """The pixels of polygons, of an uncompressed or of a compressed run-length encoding: bool (height, width)."""
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # fewer than three points have no area
        if not polygons:
            return np.zeros((height, width), bool)
        runs = codec.merge(codec.frPyObjects(polygons, height, width))
    elif list(segmentation["size"]) != [height, width]:
        raise ValueError(f"a mask of {segmentation['size']} in an image of {[height, width]} (height, width)")
    elif isinstance(segmentation["counts"], str):
        runs = segmentation
    else:
        if sum(segmentation["counts"]) != height * width:
            raise ValueError(f"runs of {sum(segmentation['counts'])} pixels for {height * width}")
        runs = codec.frPyObjects(segmentation, height, width)
    return codec.decode(runs).astype(bool)


class Rule(NamedTuple):
    """One kind of file: the download that has it, the end of its path there, where it goes, how it is converted.

    The groups of `found` fill in `target`. Without `convert` the file is copied; else it gives a label from the
    file's bytes, by means of `module`. An annotation file holds the labels of many images: its target's `{id}`
    comes from their names, and `convert` takes one of its `read_instances`.
    """

    download: str
    found: str
    target: str
    convert: Callable[[Any], np.ndarray] | None = None
    module: str | None = None
    annotations: bool = False


@dataclass(frozen=True)
class Recipe:
    """How a dataset is put together. Of several rules that give one file, the first counts that finds it.

    `archives` are patterns of the archives' names. With `whole`, images and labels that no list names are taken too.
    Labels with a `palette` are saved with it, as the dataset's own are. Where prepared labels and the
    download's have the same paths, `is_converted` distinguishes them.
    """

    archives: tuple[str, ...]
    rules: tuple[Rule, ...]
    whole: bool = False
    palette: tuple[RGB, ...] | None = None
    is_converted: Callable[[Iterable[Path]], bool] | None = None


_VOC = "VOCtrainval_11-May-2012.tar (The PASCAL VOC Challenge 2012: host.robots.ox.ac.uk/pascal/VOC/voc2012)"
_SBD = (
    "benchmark.tgz (Semantic Boundaries Dataset and Benchmark: "
    "www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours)"
)
_CITYSCAPES = "(www.cityscapes-dataset.com/downloads)"
_COCO = "(cocodataset.org/#download)"
_ADE20K = "ADEChallengeData2016.zip (MIT Scene Parsing Benchmark: sceneparsing.csail.mit.edu)"
_CITYSCAPES_PATH = r"(?P<part>train|val)/(?P<city>[\w-]+)/(?P<id>[\w-]+)"


def _pascal() -> Recipe:
    info = CATALOG["pascal"]
    images = Rule(_VOC, r"JPEGImages/(?P<id>\w+)\.jpg", info.image)
    labels = Rule(_VOC, r"SegmentationClass/(?P<id>\w+)\.png", info.label)
    more_labels = Rule(_SBD, r"cls/(?P<id>\w+)\.mat", info.label, sbd_label, "scipy.io")
    return Recipe(("VOCtrainval*", "benchmark*"), (images, labels, more_labels), palette=voc_palette(256))


def _cityscapes() -> Recipe:
    info, label_zip = CATALOG["cityscapes"], f"gtFine_trainvaltest.zip {_CITYSCAPES}"
    images = Rule(
        f"leftImg8bit_trainvaltest.zip {_CITYSCAPES}",
        rf"leftImg8bit/{_CITYSCAPES_PATH}_leftImg8bit\.png",
        info.image,
    )
    ready = Rule(label_zip, rf"gtFine/{_CITYSCAPES_PATH}_gtFine_labelTrainIds\.png", info.label)
    labels = Rule(label_zip, rf"gtFine/{_CITYSCAPES_PATH}_gtFine_labelIds\.png", info.label, cityscapes_label)
    return Recipe(("leftImg8bit*", "gtFine*"), (images, ready, labels))


def _coco() -> Recipe:
    images = [
        Rule(f"{part}2017.zip {_COCO}", rf"{part}2017/(?P<id>\d+)\.jpg", f"{part}2017/{{id}}.jpg")
        for part in ("train", "val")
    ]
    labels = Rule(
        f"annotations_trainval2017.zip {_COCO}",
        r"instances_(train|val)2017\.json",
        CATALOG["coco"].label,
        coco_label,
        "pycocotools.mask",
        annotations=True,
    )
    return Recipe(("train2017*", "val2017*", "annotations*", "instances_*"), (*images, labels), whole=True)


def _ade20k() -> Recipe:
    info, found = CATALOG["ade20k"], r"(?P<part>training|validation)/(?P<id>ADE_(?:train|val)_\d{8})"
    images = Rule(_ADE20K, rf"images/{found}\.jpg", info.image)
    labels = Rule(_ADE20K, rf"annotations/{found}\.png", info.label, ade20k_label)
    return Recipe(("ADEChallengeData2016*",), (images, labels), whole=True, is_converted=ade20k_is_converted)


RECIPES = {"pascal": _pascal(), "cityscapes": _cityscapes(), "coco": _coco(), "ade20k": _ade20k()}
