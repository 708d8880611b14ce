"""The network with DeepLabV3+'s head against the reference figures, and what the figures cannot show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models._utils import IntermediateLayerGetter

from model import BACKBONES
from model.backbone import create_backbone
from model.backbone.xception import Block
from tests.helpers import make_model
from tests.reference.weights import check_summary, reference_image, reference_state, with_reference_weights

REFERENCE = Path(__file__).parent / "reference"
FIGURES = json.loads((REFERENCE / "figures.json").read_text())
STATE_DICTS = json.loads((REFERENCE / "state_dicts.json").read_text())
SEED = FIGURES["seed"]
OS8, OS16, OS32 = (False, True, True), (False, False, True), (False, False, False)


def make(backbone="resnet18", nclass=5, dilations=(6, 12, 18), strides=OS16):
    return make_model(backbone=backbone, nclass=nclass, dilations=dilations, replace_stride_with_dilation=strides)


def make_meta(*args, **kwargs):
    """Shapes only."""
    with torch.device("meta"):
        return make(*args, **kwargs)


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return make()


# ---- against the release


@pytest.mark.parametrize("backbone", STATE_DICTS)
def test_state_dict_has_the_published_names_order_and_shapes(backbone):
    model = make_meta(backbone, FIGURES["forward"][backbone]["nclass"])
    assert [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()] == STATE_DICTS[backbone]
    assert sum(p.numel() for p in model.parameters()) == FIGURES["forward"][backbone]["n_params"]


@pytest.mark.slow
@pytest.mark.usefixtures("draws_of_the_cpu")
@pytest.mark.parametrize("backbone", FIGURES["forward"])
@torch.no_grad()
def test_forward_gives_the_figures_of_the_release(backbone, device):
    figures = FIGURES["forward"][backbone]
    model = with_reference_weights(make(backbone, figures["nclass"])).to(device)
    image = reference_image(SEED, 2, 65, 81).to(device)
    features = {}
    handle = model.backbone.register_forward_hook(lambda _m, _in, out: features.update(c1=out[0], c4=out[1]))
    check_summary(model(image), figures["eval_logits"])
    handle.remove()
    check_summary(features["c1"], figures["c1"])
    check_summary(features["c4"], figures["c4"])

    model.train()
    torch.manual_seed(SEED)
    logits, logits_fp = model(image, need_fp=True)
    check_summary(logits, figures["train_logits"])
    check_summary(logits_fp, figures["train_logits_fp"])
    check_summary(model.backbone.bn1.running_mean, figures["running_mean_after_train"])
    check_summary(model.backbone.bn1.running_var, figures["running_var_after_train"])

    check_summary(model.eval()(reference_image(SEED + 1, 1, 50, 71).to(device)), figures["eval_logits_odd"])


@torch.no_grad()
def test_forward_at_output_stride_8_gives_the_figures_of_the_release(device):
    model = with_reference_weights(make("resnet50", 19, (12, 24, 36), OS8)).to(device)
    check_summary(model(reference_image(SEED, 1, 65, 65).to(device)), FIGURES["forward_os8_resnet50"])


# ---- architecture


@pytest.mark.parametrize("backbone", BACKBONES)
def test_children_are_the_five_parts_of_deeplabv3plus(backbone):
    children = [name for name, _ in make_meta(backbone).named_children()]
    assert children == ["backbone", "head", "reduce", "fuse", "classifier"]


@pytest.mark.parametrize(
    ("backbone", "c1_channels", "c4_channels"),
    [
        ("resnet10", 32, 256),
        ("resnet18", 64, 512),
        *((name, 256, 2048) for name in BACKBONES if name not in ("resnet10", "resnet18")),
    ],
)
def test_features_have_the_backbone_s_width_and_the_decoder_an_eighth_of_c4(backbone, c1_channels, c4_channels):
    model = make_meta(backbone)
    c1, c4 = model.backbone(torch.empty(1, 3, 65, 97, device="meta"))
    assert c1.shape == (1, c1_channels, 17, 25)
    assert c4.shape == (1, c4_channels, 5, 7)
    assert (model.backbone.c1_channels, model.backbone.c4_channels) == (c1_channels, c4_channels)
    assert model.classifier.in_channels == c4_channels // 8


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet50_tv"])
@pytest.mark.parametrize(("replace", "size"), [(OS8, (9, 13)), (OS16, (5, 7)), (OS32, (3, 4))])
def test_replaced_strides_keep_the_resolution(backbone, replace, size):
    model = make_meta(backbone, strides=replace)
    c1, c4 = model.backbone(torch.empty(1, 3, 65, 97, device="meta"))
    assert c1.shape[2:] == (17, 25)
    assert c4.shape[2:] == size


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("replace", "dilations"),
    [
        (OS32, {"layer3": (1, 1), "layer4": (1, 1)}),
        (OS16, {"layer3": (1, 1), "layer4": (1, 2)}),
        (OS8, {"layer3": (1, 2), "layer4": (2, 4)}),
    ],
)
def test_first_block_of_a_dilated_stage_has_the_dilation_before_it(backbone, replace, dilations):
    model = make_meta(backbone, strides=replace)
    for stage, (first, later) in dilations.items():
        blocks = list(getattr(model.backbone, stage))
        for block, dilation in zip(blocks, [first] + [later] * (len(blocks) - 1), strict=True):
            convs = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
            assert {conv.dilation for conv in convs} == {conv.padding for conv in convs} == {(dilation, dilation)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
@pytest.mark.parametrize("replace", [OS8, OS16, OS32])
@torch.no_grad()
def test_torchvision_backbones_give_torchvision_s_own_features(name, replace):
    theirs = getattr(torchvision.models, name)(weights=None, replace_stride_with_dilation=replace)
    state = reference_state(theirs)
    theirs.load_state_dict(state)
    ours = create_backbone(f"{name}_tv", replace).eval()
    own = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    assert list(ours.state_dict()) == list(own)
    ours.load_state_dict(own)
    image = reference_image(SEED, 1, 65, 81).float()
    features = IntermediateLayerGetter(theirs.eval(), {"layer1": "c1", "layer4": "c4"})(image)
    c1, c4 = ours(image)
    torch.testing.assert_close(c1, features["c1"])
    torch.testing.assert_close(c4, features["c4"])


def test_config_dilations_reach_the_aspp_branches():
    head = make_meta(dilations=(3, 5, 7)).head
    assert [branch[0].dilation for branch in (head.b1, head.b2, head.b3)] == [(3, 3), (5, 5), (7, 7)]


def test_logits_have_the_image_s_size_even_for_one_pixel(resnet18):
    resnet18.eval()
    for size in [(1, 1), (5, 3), (33, 50)]:
        assert resnet18(torch.zeros(1, 3, *size)).shape == (1, 5, *size)


def test_xception_identity_shortcut_sees_the_input_after_its_relu():
    torch.manual_seed(0)
    block = Block(4, 4).eval()
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    out, second = block(x)
    expected_second = block.sepconv2(torch.relu(block.sepconv1(torch.relu(x))))
    torch.testing.assert_close(second, expected_second)
    torch.testing.assert_close(out, block.sepconv3(torch.relu(expected_second)) + torch.relu(x))
    assert torch.equal(x, before)


def test_xception_convolved_shortcut_sees_the_raw_input():
    torch.manual_seed(0)
    block = Block(4, 6, stride=2).eval()
    x = torch.randn(2, 4, 6, 6)
    out, second = block(x)
    torch.testing.assert_close(out, block.sepconv3(torch.relu(second)) + block.skipbn(block.skip(x)))
    assert second.shape[2:] == (6, 6)
    assert out.shape[2:] == (3, 3)


# ---- feature perturbation


def test_perturbed_logits_differ_and_clean_ones_do_not_in_eval_mode_too(resnet18):
    resnet18.eval()
    image = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        logits, logits_fp = resnet18(image, need_fp=True)
        torch.testing.assert_close(logits, resnet18(image))
    assert (logits - logits_fp).abs().amax() > 1e-3 * logits.abs().amax()


def test_without_dropout_both_halves_are_equal():
    torch.manual_seed(0)
    model = make()
    model.fp_dropout = 0.0
    logits, logits_fp = model(torch.randn(2, 3, 33, 33), need_fp=True)
    torch.testing.assert_close(logits, logits_fp)


@pytest.mark.parametrize("training", [True, False])
def test_half_of_the_channels_are_dropped_whole_for_c1_first_and_then_c4(resnet18, training):
    resnet18.train(training)
    seen = {}
    handles = [
        getattr(resnet18, name).register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
        for name in ("reduce", "head")
    ]
    torch.manual_seed(7)
    with torch.no_grad():
        resnet18(torch.randn(2, 3, 33, 33), need_fp=True)
    for handle in handles:
        handle.remove()

    torch.manual_seed(7)
    torch.randn(2, 3, 33, 33)
    for name in ("reduce", "head"):
        clean, dropped = seen[name].chunk(2)
        keep = torch.empty(2, clean.shape[1], 1, 1).bernoulli_(0.5)
        assert 0.3 < keep.mean() < 0.7
        torch.testing.assert_close(dropped, 2 * keep * clean)


def test_decoder_batchnorm_statistics_cover_clean_and_dropped_features():
    torch.manual_seed(0)
    model = make().double().train()
    inputs = {}
    layers = {"reduce": model.reduce[1], "fuse": model.fuse[4], "stem": model.backbone.bn1}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _m, args, name=name: inputs.update({name: args[0].clone()}))
    with torch.no_grad():
        model(torch.randn(2, 3, 33, 33).double(), need_fp=True)
    assert {name: len(x) for name, x in inputs.items()} == {"reduce": 4, "fuse": 4, "stem": 2}
    for name, layer in layers.items():
        torch.testing.assert_close(layer.running_mean, 0.1 * inputs[name].mean((0, 2, 3)))
        torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * inputs[name].var((0, 2, 3)))
        assert layer.num_batches_tracked == 1


# ---- initialisation


@pytest.mark.parametrize("backbone", ["resnet50", "xception"])
def test_convolutions_start_normal_with_the_variance_of_their_outputs(backbone):
    torch.manual_seed(0)
    for name, module in make(backbone).backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            n = module.weight.numel()
            # For Xception's depthwise convolutions too, all output channels count.
            std = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels))
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
            assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(n), name
            assert module.bias is None, name


@pytest.mark.parametrize(("backbone", "momentum"), [("resnet50", 0.1), ("resnet18", 0.1), ("xception", 0.0003)])
def test_batchnorm_starts_as_identity_with_its_momentum(backbone, momentum):
    model = make(backbone)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum == (momentum if name.startswith("backbone.") else 0.1), name
            assert module.eps == 1e-5
            assert module.weight.eq(1).all() and module.bias.eq(0).all()
            assert module.running_mean.eq(0).all() and module.running_var.eq(1).all()


def test_decoder_starts_from_pytorch_s_defaults(resnet18):
    parts = (resnet18.head, resnet18.reduce, resnet18.fuse, resnet18.classifier)
    for conv in [m for part in parts for m in part.modules() if isinstance(m, nn.Conv2d)]:
        bound = 1 / math.sqrt(conv.weight[0].numel())  # uniform on [-bound, bound]
        assert conv.weight.abs().max() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert (conv.bias is not None) == (conv is resnet18.classifier)


# ---- devices and compilers


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_forward_on_a_gpu_mixes_no_devices_and_waits_for_nothing(backbone):
    # Fake tensors raise on operations between devices and on reading a value, which on a GPU waits for it.
    with FakeTensorMode(), torch.device("cuda"):
        model = make(backbone)
        for training in (True, False):
            model.train(training)
            image = torch.empty(2, 3, 65, 81)
            outputs = [model(image), *model(image, need_fp=True)]
            assert all(out.device.type == "cuda" and out.shape == (2, 5, 65, 81) for out in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
def test_backward_reads_no_value_and_reaches_every_parameter(backbone, training):
    # PyTorch built for CUDA cannot run autograd on fake CUDA tensors where there is no GPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(), torch.device(device):
        model = make(backbone).train(training)
        logits, logits_fp = model(torch.empty(2, 3, 65, 81), need_fp=True)
        (F.softmax(logits, dim=1)[:, 0].mean() + logits_fp.mean()).backward()
        assert all(p.grad is not None and p.grad.device.type == device for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "need_fp"), [("resnet18", False), ("resnet18", True), ("xception", True)])
def test_the_whole_forward_compiles_into_one_graph(backbone, need_fp):
    torch.manual_seed(0)
    model = make(backbone).eval()
    model.fp_dropout = 0.0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    image = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image, need_fp=need_fp), model(image, need_fp=need_fp))
    torch._dynamo.reset()


# ---- errors


def test_an_unknown_backbone_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown name 'resnet51', choose one of resnet18, resnet50"):
        make("resnet51")


@pytest.mark.parametrize("replace", [OS8, OS32])
def test_xception_refuses_another_output_stride_than_16(replace):
    with pytest.raises(ValueError, match=r"xception has output stride 16 only, set \[false, false, true\]"):
        make("xception", strides=replace)


def test_replace_stride_with_dilation_needs_three_booleans():
    with pytest.raises(ValueError, match="three booleans needed"):
        make(strides=(False, True))
