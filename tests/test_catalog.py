"""dataset/catalog.py against what torchvision, written by others, says of the same data sets."""

import dataclasses

import pytest
from torchvision.datasets import Cityscapes
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

from dataset.catalog import CATALOG, voc_palette


def test_the_catalog_holds_the_published_datasets_under_their_names():
    assert list(CATALOG) == ["pascal", "cityscapes", "coco", "ade20k"]
    assert all(info.name == name for name, info in CATALOG.items())


@pytest.mark.parametrize(("name", "nclass"), [("pascal", 21), ("cityscapes", 19), ("coco", 81), ("ade20k", 150)])
def test_every_class_has_a_name_and_a_colour_of_its_own(name, nclass):
    info = CATALOG[name]
    assert len(info.classes) == len(set(info.classes)) == nclass
    assert len(info.palette) == len(set(info.palette)) == nclass
    assert all(len(colour) == 3 and all(0 <= value <= 255 for value in colour) for colour in info.palette)


def test_pascal_classes_are_in_the_order_of_voc():
    reference = DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert CATALOG["pascal"].classes == ("background", *reference[1:])


def test_coco_classes_are_background_and_the_things_by_ascending_category_id():
    by_category_id = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert by_category_id[1] == "person" and by_category_id[90] == "toothbrush"
    things = [name for name in by_category_id[1:] if name != "N/A"]
    assert CATALOG["coco"].classes == ("background", *things)


def test_cityscapes_classes_and_colours_are_those_of_the_train_ids():
    trained = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 255), key=lambda c: c.train_id)
    assert CATALOG["cityscapes"].classes == tuple(c.name for c in trained)
    assert CATALOG["cityscapes"].palette == tuple(c.color for c in trained)


@pytest.mark.parametrize(
    ("name", "label", "class_name", "colour"),
    [
        ("pascal", 0, "background", (0, 0, 0)),
        ("pascal", 1, "aeroplane", (128, 0, 0)),
        ("pascal", 8, "cat", (64, 0, 0)),
        ("pascal", 15, "person", (192, 128, 128)),
        ("pascal", 20, "tvmonitor", (0, 64, 128)),
        ("cityscapes", 0, "road", (128, 64, 128)),
        ("cityscapes", 13, "car", (0, 0, 142)),
        ("cityscapes", 18, "bicycle", (119, 11, 32)),
        ("ade20k", 0, "wall", (0, 0, 0)),
        ("ade20k", 12, "person", (64, 0, 128)),
        ("ade20k", 20, "car", (0, 64, 128)),
        ("ade20k", 149, "flag", (128, 96, 128)),  # 149 = 0b010_010_101: red and blue 128 from bits 0 and 2
        ("coco", 0, "background", (0, 0, 0)),
        ("coco", 1, "person", (128, 0, 0)),
        ("coco", 12, "stop sign", (64, 0, 128)),  # category id 13: the first one after a gap
        ("coco", 80, "toothbrush", (32, 64, 0)),  # category id 90; 80 = 0b001_010_000, so blue 0, green 64, red 32
    ],
)
def test_well_known_labels_have_their_name_and_colour(name, label, class_name, colour):
    assert CATALOG[name].classes[label] == class_name
    assert CATALOG[name].palette[label] == colour


def test_the_voc_palette_is_the_bit_interleaving_spelled_out():
    for index, colour in enumerate(voc_palette(256)):
        bits = f"{index:09b}"[::-1]  # lowest bit first; channel c gets bits c, c + 3, c + 6 as its highest three
        assert colour == tuple(int(bits[c::3].ljust(8, "0"), 2) for c in range(3))


def test_the_voc_palette_has_256_different_colours_and_ends_in_the_one_of_ignored_pixels():
    palette = voc_palette(256)
    assert len(set(palette)) == 256
    assert palette[255] == (224, 224, 192)  # the cream-white border of VOC's label files
    assert voc_palette(21) == palette[:21]
    assert voc_palette(0) == ()


@pytest.mark.parametrize("n", [-1, 257])
def test_a_palette_that_no_8_bit_label_could_use_is_refused(n):
    with pytest.raises(ValueError, match=f"{n} colours.*8-bit"):
        voc_palette(n)


def test_only_cityscapes_is_evaluated_with_a_sliding_window():
    assert {name: info.eval_mode for name, info in CATALOG.items()} == {
        "pascal": "original",
        "cityscapes": "sliding_window",
        "coco": "original",
        "ade20k": "original",
    }


def test_an_entry_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CATALOG["pascal"].name = "other"
