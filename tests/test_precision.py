"""util/precision.py: 16 bits, memory format, compilation, and BatchNorm folded away."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dataset.views import Partner, UnlabeledViews
from model import BACKBONES
from supervised import main as supervised
from tests.helpers import make_dataset, make_model, model_config, reference_batch
from unimatch import unimatch_step
from util.cli import parse_args
from util.errors import ConfigError
from util.losses import CrossEntropy, OhemCrossEntropy, pixel_cross_entropy
from util.precision import build_scaler, check_precision, describe_precision, evaluation_copy, set_precision
from util.run import open_run
from util.schedule import build_optimizer
from util.semi import consistency_loss, pseudo_label

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def _model(**changes) -> nn.Module:
    return set_precision(make_model(**changes), model_config(**changes))


# Autocast


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_under_autocast_features_have_16_bits_and_logits_32(amp):
    model, seen = _model(amp=amp).eval(), []
    model.classifier.register_forward_hook(lambda _m, args, out: seen.extend([args[0].dtype, out.dtype]))
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 33, 33))
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]] * 2
    assert logits.dtype == torch.float32
    with torch.no_grad():
        expected = _model().eval()(torch.randn(1, 3, 33, 33))
    assert expected.dtype == torch.float32


def test_logits_and_gradients_under_bf16_are_those_of_float32_roughly():
    image, label = torch.randn(2, 3, 65, 65), torch.randint(0, 5, (2, 65, 65))
    gradients = []
    for changes in ({}, {"amp": "bf16", "channels_last": True}):
        model = _model(**changes)
        CrossEntropy()(model(image), label).backward()
        gradients.append(model.classifier.weight.grad)
    assert gradients[1].dtype == torch.float32
    assert not torch.equal(*gradients)
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_and_confidence_of_16_bit_logits_are_computed_in_float32(dtype):
    logits = (4 * torch.randn(2, 5, 9, 7)).to(dtype).requires_grad_()
    label, conf = torch.randint(0, 5, (2, 9, 7)), torch.rand(2, 9, 7)
    wide = logits.detach().float().requires_grad_()
    for loss in (
        CrossEntropy(),
        OhemCrossEntropy(min_kept=10),
        lambda x, y: consistency_loss(x, y, conf, torch.zeros_like(y), 0.5),
    ):
        ours, expected = loss(logits, label), loss(wide, label)
        assert ours.dtype == torch.float32 and torch.equal(ours, expected)
        (ours_grad,), (expected_grad,) = torch.autograd.grad(ours, logits), torch.autograd.grad(expected, wide)
        assert ours_grad.dtype == dtype and torch.equal(ours_grad, expected_grad.to(dtype))
    for ours, expected in zip(pseudo_label(logits), pseudo_label(wide), strict=True):
        assert torch.equal(ours, expected)
    assert pixel_cross_entropy(logits, label).dtype == torch.float32


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_step_on_a_gpu_with_every_option_reads_nothing_back(amp):
    real = reference_batch(20230, 0, 2, dtype=torch.float32)[1]
    with FakeTensorMode(), GPU:
        model = _model(amp=amp, checkpoint_activations="all")
        for p in model.parameters():
            if p.ndim == 4:  # Module.to(memory_format=...) refuses fake parameters
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        views = UnlabeledViews(*(torch.empty(part.shape, dtype=part.dtype) for part in real))
        partner = Partner(views.weak[:1], views.ignore_mask, torch.empty(1, dtype=torch.int64))
        batch = ((torch.empty(2, 3, 49, 49), torch.empty(2, 49, 49, dtype=torch.int64)), views, partner)
        parts = []
        metrics = unimatch_step(model, batch, OhemCrossEntropy(min_kept=100), 0.9, parts.append)
    assert len(parts) == 2 and {value.device.type for value in metrics.values()} == {"cuda"}


# Memory format and compilation


def test_channels_last_changes_the_memory_format_of_weights_and_features_and_no_names():
    model, seen = _model(channels_last=True).eval(), []
    model.classifier.register_forward_hook(lambda _m, args, out: seen.append(args[0]))
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 65, 65))
        torch.manual_seed(0)
        expected = _model().eval()
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    assert logits.shape == (2, 5, 65, 65)
    assert list(model.state_dict()) == list(expected.state_dict())
    image = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(
            model.double()(image.double()), expected.double()(image.double()), rtol=1e-9, atol=1e-12
        )


def test_compilation_is_of_the_call_alone(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda model, *args, **kwargs: compiled.append(model))
    model = _model(compile=True)
    assert compiled == [model]
    assert list(model.state_dict()) == list(_model().state_dict())


def test_compilation_needs_no_account_for_its_cache(monkeypatch, tmp_path):
    def unknown(*_):
        raise KeyError("uid not found")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr("getpass.getuser", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _model(compile=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/torchinductor_{os.getuid()}"


def test_compilation_without_a_compiler_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"^compile: true needs a C\+\+ compiler.*--set compile=false$"):
        check_precision(model_config(compile=True), CPU)
    check_precision(model_config(), CPU)


def test_fp16_on_the_cpu_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^amp: fp16 needs a GPU, and this run is on cpu: use bf16 or none$"):
        check_precision(model_config(amp="fp16"), CPU)
    check_precision(model_config(amp="fp16"), GPU)
    check_precision(model_config(amp="bf16"), CPU)


def test_the_loss_is_scaled_with_fp16_only():
    loss = torch.tensor(3.0)
    assert build_scaler(model_config(amp="bf16"), CPU).scale(loss) is loss
    scaler = build_scaler(model_config(amp="fp16"), CPU)
    assert scaler.is_enabled() and scaler.scale(loss) > 1000 * loss


def test_the_fused_optimiser_is_a_gpu_s():
    assert all(group["fused"] is None for group in build_optimizer(_model(), 0.1, 1).param_groups)
    with FakeTensorMode(), GPU:
        assert all(group["fused"] for group in build_optimizer(_model(), 0.1, 1).param_groups)


# Runs


def test_a_run_says_how_it_computes_and_trains_so(tmp_path, capsys):
    data = make_dataset(tmp_path, labeled=2, val=1)
    data.configure(amp="bf16", channels_last=True, checkpoint_activations="all")
    supervised(data.arguments(tmp_path / "run"))
    expected = (
        "computing: bf16 autocast (logits, softmax and losses in float32), channels_last, eager, "
        "activations computed again: all"
    )
    assert expected in capsys.readouterr().out
    state = torch.load(tmp_path / "run/latest.pth", weights_only=True)
    assert "scaler" not in state
    assert all(value.dtype != torch.bfloat16 for value in state["model"].values())


def test_the_default_is_float32_and_eager_contiguous_on_gpus_and_channels_last_on_cpus():
    cfg = model_config(channels_last=None)
    kept = "activations computed again: none"
    assert describe_precision(cfg, GPU) == f"computing: float32, contiguous, eager, {kept}"
    assert describe_precision(cfg, CPU) == f"computing: float32, channels_last, eager, {kept}"
    assert (
        describe_precision(model_config(channels_last=False), CPU) == f"computing: float32, contiguous, eager, {kept}"
    )
    weights = [_model(channels_last=value).classifier.weight for value in (None, False)]
    assert weights[0].is_contiguous(memory_format=torch.channels_last) and weights[1].is_contiguous()
    with FakeTensorMode(), GPU:
        assert _model(channels_last=None).reduce[0].weight.is_contiguous()


def test_the_copy_for_evaluation_holds_16_bit_weights_that_give_what_autocast_gives():
    for amp in ("bf16", "none"):
        model = _model(amp=amp)
        folded = evaluation_copy(model)
        expected = {"bf16": torch.bfloat16, "none": torch.float32}[amp]
        assert {m.weight.dtype for m in folded.modules() if isinstance(m, nn.Conv2d)} == {expected}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        image = torch.randn(1, 3, 33, 33)
        with torch.inference_mode():
            logits = folded(image)
            for module in folded.modules():
                if isinstance(module, nn.Conv2d):
                    module.float()  # the same values, which autocast rounds
            assert logits.dtype == torch.float32 and torch.equal(folded(image), logits)


def test_the_copy_of_a_vision_transformer_gives_to_the_bit_what_autocast_gives():
    model = make_model(model="dpt", backbone="dinov2_small", amp="bf16")
    model = set_precision(model, model_config(amp="bf16")).eval()
    copy = evaluation_copy(model)
    assert copy.backbone.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    image = torch.randn(1, 3, 28, 42)
    with torch.inference_mode():
        assert torch.equal(copy(image), model(image))


def test_a_run_with_fp16_on_the_cpu_stops_before_it_starts(tmp_path):
    data = make_dataset(tmp_path, labeled=2, val=1)
    args = parse_args("supervised", [*data.arguments(tmp_path / "run"), "--set", "amp=fp16"])
    with pytest.raises(ConfigError, match="fp16 needs a GPU"), open_run("supervised", args):
        pass
    assert not (tmp_path / "run").exists()


# Folded BatchNorm


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_folding_leaves_no_batch_norm_and_the_same_logits(backbone):
    model = _model(backbone=backbone).double()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "num_batches" not in name:
                buffer.uniform_(0.5, 1.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = evaluation_copy(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    image = torch.randn(1, 3, 33, 41, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(image), model.eval()(image), rtol=1e-9, atol=1e-9)


def test_a_model_that_was_compiled_can_be_folded():
    model = _model(compile=True).eval()
    image = torch.randn(1, 3, 33, 33)
    with torch.inference_mode():
        logits = evaluation_copy(model)(image)  # not compiled, as evaluation sees images of every size
        assert not hasattr(logits, "_dynamo") and logits.shape == (1, 5, 33, 33)
