"""Layer offload on a CUDA GPU: bitwise the same, within the budget, with copies that really overlap."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from offload_models import Network, gigabytes, quantize, untouched
from torch import nn

import tessera
from tessera.models.offload.planner import GB

pytestmark = pytest.mark.gpu

POLICIES = [{"policy": "resident"}, {"policy": "superpipeline", "k_prime": 1}, {"policy": "superpipeline", "k_prime": 1, "batch": False}]


@pytest.mark.parametrize("pin_gb", [None, 0], ids=["pinned", "staged"])
@pytest.mark.parametrize("policy", POLICIES, ids=["resident", "batch", "sequential"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inference(policy, dtype, pin_gb):
    module = Network(9, dtype).requires_grad_(False)
    reference = copy.deepcopy(module).cuda()
    with tessera.offload(module, gigabytes(module, 3.5), device="cuda", pin_gb=pin_gb, **policy) as handle, torch.inference_mode():
        for batch in (1, 4, 2, 2, 2):
            x = torch.randn(batch, 50, 8, dtype=dtype, device="cuda")
            assert torch.equal(module(x), reference(x))
        report = handle.report()
    assert report["peak_bytes"] <= gigabytes(module, 3.5) * GB
    assert report["misses"] == 0 and report["copied_bytes"] > 0
    assert untouched(module) and all(not tensor.is_cuda for tensor in module.state_dict().values())
    for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, other.cpu())


@pytest.mark.parametrize("policy", POLICIES, ids=["resident", "batch", "sequential"])
def test_training(policy):
    module = Network(7)
    reference = copy.deepcopy(module).cuda()
    with tessera.offload(module, gigabytes(module, 3), device="cuda", **policy):
        optimizers = [torch.optim.SGD(network.parameters(), 1e-2) for network in (module, reference)]
        for _ in range(3):
            x = torch.randn(2, 20, 8, device="cuda")
            for network in (module, reference):
                network(x).square().mean().backward()
            for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
                assert torch.equal(mine.grad.cpu(), other.grad.cpu())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(list(module.parameters()), [parameter.cpu() for parameter in reference.parameters()], rtol=1e-6, atol=1e-7)


def test_a_module_that_is_on_the_gpu():
    module = Network(8).cuda().requires_grad_(False)
    reference = copy.deepcopy(module)
    x = torch.randn(1, 20, 8, device="cuda")
    with tessera.offload(module, gigabytes(module, 3), device="cuda"), torch.no_grad():
        assert torch.equal(module(x), reference(x))
    assert all(parameter.is_cuda for parameter in module.parameters())
    assert torch.equal(module(x), reference(x))


def test_quantized_subclasses():
    module = Network(8).requires_grad_(False)
    reference = copy.deepcopy(module)
    quantize(module)
    for plain, quantized in zip(reference.parameters(), module.parameters(), strict=True):
        plain.copy_(quantized * 1)  # a plain tensor of the same values
    reference.cuda()
    x = torch.randn(1, 20, 8, device="cuda")
    with tessera.offload(module, gigabytes(module, 3), device="cuda"), torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x), reference(x))


def test_weights_from_a_file(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    whole = Network(8).requires_grad_(False)
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    with torch.device("meta"):
        module = Network(8)
    x = torch.randn(1, 20, 8, device="cuda")
    budget = gigabytes(whole, 3)
    whole.cuda()
    with tessera.offload(module, budget, device="cuda", weights=tmp_path / "weights.safetensors"), torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x), whole(x))


def test_memory_is_given_back_after_failures():
    module = Network(8).requires_grad_(False)
    x = torch.randn(1, 20, 8, device="cuda")

    def fail(block, args):
        raise torch.cuda.OutOfMemoryError("out of memory")

    gc.collect()
    before = torch.cuda.memory_allocated()
    for failing in range(8):
        hook = module.blocks[failing].up.register_forward_pre_hook(fail)
        with pytest.raises(torch.cuda.OutOfMemoryError), tessera.offload(module, gigabytes(module, 3), device="cuda"), torch.no_grad():
            module(x)
        hook.remove()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_slot_is_not_overwritten_before_its_last_reader():
    """Blocks that compute for long and copies that are quick: without the events the copy would win the race."""
    wide = nn.Sequential(*(nn.Sequential(nn.Linear(2048, 2048), nn.Tanh()) for _ in range(8))).requires_grad_(False)
    reference = copy.deepcopy(wide).cuda()
    x = torch.randn(1 << 16, 2048, device="cuda")
    with tessera.offload(wide, gigabytes(wide, 2), device="cuda") as handle, torch.no_grad():
        for _ in range(4):
            assert torch.equal(wide(x), reference(x))
        report = handle.report()
    assert report["hidden_seconds"] > 0.5 * report["copy_seconds"]
