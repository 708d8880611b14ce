"""Conversion of ImageNet weights, against timm's and torchvision's own networks with random weights."""

from __future__ import annotations

import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from dataset.transform import IMAGENET_MEAN, IMAGENET_STD
from model.backbone import create_backbone
from model.weights import load_pretrained
from scripts import convert_backbone
from tests.helpers import assert_near
from tests.reference.weights import reference_state
from util.cli import run_main

OS16 = (False, False, True)


def convert(*arguments):
    convert_backbone.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        run_main(lambda: convert(*arguments))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def converted(name, path, output):
    """The backbone with the weights that come out of `path`, as training loads them; float64, for evaluation."""
    convert(name, "--from", path, "--output", output)
    backbone = create_backbone(name)
    load_pretrained(backbone, name, output)
    return backbone.double().eval()


@pytest.fixture
def resnet50_file(tmp_path):
    """Weights in the form of torchvision's file: with a classifier, without counters."""
    state = reference_state(torchvision.models.resnet50(weights=None))
    path = tmp_path / "resnet50-0676ba61.pth"
    torch.save({key: tensor for key, tensor in state.items() if "num_batches" not in key}, path)
    return path


# ---- features are those of the weights' own network


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet50_tv", "resnet101_tv"])
@torch.no_grad()
def test_a_converted_resnet_gives_the_features_of_timm_s(name, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(convert_backbone.TIMM_MODELS[name], output_stride=16)
    theirs.load_state_dict(reference_state(theirs))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    backbone = converted(name, tmp_path / "timm.pth", tmp_path / "out.pth")
    image = torch.randn(1, 3, 65, 81).double()
    _, (expected_c1, expected_c4) = theirs.double().eval().forward_intermediates(image, indices=[1, 4])
    c1, c4 = backbone(image)
    assert_near(c1, expected_c1)
    assert_near(c4, expected_c4)


@torch.no_grad()
def test_torchvision_s_file_gives_the_features_of_torchvision_s_network(resnet50_file, tmp_path):
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=OS16)
    theirs.load_state_dict(torch.load(resnet50_file, weights_only=True), strict=False)
    layers = torchvision.models._utils.IntermediateLayerGetter(theirs, {"layer1": "c1", "layer4": "c4"})
    image = torch.randn(1, 3, 65, 81).double()
    expected = layers.double().eval()(image)
    c1, c4 = converted("resnet50_tv", resnet50_file, tmp_path / "out.pth")(image)
    assert_near(c1, expected["c1"])
    assert_near(c4, expected["c4"])


@pytest.fixture(scope="module")
def xception(tmp_path_factory):
    """An image's pixels, the file of timm's Xception at random weights, and the backbone that it is converted into.

    The variances are as small as timm's eps, and the statistics those of the image, so that features stay in scale.
    """
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("xception65").double().train()
    pixels = torch.rand(2, 3, 97, 113).double()
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(std=0.05 / module.weight[0].numel() ** 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        theirs((pixels - 0.5) / 0.5)
    folder = tmp_path_factory.mktemp("xception")
    torch.save(theirs.float().state_dict(), folder / "timm.pth")
    return pixels, folder / "timm.pth", converted("xception", folder / "timm.pth", folder / "xception.pth")


def ours_normalized(pixels):
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def timm_xception(path, **kwargs):
    import timm

    theirs = timm.create_model("xception65", **kwargs)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    return theirs.double().eval()


@pytest.mark.slow
@torch.no_grad()
def test_a_converted_xception_gives_timm_s_c1_but_near_the_border(xception):
    pixels, path, backbone = xception
    theirs, seen = timm_xception(path), {}
    # A clone, as the next layer works in place.
    theirs.blocks[1].stack.conv2.register_forward_hook(lambda _m, _in, out: seen.update(c1=out.clone()))
    theirs((pixels - 0.5) / 0.5)
    c1, _ = backbone(ours_normalized(pixels))
    inside = slice(5, -5)
    assert_near(c1[..., inside, inside], seen["c1"][..., inside, inside])


@pytest.mark.slow
@pytest.mark.parametrize("unchanged", [None, "shortcut", "stride", "dilation", "border"])
@torch.no_grad()
def test_an_xception_s_c4_differs_from_timm_s_by_exactly_what_is_documented(xception, unchanged):
    pixels, path, backbone = xception
    theirs = timm_xception(path, output_stride=32 if unchanged == "stride" else 16)
    if unchanged != "shortcut":
        for block in theirs.blocks[3:19]:
            assert block.shortcut is None
            block.stack.act1.inplace = True  # before the shortcut reads the same tensor
    if unchanged != "dilation":
        for module in theirs.blocks[20].modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (1, 1)
    image = (pixels - 0.5) / 0.5
    if unchanged != "border":
        theirs.stem[0].conv.padding = (0, 0)
        mean = torch.tensor(IMAGENET_MEAN).double().view(3, 1, 1)
        image = (F.pad(pixels - mean, (1, 1, 1, 1)) + mean - 0.5) / 0.5
    expected, (_, c4) = theirs.forward_features(image), backbone(ours_normalized(pixels))
    if unchanged is None:
        assert_near(c4, expected)
    else:
        assert c4.shape != expected.shape or (c4 - expected).abs().max() > 1e-3 * expected.abs().max()


def test_every_weight_of_timm_s_xception_has_a_name_of_its_own_here(xception):
    _, path, backbone = xception
    names = [convert_backbone.xception_name(name) for name in torch.load(path, weights_only=True)]
    assert sorted(names) == sorted([*backbone.state_dict(), "fc.weight", "fc.bias"])


def test_what_differs_for_xception_is_printed(xception, tmp_path, capsys):
    convert("xception", "--from", xception[1], "--output", tmp_path / "out.pth")
    printed = capsys.readouterr().out
    assert all(f"- {difference}\n" in printed for difference in convert_backbone.XCEPTION_DIFFERENCES)
    assert "left out: head.fc.weight, head.fc.bias, 132 x num_batches_tracked\n" in printed


# ---- the file


def test_the_file_s_sha256_and_what_was_left_out_are_printed(resnet50_file, tmp_path, capsys):
    output = tmp_path / "new" / "out.pth"
    convert("resnet50_tv", "--from", resnet50_file, "--output", output)
    printed = capsys.readouterr().out
    assert f"SHA-256: {hashlib.sha256(output.read_bytes()).hexdigest()}\n" in printed
    assert "left out: fc.weight, fc.bias\n" in printed
    expected = torch.load(resnet50_file, weights_only=True)
    written = torch.load(output, weights_only=True)
    assert written.keys() == expected.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    assert [path.name for path in output.parent.iterdir()] == ["out.pth"]


def test_the_output_is_named_after_the_backbone_in_the_project(resnet50_file, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_backbone, "PROJECT_ROOT", tmp_path)
    convert("resnet50_tv", "--from", resnet50_file)
    assert (tmp_path / "pretrained" / "resnet50_tv.pth").is_file()


def test_an_existing_file_is_kept_unless_forced(resnet50_file, tmp_path, capsys):
    output = tmp_path / "out.pth"
    output.write_bytes(b"mine")
    line = error_of(capsys, "resnet50_tv", "--from", resnet50_file, "--output", output)
    assert f"{output}: exists already; --force overwrites it" in line
    assert output.read_bytes() == b"mine"
    convert("resnet50_tv", "--from", resnet50_file, "--output", output, "--force")
    assert len(torch.load(output, weights_only=True)) == 265


def test_no_input_is_overwritten_and_the_outputs_suffix_is_checked_first(resnet50_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert_backbone, "convert", None)  # nothing is converted
    link = tmp_path / "link.pth"
    link.symlink_to(resnet50_file)
    before = resnet50_file.read_bytes()
    for output in (resnet50_file, link):
        line = error_of(capsys, "resnet50_tv", "--from", resnet50_file, "--output", output, "--force")
        assert f"{output}: is the file {resnet50_file} that is converted" in line
    assert resnet50_file.read_bytes() == before
    line = error_of(capsys, "resnet50_tv", "--from", resnet50_file, "--output", tmp_path / "out.safetensors")
    assert "out.safetensors: the suffix must be one of .pth, .pt" in line
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nobody-of-this-name").write_text("a file, no folder")
    line = error_of(capsys, "resnet50_tv", "--from", resnet50_file, "--output", "~nobody-of-this-name/out.pth")
    assert "~nobody-of-this-name/out.pth: " in line


def test_safetensors_files_are_read(resnet50_file, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file(torch.load(resnet50_file, weights_only=True), path)
    convert("resnet50_tv", "--from", path, "--output", tmp_path / "a.pth")
    convert("resnet50_tv", "--from", resnet50_file, "--output", tmp_path / "b.pth")
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pth", "b.pth"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- timm's download, by a stand-in


@pytest.fixture
def stand_in(monkeypatch):
    """A module in timm's place; its `create_model` is to be set."""
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_timm_is_asked_for_the_pretrained_model(stand_in, tmp_path):
    def create_model(name, pretrained):
        assert (name, pretrained) == ("resnet50.tv_in1k", True)
        return torchvision.models.resnet50(weights=None)

    stand_in.create_model = create_model
    convert("resnet50_tv", "--from", "timm", "--output", tmp_path / "out.pth")
    assert (tmp_path / "out.pth").is_file()


def test_a_failed_download_is_one_line(stand_in, tmp_path, capsys):
    def create_model(name, pretrained):
        raise OSError("no route to host\nmore")

    stand_in.create_model = create_model
    line = error_of(capsys, "xception", "--from", "timm", "--output", tmp_path / "out.pth")
    assert "xception65.tf_in1k cannot be downloaded (OSError: no route to host); get its file elsewhere" in line
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(("module", "source"), [("timm", "timm"), ("safetensors.torch", "model.safetensors")])
def test_a_missing_optional_package_is_one_line(module, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    line = error_of(capsys, "resnet50", "--from", source, "--output", tmp_path / "out.pth")
    assert f"{module.split('.')[0]} cannot be imported" in line
    assert "pip install -r requirements-convert.txt" in line


# ---- sources that do not fit


def test_weights_of_another_backbone_are_named_and_nothing_is_written(resnet50_file, tmp_path, capsys):
    output = tmp_path / "out.pth"
    line = error_of(capsys, "resnet50", "--from", resnet50_file, "--output", output)
    assert f"{resnet50_file}: weights of resnet50_tv" in line
    assert "; expected weights such as timm's resnet50s.gluon_in1k" in line
    line = error_of(capsys, "resnet101_tv", "--from", resnet50_file, "--output", output)
    assert f"{resnet50_file}: weights of resnet50_tv; expected" in line
    assert not output.exists()


def test_another_xception_is_refused(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    path = tmp_path / "xception41.pth"
    with torch.device("meta"):
        state = timm.create_model("xception41").state_dict()
    torch.save({key: torch.tensor(0.0).expand(tensor.shape) for key, tensor in state.items()}, path)
    line = error_of(capsys, "xception", "--from", path, "--output", tmp_path / "out.pth")
    assert f"{path}: missing " in line and "expected weights such as timm's xception65.tf_in1k" in line


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_missing_or_damaged_source_is_one_line(suffix, tmp_path, capsys):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"model{suffix}"
    assert f"{path}: no such file" in error_of(capsys, "resnet50", "--from", path, "--output", tmp_path / "out.pth")
    path.write_bytes(b"<!DOCTYPE html>")
    assert f"{path}: not a " in error_of(capsys, "resnet50", "--from", path, "--output", tmp_path / "out.pth")
