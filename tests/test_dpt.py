"""DPT on DINOv2 and complementary dropout, against the reference figures and slow obvious references."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model import DPT, SIZE_MULTIPLES, build_model, complementary_dropout
from model.backbone.dinov2 import DINOv2
from tests.reference.weights import check_summary, reference_image, reference_state_v2, with_reference_weights

REFERENCE = Path(__file__).parent / "reference"
FIGURES = json.loads((REFERENCE / "figures_v2.json").read_text())
STATE_DICTS = json.loads((REFERENCE / "state_dicts_v2.json").read_text())
SEED, COMPLEMENTARY = FIGURES["seed"], FIGURES["complementary"]
NEVER_USED = [
    "backbone.mask_token",
    *(f"head.scratch.refinenet4.resConfUnit1.conv{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
]


def make(size="small", nclass=5, **keys):
    keys = {"model": "dpt", "backbone": f"dinov2_{size}", "nclass": nclass, "pretrained": False} | keys
    return build_model(SimpleNamespace(**keys))


def tiny(checkpoint_activations="none", width=24, seed=0):
    torch.manual_seed(seed)
    encoder = DINOv2(width=width, depth=4, heads=3, taps=(0, 1, 2, 3))
    return DPT(encoder, 5, 6, (4, 5, 6, 7), checkpoint_activations)


@pytest.fixture(scope="module")
def small():
    return with_reference_weights(make(nclass=21), reference_state_v2)


# ---- against the release


@pytest.mark.parametrize("size", STATE_DICTS)
def test_state_dict_has_the_published_names_order_and_shapes(size):
    with torch.device("meta"):
        model = make(size, STATE_DICTS[size]["nclass"])
    assert [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()] == STATE_DICTS[size][
        "state_dict"
    ]
    assert sum(p.numel() for p in model.parameters()) == STATE_DICTS[size]["n_params"]


@torch.no_grad()
def check_forward(model, figures, device):
    model, image = model.to(device), reference_image(SEED, 2, 70, 84).to(device)
    features = model.backbone(image)
    for tokens, summary in zip(features, figures["features"], strict=True):
        check_summary(tokens, summary, rtol=1e-6)
    check_summary(model.backbone.positions((5, 6)), figures["pos_embed_5x6"], rtol=1e-6)
    check_summary(model.head(features, (5, 6)), figures["head_before_upsampling"], rtol=1e-6)
    check_summary(model(image), figures["eval_logits"], rtol=1e-6)
    check_summary(model(reference_image(SEED + 1, 1, 98, 56).to(device)), figures["eval_logits_odd"], rtol=1e-6)


def test_forward_gives_the_figures_of_the_release(small, device):
    check_forward(small, FIGURES["forward"]["small"], device)
    with torch.no_grad():
        logits = small(reference_image(SEED + 3, 1, 14, 28).to(device))
    small.cpu()
    check_summary(logits, FIGURES["forward"]["small"]["eval_logits_14"], rtol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_forward_at_the_trained_size_gives_the_figures_of_the_release(small, device):
    logits = small.to(device)(reference_image(SEED + 2, 1, 518, 518).to(device))
    small.cpu()
    check_summary(logits, FIGURES["forward"]["small"]["eval_logits_518"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "large"])
def test_forward_of_larger_encoders_gives_the_figures_of_the_release(size, device):
    figures = FIGURES["forward"][size]
    check_forward(with_reference_weights(make(size, figures["nclass"]), reference_state_v2), figures, device)


@pytest.mark.parametrize("batch", COMPLEMENTARY["batches"])
def test_complementary_dropout_draws_what_the_release_draws(batch):
    figures, width = COMPLEMENTARY["batches"][batch], COMPLEMENTARY["dim"]
    torch.manual_seed(SEED)
    first, second = complementary_dropout(int(batch), width).chunk(2)
    assert torch.equal(first + second, torch.full((int(batch), width), 2.0))
    assert [k for k, row in enumerate(first) if (row == 1).all()] == figures["kept"]
    assert (first == 0).sum(dim=1).tolist() == figures["mask1_zeros_per_row"]
    assert first[:, :24].tolist() == figures["mask1_first_24"]
    assert (first.flatten().double() * torch.arange(first.numel())).sum().item() == figures["mask1_weighted"]


def test_values_of_complementary_dropout_over_many_batches_are_those_of_the_release():
    counts = torch.zeros(3, dtype=torch.int64)
    for seed in range(SEED, SEED + 400):
        torch.manual_seed(seed)
        first = complementary_dropout(2, COMPLEMENTARY["dim"])[:2]
        counts += torch.bincount(first.flatten().long(), minlength=3)
    assert {str(k): n for k, n in enumerate(counts.tolist())} == COMPLEMENTARY["values_over_400_batches_of_2"]


@torch.no_grad()
def test_logits_with_complementary_dropout_are_those_of_the_release(device):
    model = with_reference_weights(make(), reference_state_v2).to(device)
    views = torch.cat([reference_image(SEED + k, 3, 56, 70) for k in (5, 6)]).to(device)
    torch.manual_seed(SEED)
    check_summary(model(views, comp_drop=True), COMPLEMENTARY["logits"], rtol=1e-6)
    check_summary(model(views), COMPLEMENTARY["logits_without"], rtol=1e-6)


# ---- dropout


def features_seen(model):
    """The list into which the head's inputs go."""
    seen = []
    model.head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_complementary_dropout_is_the_same_for_all_tokens_of_all_taps_and_reaches_the_encoder(training):
    model, views = tiny().train(training), torch.randn(6, 3, 28, 42)
    seen = features_seen(model)
    torch.manual_seed(3)
    factors = complementary_dropout(3, 24)
    torch.manual_seed(3)
    logits = model(views, comp_drop=True)
    for tokens, dropped in zip(model.backbone(views), seen[0], strict=True):
        expected = torch.empty_like(tokens)
        for sample in range(6):
            for token in range(6):
                for channel in range(24):
                    factor = factors[sample, channel]
                    expected[sample, token, channel] = tokens[sample, token, channel] * factor
        torch.testing.assert_close(dropped, expected)
    logits.square().mean().backward()
    assert model.backbone.patch_embed.proj.weight.grad.abs().sum() > 0


def test_a_view_at_a_time_with_its_factors_gives_what_both_together_give():
    model, views = tiny().double(), torch.randn(6, 3, 28, 42, dtype=torch.float64)
    factors = complementary_dropout(3, model.drop_width)
    together = model(views, comp_drop=factors)
    apart = [model(view, comp_drop=factor) for view, factor in zip(views.chunk(2), factors.chunk(2), strict=True)]
    torch.testing.assert_close(torch.cat(apart), together)
    assert (model(views) - together).abs().max() > 1e-3 * together.abs().max()


def test_half_of_the_channels_are_dropped_whole_for_each_tap_anew_by_feature_perturbation():
    model, seen = tiny(width=96).eval(), []
    seen = features_seen(model)
    image = torch.randn(2, 3, 28, 42)
    torch.manual_seed(7)
    with torch.no_grad():
        logits, logits_fp = model(image, need_fp=True)
        torch.testing.assert_close(logits, model(image))
    assert (logits - logits_fp).abs().amax() > 1e-3 * logits.abs().amax()
    torch.manual_seed(7)
    for tokens in seen[0]:
        clean, dropped = tokens.chunk(2)
        keep = torch.empty(2, 1, 96).bernoulli_(0.5)
        assert 0.3 < keep.mean() < 0.7
        torch.testing.assert_close(dropped, 2 * keep * clean)
    model.fp_dropout = 0.0
    with torch.no_grad():
        torch.testing.assert_close(*model(image, need_fp=True))


def test_deeplab_drops_channels_of_both_feature_maps_in_the_same_samples():
    torch.manual_seed(0)
    model = build_deeplab()
    views, seen = torch.randn(6, 3, 33, 33, dtype=torch.float64), {}
    for name in ("reduce", "head"):
        getattr(model, name).register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
    torch.manual_seed(3)
    factors = complementary_dropout(3, 64 + 512).double()
    torch.manual_seed(3)
    together = model(views, comp_drop=True)
    c1, c4 = model.backbone(views)
    assert torch.equal(seen["reduce"], c1 * factors[:, :64, None, None])
    assert torch.equal(seen["head"], c4 * factors[:, 64:, None, None])
    apart = [model(view, comp_drop=factor) for view, factor in zip(views.chunk(2), factors.chunk(2), strict=True)]
    torch.testing.assert_close(torch.cat(apart), together)  # in eval mode, where samples do not mix
    with pytest.raises(ValueError, match=r"two views of each image needed, got a batch of 3"):
        model(views[:3], comp_drop=True)


def build_deeplab():
    keys = {"backbone": "resnet18", "nclass": 5, "dilations": (6, 12, 18), "pretrained": False}
    return build_model(SimpleNamespace(replace_stride_with_dilation=(False, False, True), **keys)).double().eval()


# ---- training


def test_training_and_grouping_change_nothing():
    model, image = tiny().double(), torch.randn(3, 3, 28, 42, dtype=torch.float64)
    with torch.no_grad():
        logits = model.train()(image)
        assert torch.equal(logits, model.eval()(image))
        torch.testing.assert_close(torch.cat([model(part) for part in image.split(1)]), logits)


def test_all_parameters_that_need_a_gradient_get_one():
    model = tiny()
    model(torch.randn(2, 3, 28, 42)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == NEVER_USED
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_locked_backbone_gets_no_gradient_and_the_head_does():
    model = make(lock_backbone=True)
    model(torch.randn(1, 3, 14, 14)).square().mean().backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.head.parameters() if p.requires_grad)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_recomputing_gives_the_same_gradients_to_the_bit_and_keeps_less(one_thread, amp):
    image, factors = torch.randn(2, 3, 56, 42), complementary_dropout(1, 24)
    gradients, kept = {}, {}
    for which in ("none", "backbone", "all"):
        model, sizes = tiny(which), {}
        model.autocast_dtype = amp

        def keep(tensor, sizes=sizes):
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(image, comp_drop=factors)
        kept[which] = sum(sizes.values())
        logits.square().mean().backward()
        gradients[which] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert kept["all"] < 0.7 * kept["backbone"] < 0.7 * kept["none"]
    for which in ("backbone", "all"):
        assert all(torch.equal(grad, gradients["none"][name]) for name, grad in gradients[which].items())
        assert gradients[which].keys() == gradients["none"].keys()


def test_bf16_autocast_is_near_float32_and_logits_and_gradients_are_float32():
    model, image = tiny(), torch.randn(2, 3, 56, 70)
    results = []
    for amp in (None, torch.bfloat16):
        model.autocast_dtype = amp
        model.zero_grad()
        logits = model(image)
        logits.square().mean().backward()
        assert logits.dtype == torch.float32
        results.append((logits.detach(), model.backbone.blocks[0].attn.qkv.weight.grad.clone()))
    for exact, rounded in zip(*results, strict=True):
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).norm() < 0.05 * exact.norm()


# ---- devices and compilers


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_forward_on_a_gpu_mixes_no_devices_and_waits_for_nothing():
    # Fake tensors raise on operations between devices and on reading a value, which on a GPU waits for it.
    with FakeTensorMode(), torch.device("cuda"):
        model, image = make(), torch.empty(2, 3, 56, 70)
        for model.autocast_dtype in (None, torch.bfloat16):
            outputs = [model(image), model(image, comp_drop=True), *model(image, need_fp=True)]
            assert all(out.device.type == "cuda" and out.shape == (2, 5, 56, 70) for out in outputs)


@pytest.mark.parametrize("size", ["small", pytest.param("giant", marks=pytest.mark.slow)])
def test_backward_reads_no_value_and_reaches_every_parameter(size):
    # PyTorch built for CUDA cannot run autograd on fake CUDA tensors where there is no GPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(), torch.device(device):
        model = make(size, checkpoint_activations="all")
        model(torch.empty(2, 3, 56, 70), comp_drop=True).mean().backward()
        assert all(p.grad is not None and p.grad.device.type == device for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("keywords", [{"comp_drop": True}, {"need_fp": True}], ids=str)
def test_the_whole_forward_compiles_into_one_graph(keywords):
    model, image = tiny(), torch.randn(2, 3, 28, 42)
    model.fp_dropout = 0.0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):  # the second time, the positional embedding's interpolation is there
        results = []
        for function in (compiled, model):
            torch.manual_seed(0)
            results.append(function(image, **keywords))
        torch.testing.assert_close(*results)
    torch._dynamo.reset()


# ---- errors


def test_sides_that_are_no_multiples_of_14_are_refused():
    with pytest.raises(ValueError, match=r"^image of 28 x 43 pixels: DINOv2 needs sides that are multiples of 14$"):
        tiny()(torch.zeros(1, 3, 28, 43))
    assert SIZE_MULTIPLES == {"deeplabv3plus": 1, "dpt": 14}


def test_an_odd_batch_of_views_is_refused():
    with pytest.raises(ValueError, match=r"two views of each image needed, got a batch of 3"):
        tiny()(torch.zeros(3, 3, 28, 28), comp_drop=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "deeplab"}, "model: unknown name 'deeplab', choose one of deeplabv3plus, dpt"),
        ({"backbone": "resnet50"}, "backbone: resnet50 is for model deeplabv3plus; dpt has dinov2_small, dinov2_base"),
        ({"model": "deeplabv3plus"}, "backbone: dinov2_small is for model dpt; deeplabv3plus has resnet18, resnet50"),
        ({"backbone": "dinov2_huge"}, "backbone: unknown name 'dinov2_huge', choose one of resnet18, resnet50"),
    ],
)
def test_a_model_or_backbone_that_there_is_not_is_refused_by_name(keys, message):
    with pytest.raises(ValueError) as error:
        make(**keys)
    assert str(error.value).startswith(message)
