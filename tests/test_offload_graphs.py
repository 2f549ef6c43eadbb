"""Layer offload and what else is done with a module: graphs, gradients, copies, threads, contexts in one another."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections import Counter

import pytest
import torch
from offload_models import (
    Arena,
    Layer,
    Network,
    Scaled,
    add,
    assert_same,
    assert_weights,
    each,
    gigabytes,
    layers,
    quantize,
    replace,
    same,
    set_data,
    state_of,
    untouched,
    untouched_tables,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import tessera

# A budget with a resident block (of 7) beside streamed ones, some of which lie in a slot when the edit comes.
ROOM, BLOCKS = 4, 7


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- memory and graphs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{}, {"policy": "superpipeline"}], ids=["resident", "superpipeline"])
def test_forwards_without_backward_hold_nothing(policy):
    """Autograd's graph of a forward goes when its output goes; nobody waits for the backward that never comes."""
    module = Network(BLOCKS)
    arena = Arena()
    seen = []
    for block in module.blocks:
        block.up.register_forward_hook(lambda layer, args, out: seen.extend(StorageWeakRef(each.untyped_storage()) for each in (*args, out)))
    with tessera.offload(module, gigabytes(module, ROOM), device=arena, **policy):
        held = []
        for _ in range(3):
            module(torch.randn(2, 4, 8))
            gc.collect()
            held.append((sum(not storage.expired() for storage in seen), arena.bytes))
        assert len(seen) == 3 * 2 * BLOCKS and held == [(0, held[0][1])] * 3
        assert module.blocks[2].up.weight.grad is None
    gc.collect()
    assert arena.bytes == 0


def test_gradients_of_several_forwards_in_one_backward():
    """One leaf adds up what all its uses give, in one order."""
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        x = torch.randn(3, 4, 8)
        for network in (module, reference):
            (network(x).square().mean() + network(2 * x).sin().mean() + network(x - 1).mean()).backward()
        for (name, mine), other in zip(module.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad), name


def test_autograd_grad_and_hooks_of_parameters():
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    seen = {}
    for name, network in (("mine", module), ("other", reference)):
        for index, parameter in enumerate(network.parameters()):
            parameter.register_hook(lambda gradient: gradient * 2)
            parameter.register_post_accumulate_grad_hook(lambda p, name=name, index=index: seen.setdefault(name, []).append(index))
    x = torch.randn(2, 4, 8, requires_grad=True)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        gradients = [torch.autograd.grad(network(x).square().mean(), [x, *network.parameters()]) for network in (module, reference)]
        for mine, other in zip(*gradients, strict=True):
            assert torch.equal(mine, other)
        for network in (module, reference):
            network(x).square().mean().backward()
        for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)
    assert seen["mine"] == seen["other"]


def test_a_backward_that_is_differentiated():
    """A gradient penalty: the second derivative is that of the module without offload."""
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        for step in range(2):
            for network in (module, reference):
                x = torch.ones(2, 4, 8, requires_grad=True)
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    (gradient,) = torch.autograd.grad(network(x).square().mean() * (step + 1), x, create_graph=True)
                    gradient.square().sum().backward()
            for (name, mine), other in zip(module.named_parameters(), reference.parameters(), strict=True):
                assert (mine.grad is None) == (other.grad is None), name
                assert mine.grad is None or torch.equal(mine.grad, other.grad), name


def test_a_second_backward_through_one_graph():
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        for network in (module, reference):
            loss = network(x).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
            with pytest.raises(RuntimeError, match="second time"):
                loss.backward()
        for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("edit", [None, each(add), each(replace)], ids=["no edit", "data", "replaced"])
def test_checkpointing(reentrant, edit):
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        for _ in range(3):
            for network in (module, reference):
                x = network.embed(torch.ones(2, 4, 8))
                for block in network.blocks:
                    x = checkpoint(block, x, use_reentrant=reentrant)
                network.head(x).square().mean().backward()
            for (name, mine), other in zip(module.named_parameters(), reference.parameters(), strict=True):
                assert torch.equal(mine.grad, other.grad), name
            for network in (module, reference):
                network.zero_grad()
                if edit is not None:
                    edit(network)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda module, x: torch.jit.trace(module, x), "trace the module outside of the offload context"),
        (lambda module, x: torch.func.vmap(module)(x[None]), "transforms of torch.func"),
        (lambda module, x: torch.func.grad(lambda x: module(x).sum())(x), "transforms of torch.func"),
    ],
    ids=["trace", "vmap", "grad"],
)
def test_what_cannot_go_through_a_block_is_refused(run, message):
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        with pytest.raises(RuntimeError, match=message):
            run(module, x)
        assert same(module, reference, x)
    assert_weights(module, reference)


def test_parameters_replaced_between_forward_and_backward():
    """The backward is that of the parameters of the forward."""
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        gradients = []
        for network in (module, reference):
            before = list(network.parameters())
            loss = network(torch.ones(2, 4, 8)).square().mean()
            each(replace)(network)
            gradients.append(torch.autograd.grad(loss, before))
        for mine, other in zip(*gradients, strict=True):
            assert torch.equal(mine, other)
        assert same(module, reference, torch.ones(2, 4, 8))
    assert_same(state_of(module), state_of(reference))


def test_functional_call():
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        gradients = []
        for network in (module, reference):
            doubled = {name: (parameter.detach() * 2).requires_grad_() for name, parameter in network.named_parameters()}
            out = torch.func.functional_call(network, doubled, (x,))
            gradients.append(torch.autograd.grad(out.square().mean(), list(doubled.values())))
        for mine, other in zip(*gradients, strict=True):
            assert torch.equal(mine, other)
        assert same(module, reference, x)


@pytest.mark.parametrize("edit", [each(lambda layer: layer.weight.mul_(2)), each(set_data)], ids=["in place", "data"])
def test_an_edit_between_forward_and_backward_is_refused(edit):
    module = Network(BLOCKS)
    with tessera.offload(module, gigabytes(module, 2), device=Arena()):
        loss = module(torch.randn(1, 2, 8)).sum()
        edit(module)
        with pytest.raises(RuntimeError, match=r"were changed between forward and backward|modified by an inplace operation"):
            loss.backward()
        module(torch.randn(1, 2, 8)).sum().backward()


# ---- copies ---------------------------------------------------------------------------------------------------------------------------


def copied(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copied, pickled, saved])
def test_copies_are_free_of_the_context(make):
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()) as handle:
        assert same(module, reference, x)
        other = make(module)
        assert untouched_tables(other)
        passes = handle.report()["passes"], handle.report()["copied_bytes"]
        assert same(other, reference, x) and (handle.report()["passes"], handle.report()["copied_bytes"]) == passes
        each(add)(other)
        assert same(module, reference, x)
    assert_weights(module, reference)
    each(add)(reference)
    assert same(other, reference, x)
    other(x).sum().backward()
    with tessera.offload(other, gigabytes(other, ROOM), device=Arena()):  # hooks of the first context do not count
        assert same(other, reference, x)


def test_a_state_dict_outlives_the_context(tmp_path):
    from safetensors.torch import load_file, save_file

    module = Network(BLOCKS)
    reference = state_of(module)
    x = torch.randn(2, 4, 8)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()), torch.no_grad():
        module(x)
        state = module.state_dict()
        save_file(state, tmp_path / "inside.safetensors")  # refuses tensors that share memory
        torch.save(module.head.state_dict(), tmp_path / "head.pt")
        reference = [(name, tensor.clone()) for name, tensor in state.items()]
        weights = [(name, tensor) for name, tensor in state.items() if "calls" not in name]  # which count on
        module(x)
    module(x)
    assert_same(weights, [(name, tensor) for name, tensor in reference if "calls" not in name])
    assert_same(sorted(load_file(tmp_path / "inside.safetensors").items()), sorted(reference))
    assert (tmp_path / "head.pt").stat().st_size < 4000
    save_file(module.state_dict(), tmp_path / "after.safetensors")


# ---- threads, contexts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_threads(backward):
    """Each run is right or refused by name; and whoever takes turns is right."""
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    inputs = [torch.randn(2, 4, 8) for _ in range(3)]
    with torch.no_grad():
        expected = [reference(x) for x in inputs]
    answers: Counter = Counter()
    turn = threading.Lock()

    def run(index, lock):
        for _ in range(15):
            try:
                with torch.set_grad_enabled(backward):
                    if lock is None:
                        out = module(inputs[index])
                        if backward:
                            out.sum().backward()
                    else:
                        with lock:
                            out = module(inputs[index])
            except RuntimeError as error:
                answers["refused" if "in one thread at a time" in str(error) else str(error)] += 1
            else:
                answers["right" if torch.equal(out, expected[index]) else "wrong"] += 1

    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        for lock in (None, turn):
            answers.clear()
            threads = [threading.Thread(target=run, args=(index, lock)) for index in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert set(answers) <= {"right", "refused"} and answers["right"], answers
        assert answers == {"right": 45}
        module.zero_grad()
        assert same(module, reference, inputs[0])
    assert_weights(module, reference)


def test_a_thread_is_refused_while_another_runs():
    module = Network(BLOCKS)
    inside, go = threading.Event(), threading.Event()
    x = torch.randn(1, 2, 8)

    def wait(block, args):
        inside.set()
        go.wait(30)

    errors = []
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()), torch.no_grad():
        expected = module(x)
        hook = module.blocks[2].up.register_forward_pre_hook(wait)
        outs = []
        thread = threading.Thread(target=lambda: outs.append(module(x)))
        thread.start()
        inside.wait(30)
        try:
            module(x)
        except RuntimeError as error:
            errors.append(str(error))
        go.set()
        thread.join()
        hook.remove()
        assert torch.equal(outs[0], expected) and torch.equal(module(x), expected)
    assert errors and "one thread at a time" in errors[0]


def test_a_module_is_offloaded_once_at_a_time():
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(1, 2, 8)
    handle = tessera.offload(module, gigabytes(module, ROOM), device=Arena())
    with handle:
        assert same(module, reference, x)
        with pytest.raises(RuntimeError, match="this handle is in use"):
            handle.__enter__()
        with pytest.raises(RuntimeError, match="Network is offloaded already; leave that context"):
            tessera.offload(module, gigabytes(module, ROOM), device=Arena()).__enter__()
        with pytest.raises(RuntimeError, match="is offloaded already"):
            tessera.offload(nn.Sequential(module, Network(2)), 1, device=Arena()).__enter__()
        with pytest.raises(RuntimeError, match="is offloaded already"):
            tessera.offload(module.blocks, 1, device=Arena()).__enter__()
        assert same(module, reference, x)
    assert untouched(module) and untouched_tables(module)
    with pytest.raises(ZeroDivisionError), handle:
        each(add)(module)
        each(add)(reference)
        assert same(module, reference, x)
        raise ZeroDivisionError
    assert untouched(module) and untouched_tables(module)
    module.double(), reference.double()  # between two contexts
    with tessera.offload(module, 2 * gigabytes(module, ROOM), device=Arena()):
        assert same(module, reference, x.double())
    assert_same(state_of(module), state_of(reference))


def test_entered_and_edited_in_inference_mode():
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(1, 2, 8)
    with torch.inference_mode(), tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        for edit in (None, each(add), each(lambda layer: layer.weight.mul_(2))):
            for network in (module, reference):
                if edit is not None:
                    edit(network)
            assert same(module, reference, x) and same(module, reference, x)
    for network in (module, reference):
        network(x).sum().backward()
    assert_weights(module, reference)
    for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def new_block(module):
    torch.manual_seed(4)
    module.blocks[2] = Layer()


def test_a_handle_entered_again_sees_what_was_edited_outside():
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(1, 2, 8)
    handle = tessera.offload(module, 4 * gigabytes(module, 2), device=Arena())
    for edit in (each(replace), each(set_data), new_block, lambda network: network.load_state_dict(copy.deepcopy(network.state_dict()), assign=True)):
        for network in (module, reference):
            edit(network)
        with handle:
            assert same(module, reference, x) and same(module, reference, x)
    assert_same(state_of(module), state_of(reference))


def test_nobody_who_looks_on_costs_a_copy():
    """Blocks that nobody reaches for are copied once a pass; those that somebody holds, or has read, again where they lay in a slot."""
    module = Network(BLOCKS).requires_grad_(False)
    x = torch.randn(1, 2, 8)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()) as handle, torch.no_grad():
        moved = sum(handle.nbytes[block] for block in handle.plan.streamed)
        slots = sum(handle.nbytes[block] for block in handle.plan.streamed[: handle.plan.slots])

        def copied():
            before = handle.report()["copied_bytes"]
            module(x)
            return handle.report()["copied_bytes"] - before

        copied()
        assert copied() == copied() == moved
        assert all(parameter.isfinite().all() for parameter in module.parameters())
        assert copied() == moved + slots and copied() == moved
        held = list(module.parameters())
        assert copied() == copied() == moved + slots
        del held
        state = module.state_dict()
        copied()
        assert copied() == moved + slots
        del state
        copied()
        assert copied() == moved


def test_a_wrapper_subclass_that_a_block_writes_to():
    """Quantized weights whose scales are calibrated as the block runs."""
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    for network in (module, reference):
        quantize(network)
        for layer in layers(network):
            assert isinstance(layer.weight, Scaled)
            layer.register_forward_pre_hook(_calibrate)
    x = torch.randn(1, 2, 8)
    with tessera.offload(module, gigabytes(module, 2.5), device=Arena()):
        assert same(module, reference, x) and same(module, reference, x)
    assert same(module, reference, x)


def _calibrate(layer, args):
    layer.weight.scale.mul_(1.5)


def test_tensors_of_several_types_in_one_memory():
    """Bytes from an odd place, words inside of them, and nothing at all."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            memory = torch.randint(0, 60, (40_000,), dtype=torch.uint8)
            self.bytes = nn.Parameter(memory[3:39_000], requires_grad=False)
            self.words = nn.Parameter(memory[4:36_004].view(torch.float32), requires_grad=False)
            self.nothing = nn.Parameter(torch.empty(0, 4))

        def forward(self, x):
            return x + self.bytes.float().mean() + self.words.double().sum().tanh().float() + self.nothing.sum()

    def make():  # a copy would not lie in one memory
        torch.manual_seed(1)
        return nn.Sequential(*(Packed() for _ in range(6)))

    module, reference = make(), make()
    x = torch.zeros(3)
    with tessera.offload(module, gigabytes(module, 2.5), device=Arena()) as handle:
        assert handle.plan.streamed and same(module, reference, x)
        for network in (module, reference):
            for part in network:
                part.words.data.mul_(0.5)
        assert same(module, reference, x)
    assert same(module, reference, x)
    assert_same(state_of(module), state_of(reference))
