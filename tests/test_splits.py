"""The published lists in splits/, the table that describes them and the recipes that use them."""

import hashlib
import itertools
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from dataset.catalog import CATALOG
from dataset.lists import find_unlabeled, read_list

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ROOT / "splits"
FOLDERS = {"coco": ("train2017", 118_287), "ade20k": ("images/training", 20_210)}  # instead of a training list
ID_PATTERNS = {
    "pascal": re.compile(r"\d{4}_\d{6}"),
    "cityscapes": re.compile(r"[a-z]+_\d{6}_\d{6}"),
    "coco": re.compile(r"\d{12}"),
    "ade20k": re.compile(r"ADE_(train|val)_\d{8}"),
}

# Lines, and the start of the SHA-256 of the file: results are only comparable on exactly these images.
PUBLISHED_LISTS = {
    "pascal/train.txt": (10582, "f04ab664c71f"),
    "pascal/val.txt": (1449, "df002e3a730c"),
    "pascal/92/labeled.txt": (92, "e0d19f8e2a46"),
    "pascal/183/labeled.txt": (183, "d3e2f9ce89a9"),
    "pascal/366/labeled.txt": (366, "40f1fa743759"),
    "pascal/732/labeled.txt": (732, "672855c6690b"),
    "pascal/1464/labeled.txt": (1464, "937b907edb52"),
    "pascal/1_16/labeled.txt": (662, "0f5e114e6504"),
    "pascal/1_8/labeled.txt": (1323, "c5ea9bb09515"),
    "pascal/1_4/labeled.txt": (2646, "a4573ca0fa8f"),
    "pascal/u2pl_1_16/labeled.txt": (662, "3c93c1f13a6b"),
    "pascal/u2pl_1_8/labeled.txt": (1323, "a7da2e3445ac"),
    "pascal/u2pl_1_4/labeled.txt": (2646, "f93c716c55aa"),
    "cityscapes/train.txt": (2975, "5895ae021e33"),
    "cityscapes/val.txt": (500, "4af9750fe888"),
    "cityscapes/1_16/labeled.txt": (186, "ccaab2cb4980"),
    "cityscapes/1_8/labeled.txt": (372, "e00532b476de"),
    "cityscapes/1_4/labeled.txt": (744, "0d430cc9874c"),
    "cityscapes/1_2/labeled.txt": (1488, "c5895e2880cc"),
    "cityscapes/1_30/labeled.txt": (100, "bdecaffa83d5"),
    "coco/val.txt": (5000, "0a7dd08b7818"),
    "coco/1_512/labeled.txt": (232, "db3aad92bde3"),
    "coco/1_256/labeled.txt": (463, "2fb38dc2b3fb"),
    "coco/1_128/labeled.txt": (925, "1f7b23ead5f9"),
    "coco/1_64/labeled.txt": (1849, "17751cbebd3a"),
    "coco/1_32/labeled.txt": (3697, "c80eccf6d591"),
    "ade20k/val.txt": (2000, "8a733f0c20d8"),
    "ade20k/1_64/labeled.txt": (316, "f2d1d4a4bd29"),
    "ade20k/1_32/labeled.txt": (631, "8d9c607ac60a"),
    "ade20k/1_16/labeled.txt": (1263, "201de6ae533e"),
    "ade20k/1_8/labeled.txt": (2526, "a9b3c8120f81"),
    "ade20k/1_4/labeled.txt": (5052, "10d6de6ba48e"),
    "ade20k/1_2/labeled.txt": (10105, "32b0667515d6"),
}
LABELED_LISTS = [name for name in PUBLISHED_LISTS if name.endswith("labeled.txt")]

PUBLISHED_ITERATIONS = {  # an epoch's, at 4 processes x 2 images
    "pascal": {"92": 1311, "183": 1300, "366": 1277, "732": 1231, "1464": 1140},
    "cityscapes": {"1_16": 349, "1_8": 325, "1_4": 279, "1_2": 186},
    "coco": {"1_512": 14757, "1_256": 14728, "1_128": 14670, "1_64": 14555, "1_32": 14324},
    "ade20k": {"1_64": 2487, "1_32": 2447, "1_16": 2368, "1_8": 2210, "1_4": 1895},
}


@cache
def lines(name: str) -> list[str]:
    return (SPLITS / name).read_text(encoding="utf-8").splitlines()


def images(name: str) -> set[str]:
    return {line.split()[0] for line in lines(name)}


def labels(name: str) -> set[str]:
    return {line.split()[1] for line in lines(name)}


def dataset_of(name: str) -> str:
    return name.split("/")[0]


@cache
def unlabeled_images(name: str) -> int:
    """How many images the labelled list `name` leaves unlabelled."""
    if dataset_of(name) in FOLDERS:
        return FOLDERS[dataset_of(name)][1] - len(lines(name))
    train = SPLITS / dataset_of(name) / "train.txt"
    return len(find_unlabeled(train, "no data is needed", read_list(SPLITS / name)))


def iterations_per_epoch(unlabeled: int, processes: int = 4, batch_size: int = 2) -> int:
    return -(-unlabeled // processes) // batch_size


def test_the_folder_holds_the_published_lists_and_no_other_list_of_these_datasets():
    found = {path.relative_to(SPLITS).as_posix() for name in CATALOG for path in (SPLITS / name).rglob("*.txt")}
    assert found == set(PUBLISHED_LISTS)


@pytest.mark.parametrize("name", PUBLISHED_LISTS)
def test_a_list_has_the_published_length_and_content(name):
    text = (SPLITS / name).read_text(encoding="utf-8")
    assert (len(text.splitlines()), hashlib.sha256(text.encode()).hexdigest()[:12]) == PUBLISHED_LISTS[name]


@pytest.mark.parametrize("name", PUBLISHED_LISTS)
def test_every_line_is_an_image_and_its_label_by_the_datasets_layout(name):
    dataset = dataset_of(name)
    part = CATALOG[dataset].parts[name.endswith("val.txt")]
    layout = f"{CATALOG[dataset].image} {CATALOG[dataset].label}"
    for line in lines(name):
        image_id = ID_PATTERNS[dataset].search(line).group()
        assert line == layout.format(id=image_id, part=part, city=image_id.split("_")[0])


@pytest.mark.parametrize("name", PUBLISHED_LISTS)
def test_the_projects_reader_takes_every_line_as_it_is(name):
    assert [f"{sample.image} {sample.label}" for sample in read_list(SPLITS / name)] == lines(name)


@pytest.mark.parametrize("name", PUBLISHED_LISTS)
def test_no_image_and_no_label_is_listed_twice(name):
    assert len(images(name)) == len(labels(name)) == len(lines(name))


@pytest.mark.parametrize("name", [name for name in LABELED_LISTS if dataset_of(name) not in FOLDERS])
def test_labelled_lines_are_lines_of_the_training_list(name):
    assert set(lines(name)) < set(lines(f"{dataset_of(name)}/train.txt"))


@pytest.mark.parametrize("name", [name for name in PUBLISHED_LISTS if not name.endswith("val.txt")])
def test_training_images_and_labels_are_disjoint_from_the_validation_ones(name):
    val = f"{dataset_of(name)}/val.txt"
    assert images(name).isdisjoint(images(val))
    assert labels(name).isdisjoint(labels(val))  # COCO's images differ by folder already, its masks by id alone


def test_default_pascal_splits_have_high_quality_labels_only_and_the_others_as_documented():
    high_quality = images("pascal/1464/labeled.txt")

    def share(split: str) -> int:
        return len(images(f"pascal/{split}/labeled.txt") & high_quality)

    assert {n: share(n) for n in ("92", "183", "366", "732")} == {"92": 92, "183": 183, "366": 366, "732": 732}
    assert {n: share(n) for n in ("1_16", "1_8", "1_4")} == {"1_16": 93, "1_8": 193, "1_4": 388}
    assert share("u2pl_1_16") == 662 and share("u2pl_1_8") == 1323 and share("u2pl_1_4") == 1464


def test_ade20k_splits_contain_each_other_as_documented():
    chain = [images(f"ade20k/{split}/labeled.txt") for split in ("1_64", "1_32", "1_16", "1_8", "1_4", "1_2")]
    assert all(small < large for small, large in itertools.pairwise(chain))


def test_cityscapes_splits_contain_each_other_as_documented():
    chain = [images(f"cityscapes/{split}/labeled.txt") for split in ("1_16", "1_8", "1_4", "1_2")]
    assert chain[0] < chain[1] < chain[2] < chain[3]
    assert not images("cityscapes/1_30/labeled.txt") <= chain[3]


@pytest.mark.parametrize(("dataset", "split"), [(d, s) for d, splits in PUBLISHED_ITERATIONS.items() for s in splits])
def test_the_unlabelled_count_gives_the_published_iterations_per_epoch(dataset, split):
    unlabeled = unlabeled_images(f"{dataset}/{split}/labeled.txt")
    assert iterations_per_epoch(unlabeled) == PUBLISHED_ITERATIONS[dataset][split]


def test_the_readme_states_the_counts_and_iterations_of_every_split():
    stated, dataset = {}, None
    sections = {"## Pascal VOC 2012": "pascal", "## Cityscapes": "cityscapes", "## COCO": "coco", "## ADE20K": "ade20k"}
    for line in (SPLITS / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            dataset = sections.get(line)
        row = re.match(r"\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", line)
        if dataset and row:
            split, *numbers = row.groups()
            stated[f"{dataset}/{split}/labeled.txt"] = [int(number.replace(",", "")) for number in numbers]
    unlabeled = {name: unlabeled_images(name) for name in LABELED_LISTS}
    assert stated == {name: [len(lines(name)), n, iterations_per_epoch(n)] for name, n in unlabeled.items()}


@pytest.mark.parametrize("name", PUBLISHED_LISTS)
def test_a_list_is_smaller_than_one_mebibyte(name):
    assert (SPLITS / name).stat().st_size < 2**20


@pytest.mark.parametrize("dataset", [name for name in CATALOG if (ROOT / "configs" / f"{name}.yaml").is_file()])
def test_a_published_recipe_names_its_lists_and_evaluates_as_the_catalog_says(dataset):
    recipe = yaml.safe_load((ROOT / "configs" / f"{dataset}.yaml").read_text(encoding="utf-8"))
    assert recipe["dataset"] == dataset
    assert recipe["val_id_path"] == f"splits/{dataset}/val.txt"
    assert recipe["unlabeled_id_path"] == FOLDERS.get(dataset, [f"splits/{dataset}/train.txt"])[0]
    assert recipe["eval_mode"] == CATALOG[dataset].eval_mode
