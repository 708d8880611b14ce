"""util/config.py: every rule, and every message one line that names file or override, key and value."""

import dataclasses
import json
import re

import pytest
import yaml

from dataset.catalog import CATALOG, voc_palette
from tests import helpers
from util.config import (
    NOT_SHAPING,
    PROJECT_ROOT,
    Config,
    Criterion,
    check_batch,
    differing_keys,
    for_method,
    has_teacher,
    load_config,
    resolve_path,
    to_dict,
)
from util.errors import ConfigError

FIELDS = [field.name for field in dataclasses.fields(Config)]
BASE = {
    "dataset": "leaves",
    "data_root": "data/leaves",
    "val_id_path": "val.txt",
    "classes": ["background", "leaf", "stem"],
    "crop_size": 64,
    "epochs": 3,
    "batch_size": 2,
    "lr": 0.01,
    "backbone": "resnet18",
}


@pytest.fixture
def write(tmp_path):
    """A function that writes BASE with some changes (None leaves a key out) and returns the file's path."""

    def write(text=None, **changes):
        values = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values) if text is None else text, encoding="utf-8")
        return path

    return write


def complaint(path, overrides=()):
    """The message with which a config is refused: always one line."""
    return helpers.complaint(load_config, path, overrides, error=ConfigError)


def assert_refused(write, key, value, *fragments):
    """`value` is refused in the file, as an override and as text after --set, each time naming place, key and value."""
    text = f"{key}={json.dumps(value)}"
    path = write(**{key: value})
    messages = {f"{path}": complaint(path)} if value is not None else {}
    path = write()
    messages |= {f"--set {key}={value}": complaint(path, {key: value}), f"--set {text}": complaint(path, [text])}
    for place, message in messages.items():
        assert message.startswith(f"{place}: {key}: ")
        assert all(fragment in message for fragment in fragments)


# --- values -----------------------------------------------------------------------------------------------------------

WRONG_TYPES = {
    "dataset": 5,
    "data_root": ["data"],
    "val_id_path": True,
    "crop_size": "large",
    "classes": "leaf",
    "nclass": 3.5,
    "palette": "#ff0000",
    "label_map": [0, 255],
    "label_colors": 5,
    "channels": "five",
    "rgb_channels": [0, 1],
    "value_range": 10000,
    "mean": 0.5,
    "std": "wide",
    "unlabeled_id_path": 7,
    "eval_mode": "whole",
    "cutmix_partner": ["same_image"],
    "epochs": "many",
    "batch_size": 2.5,
    "lr": "fast",
    "lr_multi": [1],
    "accumulate": "some",
    "reference_batch": {},
    "scale_lr": 1,
    "optimizer": "adam",
    "weight_decay": "little",
    "betas": 0.9,
    "criterion": 5,
    "conf_thresh": "high",
    "seed": "random",
    "teacher": True,
    "teacher_decay": "slow",
    "evaluate": ["teacher"],
    "supervised_epoch": "long",
    "model": "unet",
    "backbone": 50,
    "lock_backbone": "perhaps",
    "pretrained": 1,
    "init_from": 5,
    "replace_stride_with_dilation": [0, 0, 1],
    "dilations": 6,
    "device": "gpu",
    "workers": "some",
    "prefetch": 1.5,
    "persistent_workers": 1,
    "pin_memory": "maybe",
    "photometry": "gpu",
    "cache": "all",
    "cache_gb": "much",
    "cache_dir": 5,
    "channels_last": "maybe",
    "amp": "bf32",
    "compile": 1,
    "cuda_graphs": 1,
    "deterministic": 1,
    "tf32": "perhaps",
    "checkpoint_activations": "some",
    "check_data": "never",
    "max_image_pixels": "large",
    "allow_outside_root": "never",
    "on_bad_image": "ignore",
    "bad_image_limit": "few",
    "on_nonfinite": True,
    "nonfinite_limit": 1.5,
    "log_interval": None,
    "logger": 3,
    "eval_interval": "never",
    "checkpoint_minutes": "often",
    "keep_last": "all",
    "dist_timeout": [600],
}


def test_the_table_of_wrong_types_has_every_key():
    assert list(WRONG_TYPES) == FIELDS


def test_unknown_loggers_and_the_same_one_twice_are_refused(write):
    assert_refused(write, "logger", ["tensorbord"], "did you mean 'tensorboard'?")
    assert_refused(write, "logger", ["csv", "csv"], "csv is listed twice")


@pytest.mark.parametrize("key", FIELDS)
def test_a_value_of_the_wrong_type_is_refused_with_the_value(write, key):
    value = WRONG_TYPES[key]
    assert_refused(write, key, value, repr(value[0] if key == "replace_stride_with_dilation" else value))


NUMBERS = [
    # key, accepted, refused
    ("crop_size", [16, 8192], [15, 0, -32, 8193]),
    ("epochs", [1], [0, -1]),
    ("batch_size", [1], [0, -2]),
    ("lr", [1e-9, 1], [0, -0.1]),
    ("lr_multi", [0.1], [0, -1]),
    ("accumulate", [1, 64], [0]),
    ("reference_batch", [1], [0]),
    ("conf_thresh", [0, 1], [-0.01, 1.01]),
    ("seed", [0, 2**32 - 1], [-1, 2**32]),
    ("workers", [0, 256], [-1, 257]),
    ("prefetch", [1, 64], [0, 65]),
    ("cache_gb", [0.1], [0, -1]),
    ("max_image_pixels", [1, 10**12], [0]),
    ("bad_image_limit", [1], [0]),
    ("nonfinite_limit", [1], [0]),
    ("log_interval", [1], [0]),
    ("eval_interval", [1], [0]),
    ("checkpoint_minutes", [0, 0.5], [-1]),
    ("keep_last", [0, 3], [-1]),
    ("dist_timeout", [1, 86_400], [0.5, 86_401]),
]


@pytest.mark.parametrize(("key", "accepted", "refused"), NUMBERS, ids=[row[0] for row in NUMBERS])
def test_numbers_are_accepted_up_to_their_limits_and_refused_beyond(write, key, accepted, refused):
    for value in accepted:
        assert getattr(load_config(write(**{key: value})), key) == value
    for value in refused:
        assert_refused(write, key, value, str(value), "must be")


@pytest.mark.parametrize("key", [row[0] for row in NUMBERS])
@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), 10**400, "", [1]], ids=str)
def test_no_number_is_a_bool_or_without_end(write, key, value):
    assert_refused(write, key, value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "1e-3", 0.001),
        ("lr", "1E-3", 0.001),
        ("lr", "'0.5'", 0.5),
        ("lr", "1", 1.0),
        ("conf_thresh", "5e-1", 0.5),
        ("epochs", "1e1", 10),
        ("epochs", "20.0", 20),
        ("seed", "1e6", 1_000_000),
    ],
)
def test_numbers_that_yaml_reads_as_text_are_numbers(write, key, text, value):
    in_file = write(yaml.safe_dump({k: v for k, v in BASE.items() if k != key}) + f"{key}: {text}\n")
    for cfg in (load_config(in_file), load_config(write(), [f"{key}={text}"])):
        assert getattr(cfg, key) == value
        assert type(getattr(cfg, key)) is type(value)


@pytest.mark.parametrize("text", ["010", "0777", "-08", "0x10", "0o17", "0b11", "1:30", "1:30:00", "2020-01-01"])
@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("epochs", "%s"),
        ("epochs", "'%s'"),
        ("lr", "%s"),
        ("seed", "%s"),
        ("dilations", "[%s, 12, 18]"),
        ("palette", "[[%s, 0, 0], [1, 1, 1], [2, 2, 2]]"),
        ("label_map", "{%s: 1}"),
        ("label_map", "{0: %s}"),
        ("criterion.min_kept", "%s"),
    ],
)
def test_a_number_is_what_was_written_or_refused(write, key, form, text):
    """YAML 1.1 reads 010 as 8, 1:30 as 90 and 0x10 as 16."""
    message = complaint(write(criterion="OHEM"), [f"{key}={form % text}"])
    assert message.startswith(f"--set {key}=") and f"'{text}'" in message
    assert "number, found" in message or "begins with 0, which YAML reads in base 8" in message


@pytest.mark.parametrize("text", ["yes", "No", "on", "OFF", "TRUE", "False"])
@pytest.mark.parametrize("key", ["scale_lr", "pin_memory", "pretrained", "replace_stride_with_dilation"])
def test_switches_have_the_words_of_yaml_1_1(write, key, text):
    expected = text.lower() in ("yes", "on", "true")
    if key == "replace_stride_with_dilation":
        text, expected = f"[off, no, {text}]", (False, False, expected)
    assert getattr(load_config(write(), [f"{key}={text}"]), key) == expected


@pytest.mark.parametrize("text", ["no", "010", "1:30", "2020-01-01", "1e-3", "1_000", "0x10"])
@pytest.mark.parametrize("key", ["data_root", "val_id_path", "unlabeled_id_path", "cache_dir"])
def test_a_text_is_what_was_written(write, key, text):
    assert getattr(load_config(write(), [f"{key}={text}"]), key) == text
    in_file = write(yaml.safe_dump({k: v for k, v in BASE.items() if k != key}) + f"{key}: {text}\n")
    assert getattr(load_config(in_file), key) == text


def test_a_whole_number_may_not_have_a_fraction(write):
    assert_refused(write, "epochs", "15e-1", "expected a whole number, found 1.5")


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("dilations", [6, 12], "expected 3 values"),
        ("dilations", [0, 12, 18], "0 must be at least 1"),
        ("dilations", [6, 12, 18.5], "expected a whole number"),
        ("replace_stride_with_dilation", [False, True], "expected 3 values"),
        ("replace_stride_with_dilation", [True, True, True], "first must be false"),
        ("data_root", "", "expected text, found ''"),
        ("pretrained", "", "expected"),
        ("dataset", "a/b", "it names a folder"),
        ("dataset", "", "expected text"),
    ],
)
def test_lists_and_texts_have_their_rules(write, key, value, fragment):
    assert_refused(write, key, value, fragment)


def test_a_graph_is_of_one_batch(write):
    text = "cuda_graphs: a graph is of one batch, and accumulate is 2: set one of them only"
    assert text in complaint(write(cuda_graphs=True, accumulate=2))


def test_xception_has_one_output_stride(write):
    path = write(backbone="xception", replace_stride_with_dilation=[False, True, True])
    assert "xception has output stride 16 only" in complaint(path)


@pytest.mark.parametrize(
    ("key", "value", "suggestion"),
    [
        ("eval_mode", "sliding-window", "sliding_window"),
        ("cutmix_partner", "other", "other_image"),
        ("device", "cuda:0", "cuda"),
        ("backbone", "ResNet-50", "resnet50"),
        ("backbone", "xceptoin", "xception"),
        ("criterion", "ohem", "OHEM"),
        ("criterion", {"name": "CEloss"}, "CELoss"),
        ("criterion", {"name": "OHEM", "tresh": 0.5}, "thresh"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest_one(write, key, value, suggestion):
    assert_refused(write, key, value, f"did you mean '{suggestion}'?")


def test_an_unknown_name_is_answered_with_all_of_them(write):
    assert_refused(write, "backbone", "vit", "unknown backbone 'vit'", "resnet18, resnet50, resnet101, xception")
    assert_refused(write, "criterion", "dice", "unknown criterion 'dice'", "CELoss, OHEM")
    assert_refused(write, "eval_mode", "tiles", "'tiles' is none of original, sliding_window, center_crop")


# --- keys -------------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_a_suggestion(write):
    path = write(conf_tresh=0.9)
    assert complaint(path) == f"{path}: unknown key 'conf_tresh' (did you mean 'conf_thresh'?)"
    assert complaint(write(), ["epoch=3"]) == "--set epoch=3: unknown key 'epoch' (did you mean 'epochs'?)"
    assert complaint(write(text="1: 2")).endswith("unknown key '1'")
    assert complaint(write(text='"a\\nb": 2')).endswith(r"unknown key 'a\nb'")


@pytest.mark.parametrize("key", [key for key in BASE if key != "classes"])
def test_a_missing_key_is_named_and_explained(write, key):
    path = write(**{key: None})
    assert complaint(path).startswith(f"{path}: key '{key}' is missing (")


def test_the_number_of_required_keys_is_small():
    required = [field.name for field in dataclasses.fields(Config) if field.default is dataclasses.MISSING]
    assert sorted(required) == sorted(set(BASE) - {"classes", "val_id_path"})


# --- classes ----------------------------------------------------------------------------------------------------------


def test_a_published_dataset_brings_classes_palette_and_way_of_evaluation(write):
    for name, info in CATALOG.items():
        cfg = load_config(write(dataset=name, classes=None))
        assert (cfg.classes, cfg.palette, cfg.nclass) == (info.classes, info.palette, len(info.classes))
        assert cfg.eval_mode == info.eval_mode
    assert load_config(write(dataset="cityscapes", classes=None, eval_mode="original")).eval_mode == "original"


def test_a_published_dataset_brings_its_lists(write):
    for name, info in CATALOG.items():
        cfg = load_config(write(dataset=name, classes=None, val_id_path=None))
        assert (cfg.val_id_path, cfg.unlabeled_id_path) == (f"splits/{name}/val.txt", info.unlabeled)
        assert (PROJECT_ROOT / cfg.val_id_path).is_file()
        folder = info.image.format(part=info.parts[0], city="*", id="*").rsplit("/", 1)[0]
        assert cfg.unlabeled_id_path == folder or (PROJECT_ROOT / cfg.unlabeled_id_path).is_file()
    own = load_config(write(dataset="pascal", classes=None, unlabeled_id_path="mine.txt"))
    assert (own.val_id_path, own.unlabeled_id_path) == (BASE["val_id_path"], "mine.txt")
    assert load_config(write()).unlabeled_id_path is None


def test_any_other_dataset_lists_its_classes(write):
    cfg = load_config(write())
    assert cfg.classes == ("background", "leaf", "stem")
    assert (cfg.nclass, cfg.palette, cfg.eval_mode) == (3, voc_palette(3), "original")


def test_an_unknown_dataset_without_classes_is_refused_with_a_suggestion(write):
    path = write(dataset="pascl", classes=None)
    message = complaint(path)
    assert message.startswith(f"{path}: dataset 'pascl' is none of pascal, cityscapes, coco, ade20k")
    assert "did you mean 'pascal'?" in message and "list its `classes`" in message


def test_nclass_alone_gives_numbered_classes(write):
    cfg = load_config(write(classes=None, nclass=4))
    assert (cfg.nclass, len(set(cfg.classes)), len(cfg.palette)) == (4, 4, 4)


def test_class_names_that_yaml_reads_as_something_else_stay_names(write):
    others = {key: value for key, value in BASE.items() if key != "classes"}
    names = ["no", "yes", "on", "off", "y", "true", "null", "~", "0", "007", "010", "1.50", "+1", "1e-3", "1_000"]
    names += ["0x1F", "0o17", "1:30", "2020-01-01", ".inf", "=", "<<", "a: b", "NaN"]
    written = ", ".join(f"'{name}'" if ":" in name and " " in name else name for name in names)
    cfg = load_config(write(text=yaml.safe_dump(others) + f"classes: [{written}]\n"))
    assert cfg.classes == tuple(names)
    assert load_config(write(), [f"classes=[{written}]"]).classes == tuple(names)
    assert load_config(write(text=yaml.safe_dump(to_dict(cfg)))).classes == tuple(names)


@pytest.mark.parametrize(
    ("changes", "key", "fragment"),
    [
        ({"classes": ["a", "b", "a"]}, "classes", "'a' is listed twice"),
        ({"classes": ["a"]}, "classes", "1 classes; 2 to 255"),
        ({"classes": []}, "classes", "0 classes; 2 to 255"),
        ({"classes": [str(i) for i in range(256)]}, "classes", "256 classes; 2 to 255"),
        ({"classes": [str(i) for i in range(300)]}, "classes", "300 classes; 2 to 255"),
        ({"classes": [{"a": 0}, {"b": 1}]}, "classes", "expected text, found {'a': 0}"),
        ({"classes": ["a", ""]}, "classes", "expected text"),
        ({"nclass": 4}, "nclass", "4, but `classes` lists 3 classes"),
        ({"dataset": "pascal", "classes": None, "nclass": 20}, "nclass", "20, but the data set pascal has 21"),
        ({"classes": None, "nclass": 1}, "nclass", "1 must be at least 2"),
        ({"classes": None, "nclass": 256}, "nclass", "256 must be at most 255"),
        ({"palette": [[0, 0, 0]]}, "palette", "1 colours for 3 classes"),
        ({"palette": [[0, 0, 0], [1, 1, 1], [0, 0, 256]]}, "palette", "values from 0 to 255"),
        ({"palette": [[0, 0, 0], [1, 1, 1], [0, -1, 0]]}, "palette", "values from 0 to 255"),
        ({"palette": [[0, 0, 0], [1, 1, 1], [0, 0]]}, "palette", "expected 3 values"),
    ],
)
def test_classes_and_palette_have_their_rules(write, changes, key, fragment):
    path = write(**changes)
    message = complaint(path)
    assert message.startswith(f"{path}: {key}: ")
    assert fragment in message


def test_two_and_255_classes_are_accepted(write):
    for count in (2, 255):
        assert load_config(write(classes=[f"c{i}" for i in range(count)])).nclass == count


def test_a_palette_of_ones_own_is_kept(write):
    colours = [[0, 0, 0], [255, 0, 0], [0, 255, 0]]
    assert load_config(write(palette=colours)).palette == tuple(map(tuple, colours))


# --- criterion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("CELoss", Criterion("CELoss")),
        ("OHEM", Criterion("OHEM", 0.7, 200_000)),
        ({"name": "OHEM", "thresh": 0.5, "min_kept": 100}, Criterion("OHEM", 0.5, 100)),
        ({"name": "OHEM", "thresh": "5e-1", "min_kept": "2e5"}, Criterion("OHEM", 0.5, 200_000)),
        ({"name": "CELoss", "kwargs": {"ignore_index": 255}}, Criterion("CELoss")),
        (
            {"name": "OHEM", "kwargs": {"ignore_index": 255, "thresh": 0.6, "min_kept": 50}},
            Criterion("OHEM", 0.6, 50),
        ),
        ({"name": "OHEM", "kwargs": None}, Criterion("OHEM")),
    ],
)
def test_the_criterion_is_a_name_or_a_mapping_flat_or_nested_as_published(write, given, expected):
    assert load_config(write(criterion=given)).criterion == expected
    assert load_config(write(), {"criterion": given}).criterion == expected


@pytest.mark.parametrize(
    ("base", "overrides", "expected"),
    [
        ("CELoss", ["criterion.name=OHEM"], Criterion("OHEM")),
        ("CELoss", ["criterion.thresh=0.5", "criterion.name=OHEM"], Criterion("OHEM", 0.5)),
        ("OHEM", ["criterion.min_kept=1e3"], Criterion("OHEM", 0.7, 1000)),
        ({"name": "OHEM", "thresh": 0.6}, ["criterion.name=CELoss"], Criterion("CELoss")),
        ({"name": "OHEM", "thresh": 0.6}, ["criterion.min_kept=9"], Criterion("OHEM", 0.6, 9)),
        ({"name": "OHEM", "kwargs": {"thresh": 0.6}}, ["criterion.thresh=0.4"], Criterion("OHEM", 0.4)),
        ({"name": "OHEM", "thresh": 0.6}, ["criterion.kwargs.thresh=0.4"], Criterion("OHEM", 0.4)),
        (None, ["criterion.name=OHEM"], Criterion("OHEM")),
    ],
)
def test_parts_of_the_criterion_can_be_set_alone(write, base, overrides, expected):
    assert load_config(write(criterion=base), overrides).criterion == expected


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        ({"name": "OHEM", "thresh": 0}, "thresh: 0.0 must be greater than 0"),
        ({"name": "OHEM", "thresh": 1.5}, "thresh: 1.5 must be at most 1"),
        ({"name": "OHEM", "thresh": "low"}, "thresh: expected a number, found 'low'"),
        ({"name": "OHEM", "min_kept": -1}, "min_kept: -1 must be at least 0"),
        ({"name": "OHEM", "min_kept": 0.5}, "min_kept: expected a whole number"),
        ({"name": "OHEM", "kwargs": {"thresh": 2}}, "thresh: 2.0 must be at most 1"),
        ({"name": "OHEM", "kwargs": 5}, "OHEM has no 'kwargs'"),
        ({"name": "OHEM", "thresh": 0.7, "kwargs": {"thresh": 0.6}}, "'thresh' is given twice, in kwargs and beside"),
        ({"name": "CELoss", "thresh": 0.5}, "CELoss has no 'thresh'"),
        ({"name": "CELoss", "kwargs": {"ignore_index": 0}}, "ignore_index is 255 throughout"),
        ({"thresh": 0.5}, "expected CELoss or {name: OHEM"),
        (["OHEM"], "expected CELoss or {name: OHEM"),
    ],
)
def test_a_wrong_criterion_is_refused(write, given, fragment):
    assert_refused(write, "criterion", given, fragment)


@pytest.mark.parametrize(
    ("base", "override", "fragment"),
    [
        ("CELoss", "criterion.thresh=0.5", "criterion: CELoss has no 'thresh'"),
        ("OHEM", "criterion.tresh=0.5", "criterion: OHEM has no 'tresh' (did you mean 'thresh'?)"),
        ("OHEM", "criterion.thresh=2", "criterion: thresh: 2.0 must be at most 1"),
        (5, "criterion.thresh=0.5", "'criterion' is 5 in the config file"),
        ({"thresh": 1, "kwargs": {"thresh": 1}}, "criterion.min_kept=5", "in the config file, criterion: 'thresh' is"),
        ("OHEM", "lr.thresh=0.5", "'lr' has no inner keys"),
    ],
)
def test_a_wrong_part_of_the_criterion_is_refused(write, base, override, fragment):
    assert complaint(write(criterion=base), [override]).startswith(f"--set {override}: {fragment}")


# --- overrides and files ----------------------------------------------------------------------------------------------


def test_overrides_are_text_or_a_mapping_and_the_last_one_counts(write):
    path = write()
    as_text = load_config(path, ["epochs=7", "lr = 1e-4", "pretrained=false", "epochs=9", "classes=[a, b]"])
    as_mapping = load_config(path, {"epochs": 9, "lr": 1e-4, "pretrained": False, "classes": ["a", "b"]})
    assert as_text == as_mapping
    assert (as_text.epochs, as_text.lr, as_text.pretrained, as_text.nclass) == (9, 1e-4, False, 2)
    assert load_config(path, ["unlabeled_id_path=a=b.txt"]).unlabeled_id_path == "a=b.txt"
    assert load_config(write(workers=3), ["workers="]).workers is None


@pytest.mark.parametrize("text", ["epochs", "epochs:3", "=3", " =3", ""])
def test_an_override_without_key_or_equals_sign_is_refused(write, text):
    assert complaint(write(), [text]) == f"--set {text}: expected key=value, such as --set epochs=20"


def test_an_override_that_is_not_yaml_is_refused(write):
    assert complaint(write(), ["classes=[a, b"]).startswith("--set classes=[a, b: not valid YAML: ")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("dataset: pascal\nclasses: [a, b\n", "line 3, column 1"),
        ("dataset: pascal\nlr: 0.1: 2\n", "line 2, column 8"),
        ("dataset: pascal\n\tlr: 0.1\n", "line 2, column 1"),
        ("dataset: !!python/object:os.system {}\n", "line 1, column 10"),
        ("dataset: *nowhere\n", "line 1, column 10"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1"),
        ("dataset: !!timestamp 2020-13-45\n", ""),
        ("dataset: \0\n", ""),
        ("dataset: " + "[" * 3000, ""),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_with_the_place(write, text, place):
    path = write(text=text)
    assert complaint(path).startswith(f"{path}: not valid YAML: {place}")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- dataset\n- lr\n", "pascal", "3"])
def test_a_file_without_keys_is_refused(write, text):
    path = write(text=text)
    assert complaint(path).startswith(f"{path}: expected lines of `key: value`, found ")


def test_a_missing_or_unreadable_file_is_refused_by_name(tmp_path):
    assert complaint("no/such.yaml").startswith("no/such.yaml: no such config file")
    assert complaint("~nobody-of-this-name/a.yaml").startswith("~nobody-of-this-name/a.yaml: no such config file")
    assert complaint(tmp_path).startswith(f"{tmp_path}: cannot be read: ")
    long = "x" * 500
    assert complaint(long).startswith(f"{long}: cannot be read: ")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("dataset: blätter".encode("latin-1"))
    assert complaint(latin) == f"{latin}: cannot be read: no UTF-8 text; save it as UTF-8"
    for encoding in ("utf-16", "utf-16-le"):  # as Windows programs save it
        latin.write_bytes("dataset: pascal\n".encode(encoding))
        assert complaint(latin).endswith("; save it as UTF-8")


def test_a_byte_order_mark_is_no_part_of_the_first_key(write):
    assert load_config(write(text="\ufeff" + yaml.safe_dump(BASE))) == load_config(write())


def test_relative_paths_are_taken_from_the_current_folder_else_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("configs/pascal.yaml") == PROJECT_ROOT / "configs/pascal.yaml"
    assert load_config("configs/pascal.yaml").dataset == "pascal"
    assert resolve_path("nowhere/a.txt") == resolve_path(resolve_path("nowhere/a.txt"))
    assert not resolve_path("nowhere/a.txt").is_absolute()
    own = tmp_path / "configs"
    own.mkdir()
    (own / "pascal.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
    assert resolve_path("configs/pascal.yaml").resolve() == (own / "pascal.yaml").resolve()
    assert load_config("configs/pascal.yaml").dataset == "leaves"
    assert resolve_path(own) == own
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/configs/pascal.yaml") == own / "pascal.yaml"


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"criterion": {"name": "OHEM", "thresh": 0.6, "min_kept": 10}, "workers": 0, "pretrained": "some/weights.pth"},
        {"dataset": "cityscapes", "classes": None, "lr": "1e-5", "unlabeled_id_path": "more"},
        {"classes": None, "nclass": 5, "pretrained": False},
        {"label_map": {255: 1, 0: 0, 7: 255}},
        {"classes": ["1", "yes", "null", "a: b", "#c"], "dataset": "1e5"},
    ],
)
def test_a_config_written_out_and_read_again_is_the_same(write, changes):
    cfg = load_config(write(**changes))
    assert load_config(write(text=yaml.safe_dump(to_dict(cfg)))) == cfg
    assert load_config(write(text=json.dumps(to_dict(cfg)))) == cfg


def test_a_config_cannot_be_changed(write):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(write()).lr = 1.0


def test_only_keys_that_shape_training_make_configs_differ(write):
    cfg = load_config(write())
    saved = json.loads(json.dumps(to_dict(cfg)))
    assert differing_keys(saved, cfg) == []
    other = {
        "data_root": "elsewhere",
        "val_id_path": "v.txt",
        "unlabeled_id_path": "u.txt",
        "classes": ["x", "y", "z"],
        "palette": [[1, 1, 1], [2, 2, 2], [3, 3, 3]],
        "init_from": "other.pth",
        "device": "cpu",
        "workers": 5,
        "prefetch": 4,
        "persistent_workers": False,
        "pin_memory": False,
        "cache": "disk",
        "cache_gb": 3,
        "cache_dir": "there",
        "check_data": False,
        "max_image_pixels": 2**20,
        "allow_outside_root": True,
        "on_bad_image": "skip",
        "bad_image_limit": 3,
        "on_nonfinite": "skip",
        "nonfinite_limit": 4,
        "log_interval": 7,
        "logger": ["csv"],
        "eval_interval": 2,
        "channels_last": True,
        "amp": "bf16",
        "compile": True,
        "cuda_graphs": False,
        "deterministic": True,
        "tf32": False,
        "checkpoint_activations": "none",
        "checkpoint_minutes": 1,
        "keep_last": 3,
        "dist_timeout": 60,
    }
    assert sorted(other) == sorted(NOT_SHAPING)
    assert differing_keys(saved, load_config(write(), other)) == []
    changed = load_config(write(), {**other, "lr": 0.5, "criterion": "OHEM"})
    assert differing_keys(saved, changed) == [
        "criterion: CELoss -> {'name': 'OHEM', 'thresh': 0.7, 'min_kept': 200000}",
        "lr: 0.01 -> 0.5",
    ]


def test_a_checkpoint_older_than_a_key_was_trained_with_its_default(write):
    saved = to_dict(load_config(write()))
    del saved["photometry"]
    assert differing_keys(saved, load_config(write())) == []
    other = load_config(write(), {"photometry": "device"})
    assert differing_keys(saved, other) == ["photometry: worker -> device"]


@pytest.mark.parametrize(
    ("batch_size", "processes", "labeled", "unlabeled", "fragment"),
    [
        (2, 1, 1, 8, "1 labelled image cannot fill one batch of 2 (batch_size 2 x 1 process"),
        (2, 4, 7, 80, "7 labelled images cannot fill one batch of 8 (batch_size 2 x 4 processes)"),
        (2, 4, 80, 7, "7 unlabelled images cannot fill one batch of 8"),
        (2, 4, 7, None, "7 labelled images cannot fill one batch of 8"),
    ],
)
def test_fewer_images_than_one_batch_over_all_processes_are_refused(
    write, batch_size, processes, labeled, unlabeled, fragment
):
    cfg = load_config(write(batch_size=batch_size))
    with pytest.raises(ConfigError) as caught:
        check_batch(cfg, "unimatch", processes, labeled, unlabeled)
    assert fragment in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_as_many_images_as_one_batch_suffice(write):
    cfg = load_config(write(batch_size=2))
    check_batch(cfg, "unimatch", 4, 8, 8)
    check_batch(cfg, "supervised", 4, 8, None)


@pytest.mark.parametrize(
    ("method", "batch_size", "processes", "fits"),
    [
        ("unimatch", 1, 1, True),  # [x; w] and [s1; s2] are two images each
        ("fixmatch", 1, 1, False),  # [s] is one
        ("fixmatch with a teacher", 1, 1, True),  # [x; s]
        ("unimatch_v2", 1, 1, False),  # [x]
        ("supervised", 1, 1, False),
        ("fixmatch", 1, 2, True),  # BatchNorm is synchronised
        ("supervised", 1, 2, True),
        ("fixmatch", 2, 1, True),
        ("supervised", 2, 1, True),
    ],
)
def test_a_batchnorm_group_of_one_image_is_refused_with_the_reason(write, method, batch_size, processes, fits):
    method, _, teacher = method.partition(" with a ")
    cfg = load_config(write(batch_size=batch_size, **{teacher: "ema"} if teacher else {}))
    unlabeled = None if method == "supervised" else 8
    if fits:
        check_batch(cfg, method, processes, 8, unlabeled)
        return
    with pytest.raises(ConfigError) as caught:
        check_batch(cfg, method, processes, 8, unlabeled)
    message = str(caught.value)
    assert "BatchNorm group of 1 image" in message and "variance needs 2" in message and method in message
    assert len(message.splitlines()) == 1


# --- models and methods ----------------------------------------------------------------------------------------------


def test_a_backbone_of_the_other_model_is_named_with_its_model(write):
    message = complaint(write(backbone="dinov2_small"))
    assert "backbone: dinov2_small is for model: dpt; model: deeplabv3plus has resnet18" in message
    assert "resnet18 is for model: deeplabv3plus" in complaint(write(model="dpt"))


@pytest.mark.parametrize(
    ("size", "near"), [(520, "are 518 and 532"), (20, "is 28"), (321, "are 308 and 322"), (8191, "is 8190")]
)
def test_a_crop_that_dinov2_cannot_take_is_refused_with_the_nearest_sizes(write, size, near):
    message = complaint(write(model="dpt", backbone="dinov2_small", crop_size=size))
    assert f"crop_size: {size} is no multiple of 14" in message and message.endswith(f"near {near}")


@pytest.mark.parametrize(
    ("method", "changes", "fragment"),
    [
        ("unimatch", {"teacher": "ema"}, "teacher: unimatch has none"),
        ("supervised", {"teacher": "ema"}, "teacher: supervised has none"),
        ("unimatch_v2", {"teacher": "none"}, "teacher: unimatch_v2 learns from one"),
        ("unimatch_v2", {"cuda_graphs": True}, "cuda_graphs: unimatch_v2 draws its complementary dropout on the CPU"),
        ("unimatch", {"evaluate": "teacher"}, "evaluate: teacher: this run has no teacher"),
        ("fixmatch", {"evaluate": "both"}, "evaluate: both: this run has no teacher"),
        ("unimatch_v2", {"cutmix_partner": "same_image"}, "cutmix_partner: same_image: with a teacher"),
        (
            "fixmatch",
            {"teacher": "ema", "cutmix_partner": "other_image"},
            "cutmix_partner: other_image: with a teacher",
        ),
        (
            "unimatch",
            {"cutmix_partner": "reversed_batch"},
            "cutmix_partner: reversed_batch: it goes with a teacher only",
        ),
    ],
)
def test_what_does_not_go_with_a_method_is_refused(write, method, changes, fragment):
    with pytest.raises(ConfigError) as caught:
        for_method(load_config(write(**changes)), method)
    assert fragment in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_the_method_decides_what_cutmix_pastes_and_how_long_a_supervised_epoch_is(write):
    v1 = load_config(write())
    v2 = load_config(write(model="dpt", backbone="dinov2_small", crop_size=70, dataset="ade20k", classes=None))
    assert for_method(v1, "fixmatch").cutmix_partner == for_method(v2, "unimatch").cutmix_partner == "same_image"
    assert for_method(v1, "unimatch_v2").cutmix_partner == for_method(v2, "fixmatch").cutmix_partner == "reversed_batch"
    assert for_method(v2, "supervised").supervised_epoch == 6000
    assert for_method(v2, "fixmatch").supervised_epoch is for_method(v1, "supervised").supervised_epoch is None
    check_batch(for_method(v2, "supervised"), "supervised", 1, 2, None)


# --- the recipes of this project --------------------------------------------------------------------------------------

CONFIGS = PROJECT_ROOT / "configs"
RECIPES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_project_loads(name):
    cfg = load_config(f"configs/{name}")
    assert len(cfg.classes) == len(cfg.palette) == cfg.nclass


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pascal", (21, 321, 80, 0.001, 10, Criterion("CELoss"), 0.95, "resnet101", "original")),
        ("cityscapes", (19, 801, 240, 0.005, 1, Criterion("OHEM", 0.7, 200_000), 0, "resnet101", "sliding_window")),
        ("coco", (81, 513, 30, 0.004, 10, Criterion("CELoss"), 0.95, "xception", "original")),
    ],
)
def test_the_published_recipes_are_those_of_the_paper(name, expected):
    cfg = load_config(f"configs/{name}.yaml")
    keys = ["nclass", "crop_size", "epochs", "lr", "lr_multi", "criterion", "conf_thresh", "backbone", "eval_mode"]
    assert tuple(getattr(cfg, key) for key in keys) == expected
    assert (cfg.batch_size, cfg.reference_batch, cfg.scale_lr, cfg.pretrained) == (2, 8, False, True)
    assert (cfg.dilations, cfg.replace_stride_with_dilation) == ((6, 12, 18), (False, False, True))
    assert for_method(cfg, "unimatch").cutmix_partner == "same_image"
    assert not any(has_teacher(cfg, method) for method in ("unimatch", "fixmatch", "supervised"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pascal", (21, 518, 60, 4, Criterion("CELoss"), "original", 3000)),
        ("cityscapes", (19, 798, 180, 2, Criterion("OHEM", 0.7, 200_000), "sliding_window", 3000)),
        ("ade20k", (150, 518, 60, 2, Criterion("CELoss"), "original", 6000)),
        ("coco", (81, 518, 20, 4, Criterion("CELoss"), "original", 30_000)),
    ],
)
def test_the_published_recipes_of_unimatch_v2_are_those_of_the_paper(name, expected):
    cfg = for_method(load_config(f"configs/v2/{name}.yaml"), "supervised")
    keys = ["nclass", "crop_size", "epochs", "batch_size", "criterion", "eval_mode", "supervised_epoch"]
    assert tuple(getattr(cfg, key) for key in keys) == expected
    assert (cfg.lr, cfg.lr_multi, cfg.conf_thresh, cfg.reference_batch) == (5e-6, 40, 0.95, 4 * cfg.batch_size)
    assert (cfg.model, cfg.backbone, cfg.optimizer, cfg.lock_backbone) == ("dpt", "dinov2_small", "adamw", False)
    assert [has_teacher(cfg, method) for method in ("unimatch_v2", "fixmatch", "unimatch", "supervised")] == [
        *(True, True),
        *(False, False),
    ]


@pytest.mark.parametrize("name", ["pascal", "cityscapes", "coco"])
def test_the_releases_own_files_are_the_same_recipes(name):
    """As they stand, but for data_root; they have the keys model, nclass and criterion.kwargs.ignore_index."""
    release = load_config(f"tests/reference/release_configs/{name}.yaml", [f"data_root=data/{name}"])
    ours = load_config(f"configs/{name}.yaml", [f"data_root=data/{name}"])
    assert differing_keys(to_dict(release), ours) == []


def test_the_file_of_unimatch_v2_s_release_is_the_same_recipe():
    release = load_config("tests/reference/release_configs/v2_pascal.yaml", ["data_root=data/pascal"])
    ours = load_config("configs/v2/pascal.yaml", ["data_root=data/pascal"])
    assert differing_keys(to_dict(release), ours) == ["optimizer: None -> adamw"]
    assert release.optimizer_kind == "adamw"


@pytest.mark.parametrize(
    ("model", "dataset", "batch"),
    [("dpt", "pascal", 16), ("dpt", "coco", 16), ("dpt", "cityscapes", 8), ("dpt", "ade20k", 8), ("dpt", "mine", 8)]
    + [("deeplabv3plus", "pascal", 8)],
)
def test_the_reference_batch_is_the_published_one_unless_it_is_given(write, model, dataset, batch):
    keys = {"model": "dpt", "backbone": "dinov2_small", "crop_size": 70} if model == "dpt" else {}
    keys |= {"dataset": dataset} | ({} if dataset == "mine" else {"classes": None})
    assert load_config(write(**keys)).reference_batch == batch
    assert load_config(write(**keys, reference_batch=5)).reference_batch == 5


@pytest.mark.parametrize("key", [key for key in FIELDS if key != "nclass"])
def test_the_recipe_for_own_data_mentions_every_key(key):
    text = (PROJECT_ROOT / "configs/custom.yaml").read_text(encoding="utf-8")
    assert re.search(rf"^(# )?{key}:", text, flags=re.MULTILINE)


def test_commented_keys_of_the_recipe_for_own_data_are_valid_too(write):
    text = (PROJECT_ROOT / "configs/custom.yaml").read_text(encoding="utf-8")
    keys = "|".join(FIELDS)
    assert load_config(write(text=re.sub(rf"^# ({keys}):", r"\1:", text, flags=re.MULTILINE))).workers is not None
