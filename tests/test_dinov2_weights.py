"""DINOv2's weights from Meta and from timm, and UniMatch V2's checkpoints: what loads, and what each mistake says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model import (
    DINOV2_BACKBONES,
    build_model,
    check_pretrained,
    choose_network,
    find_state_dict,
    load_checkpoint_state,
    read_checkpoint,
)
from model.backbone import create_backbone
from model.backbone.dinov2 import DINOv2, SwiGLU
from scripts.convert_backbone import TIMM_MODELS, convert, dinov2_from_timm
from tests.helpers import (
    assert_loaded,
    assert_near,
    filled,
    filled_backbone,
    make_model,
    model_config,
    weights_error,
)
from tests.reference.weights import reference_state_v2

STATE_DICTS_V2 = json.loads((Path(__file__).parent / "reference" / "state_dicts_v2.json").read_text())


# ---- Meta's files


def dpt_config(backbone="dinov2_small", nclass=5, pretrained=True):
    return model_config(model="dpt", backbone=backbone, nclass=nclass, pretrained=pretrained)


def make_dpt(nclass=5, pretrained=False):
    return build_model(dpt_config(nclass=nclass, pretrained=pretrained))


def meta_s_file(size="small"):
    """In the form of Meta's official files."""
    prefix = "backbone."
    shapes = STATE_DICTS_V2[size]["state_dict"]
    return filled((name.removeprefix(prefix), shape) for name, shape in shapes if name.startswith(prefix))


def test_meta_s_file_loads_as_it_is(project):
    torch.save(meta_s_file(), project / "dinov2_small.pth")
    assert_loaded(make_dpt(pretrained=True).backbone, meta_s_file())


@pytest.mark.parametrize("name", DINOV2_BACKBONES)
def test_missing_dinov2_weights_say_meta_s_name(project, name):
    message = weights_error(check_pretrained, dpt_config(name))
    meta = f"dinov2_vit{name[len('dinov2_')]}14_pretrain.pth"
    assert f"{project / name}.pth: no such file; expected DINOv2's {meta}: see pretrained/README.md" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"register_tokens": (1, 4, 384)}, "weights of DINOv2 with register tokens;"),
        ({"pos_embed": None, "rope_embed.periods": (16,), "storage_tokens": (1, 4, 384)}, "weights of DINOv3, not"),
        (
            {"mask_token": None},
            "weights in timm's form: convert them with `python -m scripts.convert_backbone dino",
        ),
        ({"patch_embed.proj.weight": (384, 3, 16, 16)}, "weights of a vision transformer with patches of 16 x 16"),
        ({"pos_embed": (1, 257, 384)}, "wrong shape pos_embed (1, 257, 384) instead of (1, 1370, 384);"),
        ({"blocks.3.ls1.gamma": None}, "missing blocks.3.ls1.gamma;"),
        ({"head.weight": (5, 384)}, "unexpected head.weight;"),
    ],
)
def test_another_vision_transformer_is_refused_and_said_what_it_is(project, changes, message):
    state = meta_s_file()
    for name, shape in changes.items():
        state.pop(name, None)
        if shape:
            state[name] = torch.tensor(0.0).expand(shape)
    torch.save(state, project / "dinov2_small.pth")
    assert f"dinov2_small.pth: {message}" in weights_error(check_pretrained, dpt_config())


@pytest.mark.slow
def test_other_networks_in_place_of_dinov2_are_recognised(project):
    path = project / "dinov2_small.pth"
    for state, message in (
        (meta_s_file("base"), "weights of dinov2_base;"),
        (filled_backbone("resnet18"), "weights of resnet18;"),
        (filled(STATE_DICTS_V2["small"]["state_dict"]), "a checkpoint of a whole segmentation model;"),
        (
            {"embeddings.cls_token": torch.zeros(1, 1, 384)},
            "weights of a vision transformer under Hugging Face's",
        ),
        ({"downsample_layers.0.0.weight": torch.zeros(96, 3, 4, 4)}, "weights of a ConvNeXt, as DINOv3 has;"),
    ):
        torch.save(state, path)
        assert f"{path}: {message}" in weights_error(check_pretrained, dpt_config())


# ---- checkpoints of whole models


def release_checkpoint(prefix="module."):
    """As UniMatch V2's release saves it: the teacher's numbers are one above the student's."""
    student = {prefix + name: tensor for name, tensor in filled(STATE_DICTS_V2["small"]["state_dict"]).items()}
    teacher = {name: tensor + 1 for name, tensor in student.items()}
    numbers = {"epoch": 59, "previous_best": np.float64(88.5), "best_epoch_ema": np.int64(41)}
    return {"model": student, "model_ema": teacher, "optimizer": {}} | numbers


def assert_last_bias(model, expected):
    assert_loaded(model.head.scratch.output_conv, {"2.bias": torch.full((21,), expected)})


def test_of_a_checkpoint_with_a_teacher_either_network_can_be_taken_and_is_told():
    model, release = make_dpt(nclass=21), release_checkpoint()
    own = {"model": release["model"], "teacher": release["model_ema"]}
    student, teacher = (
        float(release[key]["module.head.scratch.output_conv.2.bias"][0]) for key in ("model", "model_ema")
    )
    assert teacher == student + 1
    for checkpoint, keywords, taken, value in (
        (release, {}, "student", student),
        (release, {"prefer": "student"}, "student", student),
        (release, {"prefer": "teacher"}, "teacher", teacher),
        (own, {}, "student", student),
        (own, {"prefer": "teacher"}, "teacher", teacher),
        ({"model": release["model"]}, {"prefer": "teacher"}, "student", student),
        ({"model_ema": release["model_ema"]}, {"prefer": "student"}, "teacher", teacher),
        (release["model"], {"prefer": "teacher"}, "student", student),
        ({"state_dict": own}, {"prefer": "teacher"}, "teacher", teacher),
    ):
        assert load_checkpoint_state(model, checkpoint, "best.pth", **keywords) == taken
        assert choose_network(checkpoint, **keywords) == taken
        assert_last_bias(model, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        (None, ""),
        ("model", "module."),
        ("model", "_orig_mod."),
        (None, "module._orig_mod."),
        ("state_dict", "model."),
        ("state_dict", "model._orig_mod."),
    ],
)
def test_what_wrappers_put_before_the_names_is_dropped(wrapper, prefix):
    model, state = make_dpt(nclass=21), release_checkpoint(prefix)["model"]
    load_checkpoint_state(model, {wrapper: state} if wrapper else state, "best.pth")
    assert_loaded(model, filled(STATE_DICTS_V2["small"]["state_dict"]))


def test_two_tensors_for_one_name_are_refused():
    state = make_model().state_dict()
    state["module.classifier.bias"] = state["classifier.bias"] + 1
    message = weights_error(load_checkpoint_state, make_model(), state, "best.pth")
    assert message == "best.pth: holds two tensors for classifier.bias, one of them as module.classifier.bias"


def test_a_release_s_checkpoint_is_read_from_a_file(tmp_path):
    torch.save(release_checkpoint(), tmp_path / "best.pth")
    state = find_state_dict(read_checkpoint(tmp_path / "best.pth"), "best.pth", prefer="teacher")
    assert list(state) == [name for name, _ in STATE_DICTS_V2["small"]["state_dict"]]


def test_a_checkpoint_of_another_model_says_what_differs():
    small = make_dpt()
    for checkpoint, message in (
        (make_model().state_dict(), "its backbone is resnet10, the config's is dinov2_small"),
        (filled(STATE_DICTS_V2["base"]["state_dict"]), "its backbone is dinov2_base, the config's is dinov2_small"),
        (release_checkpoint(), "its classifier has 21 classes, the config has 5"),
        (
            filled(STATE_DICTS_V2["small"]["state_dict"]) | {"backbone.register_tokens": torch.zeros(1, 4, 384)},
            "its backbone is DINOv2 with register tokens, the config's is dinov2_small",
        ),
    ):
        assert weights_error(load_checkpoint_state, small, checkpoint, "best.pth") == f"best.pth: {message}"
    message = weights_error(load_checkpoint_state, make_model(), release_checkpoint(), "best.pth")
    assert message == "best.pth: its backbone is dinov2_small, the config's is resnet10"


# ---- conversion from timm


def timm_dinov2(name, **kwargs):
    """timm's network with reference weights."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(TIMM_MODELS[name], pretrained=False, **kwargs)
    theirs.load_state_dict(reference_state_v2(theirs))
    return theirs.eval()


@pytest.mark.slow
@torch.no_grad()
def test_a_converted_dinov2_gives_the_features_of_timm_s():
    theirs = timm_dinov2("dinov2_small")
    state, left_out = convert("dinov2_small", theirs.state_dict(), "timm")
    assert not left_out
    backbone = create_backbone("dinov2_small")
    backbone.load_state_dict(state)
    # 518 x 518 pixels, where both take the positional embedding as it is.
    image = torch.randn(1, 3, 518, 518)
    expected = theirs.get_intermediate_layers(image, n=[2, 5, 8, 11], norm=True)
    for tokens, expected_tokens in zip(backbone(image), expected, strict=True):
        assert_near(tokens, expected_tokens)


@torch.no_grad()
def test_a_converted_giant_s_gated_mlp_gives_the_features_of_timm_s():
    theirs = timm_dinov2("dinov2_giant", depth=1)
    backbone = DINOv2(width=1536, depth=1, heads=24, taps=(0,), mlp=SwiGLU)
    backbone.load_state_dict(dinov2_from_timm(theirs.state_dict()))
    # On a smaller grid the two interpolate differently: timm's is given ours.
    theirs.set_input_size((28, 42))
    theirs.pos_embed.data = backbone.positions((2, 3))
    image = torch.randn(2, 3, 28, 42)
    (expected,) = theirs.get_intermediate_layers(image, n=[0], norm=True)
    assert_near(backbone(image)[0], expected)


def timm_state(model):
    """In the form of timm's files: names and shapes, without memory for the values."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        own = timm.create_model(model).state_dict()
    return filled((key, tensor.shape) for key, tensor in own.items())


@pytest.mark.parametrize("name", DINOV2_BACKBONES)
def test_every_weight_of_timm_s_dinov2_has_its_place_here(name):
    state, left_out = convert(name, timm_state(TIMM_MODELS[name]), "timm")
    assert state.keys() == filled_backbone(name).keys()
    assert not left_out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_base_patch14_dinov2", "weights of dinov2_base"),
        ("vit_small_patch14_reg4_dinov2", "weights of DINOv2 with register tokens"),
        ("vit_small_patch16_dinov3", "weights of DINOv3, not DINOv2"),
        ("vit_small_patch16_224", "weights of a vision transformer with patches of 16 x 16 pixels, not 14 x 14"),
    ],
)
def test_another_vision_transformer_of_timm_s_is_not_converted(model, message):
    line = weights_error(convert, "dinov2_small", timm_state(model), "model.pth")
    assert line == f"model.pth: {message}; expected weights such as timm's {TIMM_MODELS['dinov2_small']}"
