"""DINOv2's encoder against the reference figures and slow obvious references."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.backbone import DINOV2_BACKBONES, create_backbone
from model.backbone.dinov2 import DINOv2, SwiGLU
from tests.reference import formulas
from tests.reference.weights import check_summary, reference_state_v2
from util.teacher import Teacher

REFERENCE = Path(__file__).parent / "reference"
FIGURES = json.loads((REFERENCE / "figures_v2.json").read_text())
STATE_DICTS = json.loads((REFERENCE / "state_dicts_v2.json").read_text())


def tiny(seed=0, **changes):
    """Float64, four blocks, all of them tapped."""
    torch.manual_seed(seed)
    encoder = DINOv2(**{"width": 24, "depth": 4, "heads": 3, "taps": (0, 1, 2, 3)} | changes).double()
    with torch.no_grad():
        for p in encoder.parameters():
            p.normal_(std=0.3)
    return encoder


def direct_interpolation(encoder, rows, columns):
    """The positional embedding as the release computes it, anew for each forward."""
    cls, patches = encoder.pos_embed[:, :1], encoder.pos_embed[:, 1:]
    patches = F.interpolate(
        patches.reshape(1, 37, 37, -1).permute(0, 3, 1, 2),
        scale_factor=((rows + 0.1) / 37, (columns + 0.1) / 37),
        mode="bicubic",
    )
    assert patches.shape[2:] == (rows, columns)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


# ---- against the release


@pytest.mark.parametrize("size", STATE_DICTS)
def test_state_dict_has_the_published_names_order_and_shapes(size):
    with torch.device("meta"):
        encoder = create_backbone(f"dinov2_{size}")
    expected = [[n.removeprefix("backbone."), s] for n, s in STATE_DICTS[size]["state_dict"] if n.startswith("backb")]
    assert [[name, list(tensor.shape)] for name, tensor in encoder.state_dict().items()] == expected
    assert sum(p.numel() for p in encoder.parameters()) == STATE_DICTS[size]["n_params_backbone"]
    assert not list(encoder.buffers())


@torch.no_grad()
def test_a_block_of_the_giant_gives_the_figures_of_the_release(device):
    figures = FIGURES["giant_block"]
    with torch.device("meta"):
        block = create_backbone("dinov2_giant").blocks[0]
    assert [[name, list(tensor.shape)] for name, tensor in block.state_dict().items()] == figures["tensors"]
    prefix = "backbone.blocks.0."  # the weights' formula is of the whole name
    state = reference_state_v2({prefix + name: shape for name, shape in figures["tensors"]})
    block.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()}, assign=True)
    tokens = torch.from_numpy(formulas.image(FIGURES["seed"] + 4, 1, 7, 1536, 1)[:, 0])
    check_summary(block.to(device, torch.float64)(tokens.to(device, torch.float64)), figures["output"], rtol=1e-6)


# ---- tokens


def test_a_token_for_each_patch_row_by_row():
    embed = tiny().patch_embed
    image = torch.randn(2, 3, 28, 42, dtype=torch.float64)
    tokens = embed(image)
    assert tokens.shape == (2, 6, 24)
    for row in range(2):
        for column in range(3):
            patch = image[:, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            expected = torch.einsum("bchw,dchw->bd", patch, embed.proj.weight) + embed.proj.bias
            torch.testing.assert_close(tokens[:, 3 * row + column], expected)


@torch.no_grad()
def test_taps_are_normalised_patch_tokens_after_their_blocks():
    encoder, image = tiny(taps=(1, 3)), torch.randn(2, 3, 28, 42, dtype=torch.float64)
    x = torch.cat([encoder.cls_token.expand(2, 1, 24), encoder.patch_embed(image)], dim=1)
    x = x + direct_interpolation(encoder, 2, 3)
    expected = []
    for i, block in enumerate(encoder.blocks):
        x = x + block.ls1.gamma * block.attn(block.norm1(x))
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
        if i in (1, 3):
            expected.append(encoder.norm(x)[:, 1:])
    features = encoder(image)
    assert len(features) == 2
    for ours, theirs in zip(features, expected, strict=True):
        assert ours.shape == (2, 6, 24)
        torch.testing.assert_close(ours, theirs)


def test_attention_is_that_of_the_paper():
    attention = tiny().blocks[0].attn
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = (attention.qkv(x)[..., start : start + 24] for start in (0, 24, 48))
    heads = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5, dim=-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize(("width", "hidden"), [(1536, 4096), (24, 64)])
def test_the_gated_mlp_is_two_thirds_as_wide(width, hidden):
    mlp = SwiGLU(width).double()
    assert mlp.w12.weight.shape == (2 * hidden, width)
    assert mlp.w3.weight.shape == (width, hidden)
    x = torch.randn(2, width, dtype=torch.float64)
    inner = mlp.w12(x)
    torch.testing.assert_close(mlp(x), mlp.w3(inner[:, :hidden] * inner[:, :hidden].sigmoid() * inner[:, hidden:]))


# ---- positional embedding


@pytest.mark.parametrize("grid", [(5, 6), (1, 2), (37, 36), (57, 37), (40, 61)])
def test_positions_and_their_gradient_are_those_of_direct_interpolation(grid):
    encoder = tiny()
    ours, expected = encoder.positions(grid), direct_interpolation(encoder, *grid)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours)
    (gradient,), (expected_gradient,) = (
        torch.autograd.grad((p * weight).sum(), encoder.pos_embed) for p in (ours, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_positions_of_the_trained_grid_are_taken_as_they_are():
    encoder = tiny()
    assert encoder.positions((37, 37)) is encoder.pos_embed


def test_interpolation_is_prepared_once_for_a_grid_and_is_never_out_of_date(monkeypatch):
    calls, interpolate = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *args, **kwargs: calls.append(args) or interpolate(*args, **kwargs))
    encoder, image = tiny(), torch.randn(2, 3, 28, 42, dtype=torch.float64)
    with torch.no_grad():
        before = encoder(image)[0]
    assert 0 < len(calls) <= 2
    calls.clear()
    encoder(image)[0].sum().backward()
    assert encoder.pos_embed.grad.abs().sum() > 0
    with torch.no_grad():
        encoder.pos_embed.data.mul_(2)  # past autograd's version counter
        changed = encoder(image)[0]
        assert not calls
        torch.testing.assert_close(encoder.positions((2, 3)), direct_interpolation(encoder, 2, 3))
    assert not torch.allclose(changed, before)
    encoder.float()
    assert encoder(image.float())[0].dtype == torch.float32


def test_training_goes_on_after_an_image_of_the_same_size_was_seen_in_inference_mode():
    encoder, image = tiny(), torch.randn(1, 3, 28, 42, dtype=torch.float64)
    with torch.inference_mode():
        encoder(image)
    encoder(image)[0].sum().backward()
    assert encoder.pos_embed.grad.abs().sum() > 0


def test_positions_are_interpolated_in_float32_under_autocast():
    encoder = tiny().float()
    with torch.autocast("cpu", torch.bfloat16):
        positions = encoder.positions((5, 6))
    assert positions.dtype == torch.float32
    assert torch.equal(positions, encoder.positions((5, 6)))


# ---- training


def saved_for_backward(encoder, image):
    """Values that the forward pass keeps besides parameters."""
    sizes = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = encoder(image)
    return sum(sizes.values()), features


def test_a_frozen_encoder_keeps_nothing_for_the_backward_pass():
    image = torch.randn(1, 3, 28, 42, dtype=torch.float64)
    for again in (False, True):
        encoder = tiny().requires_grad_(False)
        encoder.checkpoint_activations = again
        size, features = saved_for_backward(encoder, image)
        assert size == 0
        assert not any(tokens.requires_grad for tokens in features)
    assert saved_for_backward(tiny(), image)[0] > 0


def test_recomputing_keeps_less_and_gives_the_same_gradients_to_the_bit():
    image = torch.randn(1, 3, 28, 42, dtype=torch.float64)
    results, sizes = [], []
    for again in (False, True):
        encoder = tiny(mlp=SwiGLU)
        encoder.checkpoint_activations = again
        size, features = saved_for_backward(encoder, image)
        sum((i + 1) * tokens.square().mean() for i, tokens in enumerate(features)).backward()
        results.append({name: p.grad for name, p in encoder.named_parameters()})
        sizes.append(size)
    assert sizes[1] < sizes[0] / 2
    for name, gradient in results[0].items():
        if name == "mask_token":
            assert gradient is results[1][name] is None
        else:
            assert torch.equal(gradient, results[1][name]), name


def test_an_encoder_from_scratch_starts_as_dinov2_does():
    torch.manual_seed(0)
    encoder = DINOv2(width=64, depth=2, heads=2, taps=(0, 1))
    for name, p in encoder.named_parameters():
        if name == "cls_token":
            assert 0 < p.std() < 2e-6
        elif name == "pos_embed" or (name.endswith("weight") and p.ndim == 2):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            assert torch.equal(p, torch.ones_like(p)), name
        elif not name.startswith("patch_embed"):
            assert torch.equal(p, torch.zeros_like(p)), name


def test_inside_a_fake_mode_a_teacher_is_made_of_an_encoder_that_has_seen_an_image():
    with FakeTensorMode():
        encoder = DINOv2(width=24, depth=2, heads=3, taps=(0, 1))
        images = torch.empty(1, 3, 28, 42)
        encoder(images)
        assert Teacher(encoder).model(images)[1].shape == (1, 6, 24)


def test_every_size_has_a_name():
    assert list(DINOV2_BACKBONES) == [f"dinov2_{size}" for size in STATE_DICTS]
