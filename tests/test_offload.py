"""Layer offload on the CPU arena: bitwise the same as the module without it, within the budget, and nothing left behind.

The arena has real memory: what is evicted is poisoned with NaN and every live byte is counted, so a stale or leaked weight shows.
"""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_models import WIDTH, Layer, Network, Scaled, gigabytes, quantize, same_state, untouched
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import tessera
from tessera.models.offload import find_blocks
from tessera.models.offload.devices import CpuArena
from tessera.models.offload.planner import GB

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads do not help matrices of this size, and wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


POLICIES = st.one_of(
    st.just({"policy": "resident"}),
    st.builds(lambda exchange, batch: {"policy": "superpipeline", "k_prime": exchange, "batch": batch}, st.integers(1, 2), st.booleans()),
)


@given(
    blocks=st.integers(2, 9),
    room=st.floats(2, 10),
    policy=POLICIES,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
@settings(max_examples=40, deadline=None)
def test_inference_is_bitwise_and_within_budget(blocks, room, policy, dtype):
    module = Network(blocks, dtype)
    reference = copy.deepcopy(module)
    budget = gigabytes(module, room)
    with tessera.offload(module, budget, device="cpu", **policy) as handle, torch.inference_mode():
        for batch in (1, 3, 2):
            x = torch.randn(batch, 5, 8, dtype=dtype)
            assert torch.equal(module(x), reference(x))
        report = handle.report()
    assert report["peak_bytes"] <= budget * GB
    assert report["misses"] == 0
    assert (report["copied_bytes"] > 0) == (report["resident_blocks"] < blocks)
    assert same_state(module, reference) and untouched(module)
    del handle
    gc.collect()


@given(blocks=st.integers(2, 7), room=st.floats(2, 8), policy=POLICIES, recompute=st.booleans())
@settings(max_examples=25, deadline=None)
def test_training_is_bitwise_and_within_budget(blocks, room, policy, recompute):
    module = Network(blocks)
    reference = copy.deepcopy(module)
    budget = gigabytes(module, room)

    def loss(network, x):
        if not recompute:
            return network(x).square().mean()
        x = network.embed(x)
        for block in network.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return network.head(x).square().mean()

    with tessera.offload(module, budget, device="cpu", **policy) as handle:
        optimizers = [torch.optim.AdamW(network.parameters(), 1e-2) for network in (module, reference)]
        for step in range(3):
            for _ in range(1 + step % 2):  # gradients add up over two passes
                x = torch.randn(2, 5, 8)
                losses = [loss(network, x) for network in (module, reference)]
                assert torch.equal(*losses)
                for value in losses:
                    value.backward()
            for (name, mine), other in zip(module.named_parameters(), reference.parameters(), strict=True):
                assert mine.grad is not None and torch.equal(mine.grad, other.grad), name
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert handle.report()["peak_bytes"] <= budget * GB
        assert handle.report()["misses"] == 0
    assert same_state(module, reference) and untouched(module)


def test_memory_is_given_back():
    module = Network()
    arena = CpuArena()
    with tessera.offload(module, gigabytes(module, 3), device=arena) as handle:
        module(torch.randn(1, 4, 8)).sum().backward()
        held = arena.bytes
    assert held > 0
    del handle
    gc.collect()
    assert arena.bytes == 0


def test_evicted_weights_are_poisoned():
    """The test of the tests: a weight that is read after its block left is NaN."""
    module = Network(6)
    seen = {}
    handle = module.blocks[0].register_forward_hook(lambda block, args, out: seen.setdefault("weight", block.qkv.weight.data))
    with tessera.offload(module, gigabytes(module, 2), device="cpu"), torch.no_grad():
        handle.remove()
        hook = module.blocks[0].register_forward_pre_hook(lambda block, args: seen.setdefault("weight", block.qkv.weight.data))
        module(torch.randn(1, 4, 8))
        hook.remove()
        assert seen["weight"].isnan().all()


def test_tensor_subclasses():
    module = Network()
    quantize(module)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        expected = module(x)
        budget = gigabytes(module, 2)
        with tessera.offload(module, budget, device="cpu") as handle:
            assert torch.equal(module(x), expected) and torch.equal(module(x), expected)
            assert handle.report()["copied_bytes"] < 2 * sum(tensor.numel() for tensor in module.parameters()) * 2  # bytes of int8, not of float
        assert torch.equal(module(x), expected)
    assert isinstance(module.blocks[0].up.weight, Scaled)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_storage_types(dtype):
    """fp8, and bytes as packed 4-bit formats have them, cast at use."""

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter((torch.rand(WIDTH, WIDTH) * 3).to(dtype), requires_grad=False)

        def forward(self, x):
            return torch.tanh(x @ self.weight.to(x.dtype))

    module = nn.Sequential(*(Cast() for _ in range(6)))
    x = torch.randn(3, WIDTH)
    expected = module(x)
    with tessera.offload(module, gigabytes(module, 2.5), device="cpu"):
        assert torch.equal(module(x), expected) and torch.equal(module(x), expected)


def test_tied_weights_and_strides():
    module = Network()
    module.blocks[3].up.weight = module.blocks[1].up.weight  # the same parameter in two blocks
    module.blocks[2].down.weight.data = module.blocks[2].up.weight.data.T  # views of one memory inside a block
    module.blocks[4].qkv.weight.data = module.blocks[4].qkv.weight.data.T.contiguous().T  # column by column
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        expected = module(x)
        with tessera.offload(module, gigabytes(module, 3), device="cpu"):
            assert torch.equal(module(x), expected) and torch.equal(module(x), expected)
        assert torch.equal(module(x), expected)
    assert module.blocks[3].up.weight is module.blocks[1].up.weight
    assert module.blocks[2].down.weight.data_ptr() == module.blocks[2].up.weight.data_ptr()


def test_hooks_and_buffers_keep_working():
    module = Network()
    reference = copy.deepcopy(module)
    norms = {}
    for name, network in (("mine", module), ("reference", reference)):
        for block in network.blocks:
            block.register_forward_hook(lambda block, args, out, name=name: norms.setdefault(name, []).append(float(block.up.weight.detach().norm())))
    x = torch.randn(1, 4, 8)
    with tessera.offload(module, gigabytes(module, 2), device="cpu"), torch.no_grad():
        for _ in range(3):
            module(x), reference(x)
    assert norms["mine"] == norms["reference"]
    assert [int(block.calls) for block in module.blocks] == [3] * 7


def test_large_buffers_stream_and_what_is_written_to_them_is_kept():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(200, 100))

        def forward(self, x):
            self.table[0] += 1
            return x + self.table.mean(0)

    module = nn.Sequential(*(Memory() for _ in range(5)))
    reference = copy.deepcopy(module)
    x = torch.randn(2, 100)
    with tessera.offload(module, gigabytes(module, 2), device="cpu") as handle, torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x), reference(x))
        assert handle.report()["copied_bytes"] > 0
    assert same_state(module, reference)


def test_blocks_run_in_another_order():
    module = Network()
    forward = Network.forward

    def backwards(x):
        x = module.embed(x)
        for block in reversed(module.blocks):
            x = block(x)
        return module.head(x)

    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        expected = backwards(x)
        with tessera.offload(module, gigabytes(module, 2), device="cpu") as handle:
            assert torch.equal(backwards(x), expected)
            assert torch.equal(backwards(x), expected)
            learnt = handle.report()["misses"]
            assert torch.equal(backwards(x), expected) and handle.report()["misses"] == learnt
            assert torch.equal(module(x), forward(copy.deepcopy(module), x))  # and once more in the first order: slower, still right


@pytest.mark.parametrize("compiled", ["each block", "whole"])
def test_torch_compile(compiled):
    module = Network(4)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        expected = module(x)
        if compiled == "each block":
            for index, block in enumerate(module.blocks):
                module.blocks[index] = torch.compile(block, backend="aot_eager")
        with tessera.offload(module, gigabytes(module, 2), device="cpu") as handle:
            run = module if compiled == "each block" else torch.compile(module, backend="aot_eager")
            for _ in range(3):
                torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-6)
            assert handle.report()["copied_bytes"] > 0


def test_autocast():
    module = Network(5)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    with tessera.offload(module, gigabytes(module, 2), device="cpu"):
        for network in (module, reference):
            with torch.autocast("cpu", torch.bfloat16):
                network(x).float().square().sum().backward()
    for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_a_failed_or_interrupted_run_leaves_nothing():
    module = Network(6)
    reference = copy.deepcopy(module)
    x = torch.randn(1, 4, 8)
    with tessera.offload(module, gigabytes(module, 2), device="cpu") as handle, torch.no_grad():
        for failing in range(6):

            def fail(block, args):
                raise KeyboardInterrupt

            hook = module.blocks[failing].down.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                module(x)
            hook.remove()
            reference_out = copy.deepcopy(reference)(x)
            assert torch.equal(module(x), reference_out)
        assert handle.report()["peak_bytes"] <= gigabytes(module, 2) * GB
    assert untouched(module)
    for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_no_room_on_the_device_leaves_the_module_as_it_was():
    module = Network(6)
    reference = copy.deepcopy(module)

    class Full(CpuArena):
        def alloc(self, nbytes):
            if self.bytes > 40_000:
                raise MemoryError("no room")
            return super().alloc(nbytes)

    with pytest.raises(MemoryError):
        tessera.offload(module, gigabytes(module, 4), device=Full()).__enter__()
    assert same_state(module, reference) and untouched(module)


def test_soak_of_budgets_and_failures():
    """Two hundred runs with other budgets, some interrupted, some out of memory: no leak, no hook, right results."""
    module = Network(5)
    reference = copy.deepcopy(module)
    arena = CpuArena()
    generator = torch.Generator().manual_seed(7)
    alive = []
    for run in range(200):
        x = torch.randn(1, 4, 8)
        room = 2 + 5 * float(torch.rand((), generator=generator))
        stop = int(torch.randint(0, 12, (), generator=generator))
        try:
            with tessera.offload(module, gigabytes(module, room), device=arena) as handle, torch.no_grad():
                alive.append(weakref.ref(handle))
                if stop < 5:
                    hook = module.blocks[stop].down.register_forward_pre_hook(_interrupt if run % 2 else _out_of_memory)
                try:
                    out = module(x)
                finally:
                    if stop < 5:
                        hook.remove()
                assert torch.equal(out, copy.deepcopy(reference)(x))
        except (KeyboardInterrupt, torch.cuda.OutOfMemoryError):
            assert stop < 5
        else:
            assert stop >= 5
        del handle
        assert untouched(module)
    gc.collect()
    assert arena.bytes == 0
    assert not any(reference() for reference in alive)
    for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, other)


def _interrupt(block, args):
    raise KeyboardInterrupt


def _out_of_memory(block, args):
    raise torch.cuda.OutOfMemoryError("out of memory")


def test_weights_from_a_file(tmp_path):
    whole = Network()
    path = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), path)
    with torch.device("meta"):
        module = Network()
    x = torch.randn(1, 4, 8)
    with tessera.offload(module, gigabytes(whole, 2), device="cpu", weights=path) as handle, torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x), copy.deepcopy(whole)(x))
        assert handle.report()["peak_bytes"] <= gigabytes(whole, 2) * GB
    assert all(parameter.is_meta for parameter in module.parameters())


def test_bad_files(tmp_path):
    whole = Network()
    with torch.device("meta"):
        module = Network()
    path = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match=r"embed.weight is on the meta device.*weights="):
        tessera.offload(module, 1, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors does not exist"):
        tessera.offload(module, 1, device="cpu", weights=path)
    state = whole.state_dict()
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"weights\.safetensors: not a safetensors file, or damaged .*get a complete copy"):
        tessera.offload(module, 1, device="cpu", weights=path)
    path.write_bytes(b"no safetensors file at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        tessera.offload(module, 1, device="cpu", weights=path)
    save_file({name: tensor for name, tensor in state.items() if name != "head.bias"}, path)
    with pytest.raises(ValueError, match=r"has no head.bias \(1 of"):
        tessera.offload(module, 1, device="cpu", weights=path)
    save_file(state | {"head.bias": torch.zeros(9)}, path)
    with pytest.raises(ValueError, match=r"head.bias is torch.float32 \(9,\)"):
        tessera.offload(module, 1, device="cpu", weights=path)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (float("nan"), "not a number"),
        (float("inf"), "not a number"),
        ("8", "not a number"),
        (0, "too small for two blocks"),
        (-1, "too small for two blocks"),
        (1e-5, "too small for two blocks"),
        (1e9, "GB to give"),
    ],
)
def test_bad_budgets_name_the_smallest_workable_one(budget, message):
    module = Network()
    with pytest.raises(ValueError, match=message) as error:
        tessera.offload(module, budget, device="cpu")
    smallest = float(str(error.value).split("is ")[-1].removesuffix(" GB"))
    with tessera.offload(module, smallest, device="cpu"):
        module(torch.randn(1, 2, 8))


def test_other_bad_input():
    with pytest.raises(ValueError, match="no repeated blocks"):
        tessera.offload(nn.Linear(4, 4), 1, device="cpu")
    with pytest.raises(ValueError, match="policy is 'lru'; use one of"):
        tessera.offload(Network(), 1, device="cpu", policy="lru")
    with pytest.raises(ValueError, match="k' is 5 and k is 3"):
        tessera.offload(Network(), 1, device="cpu", policy="superpipeline", k=3, k_prime=5)
    with pytest.raises(ValueError, match="use a smaller k"):
        tessera.offload(Network(), gigabytes(Network(), 2), device="cpu", policy="superpipeline", k=4)
    with pytest.raises(ValueError, match="budget_gb is missing"):
        tessera.offload(Network(), device="cpu")
    with pytest.raises(ValueError, match="device is xpu"):
        tessera.offload(Network(), 1, device="xpu")


def test_backward_outside_the_context_is_refused():
    module = Network()
    with tessera.offload(module, gigabytes(module, 2), device="cpu"):
        out = module(torch.randn(1, 2, 8)).sum()
    with pytest.raises(RuntimeError, match="outside the offload context"):
        out.backward()


def test_the_gpu_benchmark_runs(tmp_path, run_python):
    """Its code, on a tiny model without a GPU: right outputs and peaks, whatever the times."""
    out = tmp_path / "result.json"
    run_python(str(ROOT / "bench" / "gpu_offload.py"), "--device", "cpu", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) > 6 and not any("error" in row for row in rows)


def test_blocks_are_found_by_structure():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.text = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
            self.double = nn.ModuleList(Layer() for _ in range(2))
            self.single = nn.ModuleList(Layer(16) for _ in range(3))

    assert [block.name for block in find_blocks(Two())] == ["double.0", "double.1", "single.0", "single.1", "single.2"]
    stages = nn.Sequential(nn.Conv2d(3, 3, 1), *(nn.Sequential(Layer(), Layer()) for _ in range(2)), nn.Conv2d(3, 3, 1))
    assert [block.name for block in find_blocks(stages)] == ["1", "2"]
    lists = nn.ModuleList(nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
    assert [block.name for block in find_blocks(lists)] == ["0.0", "0.1", "1.0", "1.1"]


def test_the_plan_follows_the_compute():
    """Compute and transfer in balance take a third slot; when the blocks get slower, two are enough again and another block can stay."""
    module = Network(24)
    cost = {"now": 0.0, "block": 1.0}

    class Clock(CpuArena):
        """Real memory, and time as the test says."""

        def record(self):
            return cost["now"]

        def bandwidth(self, *, pinned):
            return size / 1.25  # a copy takes 1.25 of the first second a block

    class Counting(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            cost["now"] += cost["block"]
            return self.block(x)

    module.blocks = nn.ModuleList(Counting(block) for block in module.blocks)
    size = find_blocks(module)[0].nbytes + 256 * 9
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = module(x)
        with tessera.offload(module, gigabytes(module, 24 * 0.2 + 2.2), device=Clock()) as handle:
            assert handle.plan.slots == 2
            for _ in range(3):
                assert torch.equal(module(x), expected)
            assert handle.plan.slots == 3
            predicted = handle.report()["predicted"]
            assert predicted["step_seconds"] == pytest.approx(predicted["bound_seconds"], rel=0.01)
            residents = len(handle.plan.resident)
            cost["block"] = 5.0  # a larger picture: transfers hide anyway
            for _ in range(3):
                assert torch.equal(module(x), expected)
            assert handle.plan.slots == 2 and len(handle.plan.resident) == residents + 1
            assert handle.report()["plans"] == 3
            cost["block"] = 1.0
            with torch.enable_grad():
                graph = module(x).sum()
            for _ in range(3):
                assert torch.equal(module(x), expected)
            assert handle.report()["plans"] == 3  # the graph comes back for the blocks that it saw
            graph.backward()
            for _ in range(3):
                assert torch.equal(module(x), expected)
            assert handle.plan.slots == 3
