"""`checkpoint_activations`: less is kept, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.activation_checkpoint import run
from tests.helpers import make_model, reference_batch
from unimatch import unimatch_step
from util.distributed.batchnorm import SyncBatchNormCPU
from util.distributed.ddp import distribute
from util.losses import CrossEntropy


def _model(which: str, backbone: str = "resnet18") -> nn.Module:
    return make_model(backbone=backbone, checkpoint_activations=which)


def _step(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Losses, gradients and buffers after a UniMatch step: two training forwards, feature perturbation included."""
    torch.manual_seed(1)
    metrics = unimatch_step(
        model, reference_batch(20230, 0, 2, 33, dtype=dtype), CrossEntropy(), 0.3, torch.Tensor.backward
    )
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return metrics | gradients | dict(model.named_buffers())


def _assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(expected)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "which"), [("resnet18", "backbone"), ("resnet50_tv", "all"), ("xception", "all")])
def test_a_step_is_the_same_to_the_bit(one_thread, backbone, which):
    _assert_same(_step(_model(which, backbone)), _step(_model("none", backbone)))


@pytest.mark.slow
def test_a_step_in_float64_and_one_under_autocast_are_the_same_to_the_bit(one_thread):
    expected, ours = _model("none").double(), _model("all").double()
    _assert_same(_step(ours, torch.float64), _step(expected, torch.float64))
    expected, ours = _model("none"), _model("all")
    expected.autocast_dtype = ours.autocast_dtype = torch.bfloat16
    _assert_same(_step(ours), _step(expected))


def test_names_and_order_of_the_state_stay():
    assert list(_model("all").state_dict()) == list(_model("none").state_dict())


@pytest.mark.parametrize(("which", "share"), [("backbone", 0.7), ("all", 0.3)])
def test_less_is_kept_for_the_backward_pass(which, share):
    def kept(model: nn.Module) -> int:
        sizes = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        image = torch.randn(2, 3, 65, 65)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(image, need_fp=True)
        assert logits[0].requires_grad
        return sum(sizes.values())

    assert 0 < kept(_model(which)) < share * kept(_model("none"))


def test_running_statistics_are_kept_again_after_the_backward_pass_and_after_a_fault_in_it():
    model = _model("all")
    logits = model(torch.randn(2, 3, 33, 33))

    def fail(module, args):
        raise RuntimeError("a fault")

    handle = model.backbone.layer1[0].bn2.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a fault"):
        logits.sum().backward()
    handle.remove()
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model(torch.randn(2, 3, 33, 33)).sum().backward()
    assert {int(value) for name, value in model.named_buffers() if "num_batches" in name} == {2}


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNormCPU])
def test_every_kind_of_batch_norm_sees_a_batch_once(kind):
    """Those of several processes compute outside a process group too, torch's own also on the CPU."""
    results = []
    for again in (True, False):
        torch.manual_seed(0)
        part = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.ReLU())
        run(part, torch.randn(2, 3, 9, 9), again=again).square().sum().backward()
        results.append({f"gradient of {name}": p.grad for name, p in part.named_parameters()} | part.state_dict())
    _assert_same(*results)
    assert results[0]["1.num_batches_tracked"] == 1


@pytest.mark.slow
def test_two_processes_with_synchronised_batch_norm_do_the_same(tmp_path):
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path / "rendezvous"),), nprocs=2)


def _two_processes(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    results = [_step(distribute(_model(which), torch.device("cpu"))) for which in ("all", "none")]
    _assert_same(*results)
    dist.destroy_process_group()
