"""dataset/colors.py and the key `label_colors`: labels drawn in colours, wherever a label is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.cache import ImageCache
from dataset.files import read_indices, read_label
from dataset.lists import Sample, read_list
from dataset.source import DataSource
from model import build_model
from scripts import check_data, evaluate, make_splits
from tests.helpers import complaint, make_dataset
from util.config import differing_keys, load_config, parse_label_colors, to_dict
from util.errors import ConfigError

COLOURS = ((10, 20, 30), (200, 0, 0), (10, 20, 31))  # two of them nearly alike
IGNORED = (224, 224, 192)


def drawn(label: np.ndarray, colours=COLOURS) -> Image.Image:
    """A label of class indices and 255 in colours."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    table[255] = IGNORED
    return Image.fromarray(table[label])


@pytest.fixture
def coloured(tmp_path):
    """The tiny data with its labels drawn in the palette's colours, and the same data with indices."""
    data, plain = make_dataset(tmp_path / "coloured"), make_dataset(tmp_path / "plain")
    for path in (data.root / "labels").iterdir():
        drawn(np.asarray(Image.open(path))).save(path)
    data.configure(palette=[list(colour) for colour in COLOURS], label_colors="palette")
    return data, plain


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_each_colour_becomes_its_label_value_in_every_mode_of_a_file(tmp_path, mode):
    label = np.random.default_rng(0).choice(np.uint8([0, 1, 2, 255]), (9, 7))
    image = drawn(label)
    # A program chooses the entries of a palette as it likes: they are no class indices.
    (image.quantize(5, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)).save(tmp_path / "a.png")
    colors = {colour: value for value, colour in enumerate(COLOURS)} | {IGNORED: 255}
    assert np.array_equal(read_indices(tmp_path / "a.png", colors), label)
    assert np.array_equal(np.asarray(read_label(tmp_path / "a.png", colors)), label)


def test_another_colour_is_named_with_its_place(tmp_path):
    image = drawn(np.zeros((9, 7), np.uint8))
    image.putpixel((5, 2), (11, 20, 30))
    image.putpixel((6, 8), (255, 255, 255))
    image.save(tmp_path / "a.png")
    colors = {COLOURS[0]: 0, COLOURS[1]: 1}
    assert complaint(read_indices, tmp_path / "a.png", colors) == (
        f"{tmp_path / 'a.png'}: the label has the colour [11, 20, 30] at x = 5, y = 2, which is none of label_colors "
        "(in all 2 pixels of 2 such colours)"
    )
    image.save(tmp_path / "a.jpg")
    assert complaint(read_indices, tmp_path / "a.jpg", colors).endswith("JPEG changes colours, use PNG")
    Image.new("I;16", (3, 3)).save(tmp_path / "deep.png")
    assert "label_colors needs RGB with 8 bits" in complaint(read_indices, tmp_path / "deep.png", colors)
    assert "set label_colors if classes are drawn in colours" in complaint(read_indices, tmp_path / "a.png")


def test_training_reads_the_same_labels_as_of_indices_also_out_of_a_cache(coloured, tmp_path):
    data, plain = coloured
    cfg = load_config(data.config)
    cache = ImageCache(tmp_path / "cache", 10**8)
    own = DataSource(data.root, cfg.label_map, label_colors=cfg.color_values)
    cached = own._replace(cache=cache)
    for sample in read_list(data.labeled):
        expected = DataSource(plain.root).load(sample)[1]
        for source in (own, cached, cached):
            assert np.array_equal(source.load(sample)[1], expected)
    # Other colours are other labels: nothing of the cache is used.
    other = cached._replace(label_colors={colour: 0 for colour in cfg.color_values})
    assert not other.load(sample)[1].any()
    cache.close()


def test_no_row_is_left_out_where_black_is_no_colour(tmp_path):
    label = np.ones((1200, 600), np.uint8)
    drawn(label).save(tmp_path / "l.png")
    Image.new("RGB", (600, 1200)).save(tmp_path / "i.png")
    source = DataSource(tmp_path, label_colors={COLOURS[1]: 1})
    with source.open_image("i.png") as image, source.open_label("l.png") as opened:
        assert (source.decode_pair(Sample("i.png", "l.png"), image, opened, rows=10)[1] == 1).all()


def test_evaluation_and_the_check_give_what_they_give_for_indices(coloured, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(build_model(load_config(coloured[0].config)).state_dict(), tmp_path / "model.pth")
    printed = []
    for data in coloured:
        evaluate.main(["--config", str(data.config), "--checkpoint", str(tmp_path / "model.pth")])
        check_data.main(["--config", str(data.config), "--labeled-id-path", str(data.labeled)])
        printed.append(capsys.readouterr().out.replace(str(data.root), "ROOT"))
    assert printed[0] == printed[1] and "0 errors" in printed[0]


def test_make_splits_takes_colours_and_puts_them_into_the_config(coloured, tmp_path, capsys):
    data, _ = coloured
    arguments = ["--images", str(data.root / "images"), "--labels", str(data.root / "labels")]
    text = str([list(colour) for colour in (*COLOURS, IGNORED)])
    arguments += ["--output", str(tmp_path / "lists"), "--val", "1", "--label-colors", text, "--label-map", "{3: 255}"]
    make_splits.main(arguments)
    printed = capsys.readouterr().out
    assert "label_colors:\n- [10, 20, 30]\n- [200, 0, 0]\n- [10, 20, 31]\n- [224, 224, 192]\n" in printed
    assert "classes: [class 0, class 1, class 2]" in printed


def test_the_key_is_a_list_or_the_palette_and_a_run_does_not_resume_with_another(data):
    plain = load_config(data.config)
    listed = load_config(
        data.config, ["label_colors=[[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]", "label_map={3: 255}"]
    )
    assert plain.color_values is None and listed.color_values[3, 3, 3] == 3
    palette = load_config(data.config, ["label_colors=palette"])
    assert palette.color_values == {IGNORED: 255} | {colour: i for i, colour in enumerate(palette.palette)}
    assert load_config(data.config, to_dict(palette)) == palette
    assert differing_keys(to_dict(palette), plain) == ["label_colors: palette -> None"]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("pallette", "'pallette' is none of palette"),
        ("[[0, 0, 0], [0, 0, 0]]", "the colour [0, 0, 0] is listed twice"),
        ("[[0, 0, 0], [0, 0, 256]]", "values from 0 to 255"),
        ("[[0, 0], [0, 0, 2]]", "expected 3 values"),
        ("[[0, 0, 0], [0, 0, 1], [0, 0, 2], [9, 9, 9]]", "colour 3, [9, 9, 9], is of no class: classes are 0..2"),
    ],
)
def test_wrong_colours_are_one_line(data, text, fragment):
    with pytest.raises(ConfigError) as caught:
        load_config(data.config, [f"label_colors={text}"])
    assert str(caught.value).startswith(f"--set label_colors={text}: label_colors: ") and fragment in str(caught.value)


def test_colours_on_a_command_line_have_the_same_rules():
    assert parse_label_colors("[[0, 0, 0], [1, 2, 3]]", "--label-colors") == {(0, 0, 0): 0, (1, 2, 3): 1}
    for text in ("5", "[[0, 0, 300]]", "[[0, 0, 0], [0, 0, 0]]", "[[0"):
        with pytest.raises(ConfigError, match=r"^--label-colors: "):
            parse_label_colors(text, "--label-colors")
