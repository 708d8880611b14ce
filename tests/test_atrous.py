"""model/semseg/atrous.py: the gradient that skips the padding, against PyTorch's own convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model.semseg import atrous
from model.semseg.atrous import AtrousConv2d

# Height and width, dilation: a tenth to all of the taps fall into the padding.
SIZES = [((21, 21), 18), ((21, 21), 12), ((24, 32), 18), ((9, 31), 12), ((5, 4), 6), ((1, 1), 2), ((21, 21), 6)]


@pytest.fixture
def skipped(monkeypatch) -> list[int]:
    """Dilations of the convolutions whose gradient skipped the padding."""
    dilations, original = [], atrous.weight_gradient

    def spy(*arguments):
        dilations.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(atrous, "weight_gradient", spy)
    return dilations


def _pair(dilation: int, dtype=torch.float64) -> tuple[AtrousConv2d, nn.Conv2d]:
    """Ours and PyTorch's with the same weights."""
    torch.manual_seed(0)
    ours = AtrousConv2d(6, 4, dilation).to(dtype)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 4, 3, padding=dilation, dilation=dilation, bias=False).to(dtype)
    assert torch.equal(ours.weight, plain.weight)
    return ours, plain


def _gradients(conv: nn.Conv2d, x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = conv(x)
    (y * weights).sum().backward()
    return [y.detach(), x.grad, conv.weight.grad]


@pytest.mark.parametrize(("size", "dilation"), SIZES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradients_are_those_of_the_plain_convolution(size, dilation, memory_format, skipped):
    ours, plain = (conv.to(memory_format=memory_format) for conv in _pair(dilation))
    x = torch.randn(3, 6, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    weights = torch.randn(3, 4, *size, dtype=torch.float64)
    for found, expected in zip(_gradients(ours, x, weights), _gradients(plain, x, weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert ours.weight.grad.stride() == ours.weight.stride()
    assert skipped == ([dilation] if (size, dilation) != ((21, 21), 6) else [])


def test_numerical_gradients(skipped):
    ours, _ = _pair(4)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: ours(x), (x, ours.weight))
    assert skipped


def test_under_autocast_the_gradients_are_those_of_the_plain_convolution_under_autocast(skipped):
    ours, plain = _pair(12, torch.float32)
    x, weights = torch.randn(2, 6, 21, 21), torch.randn(2, 4, 21, 21)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = _gradients(ours, x, weights), _gradients(plain, x, weights)
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], expected[0])
    for ours_grad, plain_grad in zip(found[1:], expected[1:], strict=True):
        assert ours_grad.dtype == torch.float32
        assert (ours_grad - plain_grad).norm() < 0.01 * plain_grad.norm()
    assert skipped == [12]


def test_only_the_gradients_that_are_asked_for_are_computed(skipped):
    ours, _ = _pair(12)
    ours.weight.requires_grad_(False)
    x = torch.randn(1, 6, 9, 9, dtype=torch.float64, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and not skipped
    ours.weight.requires_grad_()
    ours(x.detach()).sum().backward()
    assert ours.weight.grad is not None and skipped == [12]


def test_it_can_be_copied_saved_and_folded_like_any_convolution():
    ours, plain = _pair(6)
    plain.load_state_dict(ours.state_dict())
    norm = nn.BatchNorm2d(4).double().eval()
    norm.running_mean.fill_(0.3)
    folded = nn.utils.fusion.fuse_conv_bn_eval(copy.deepcopy(ours).eval(), norm)
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), norm(plain(x)))


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True])
def test_it_compiles_into_one_graph_with_its_backward_pass(amp):
    ours, plain = _pair(12, torch.float32)
    x, weights = torch.randn(2, 6, 13, 13), torch.randn(2, 4, 13, 13)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        found, expected = [], []
        for conv, results in ((compiled, found), (plain, expected)):
            leaf = x.clone().requires_grad_()
            (conv(leaf) * weights).sum().backward()
            results += [leaf.grad, conv.weight.grad]
    for ours_grad, plain_grad in zip(found, expected, strict=True):
        assert (ours_grad - plain_grad).norm() < (0.01 if amp else 1e-5) * plain_grad.norm()
