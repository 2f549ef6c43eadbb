"""Whatever is done to a module inside an offload context gives what it gives without: bit for bit, inside, and after it is left."""

from __future__ import annotations

import copy

import pytest
import torch
from offload_models import (
    WIDTH,
    Arena,
    Layer,
    Network,
    add,
    assert_same,
    each,
    gigabytes,
    layers,
    noise,
    quantize,
    replace,
    same,
    set_data,
    state_of,
    untouched_tables,
)
from torch import nn
from torch.nn.utils import parametrize, prune

import tessera

# A budget with a resident block (of 7) beside streamed ones, some of which lie in a slot when the edit comes.
ROOM, BLOCKS = 4, 7


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as adapters put it around one."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self):
        self.base.weight.data += self.up.weight @ self.down.weight
        return self.base


def register(layer):
    layer.register_parameter("weight", nn.Parameter(layer.weight * 2, requires_grad=False))


def through_the_table(layer):
    layer._parameters["weight"] = nn.Parameter(layer.weight * 2)


def delete_and_add(layer):
    weight = layer.weight
    del layer.weight
    layer.weight = weight
    layer.weight.data.mul_(2)


def remove_bias(layer):
    layer.bias = None


def set_item(layer):
    layer.weight.data[0, :4] = 3


def fill_storage(layer):
    if layer.bias is not None:
        layer.bias.untyped_storage().fill_(0)


def numpy(layer):
    layer.weight.detach().numpy()[:] *= 2


def swap(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight * 2))


def resize(layer):
    layer.weight.set_((layer.weight * 2).contiguous())


def tie(layer):
    """Two layers of a block become one."""
    if layer.in_features == layer.out_features // 4:
        layer.weight.data = (layer.weight * 2).t().contiguous().t()


def load(assign):
    def edit(module):
        state = {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in module.state_dict().items()}
        module.load_state_dict(state, assign=assign)

    return edit


def load_one_block(module):
    module.blocks[1].load_state_dict(copy.deepcopy(module.blocks[4].state_dict()), assign=True)


def with_held(edit):
    """An edit through parameters that were taken before the context."""

    def prepare(module):
        held = list(module.parameters())
        return lambda module: edit(held)

    prepare.prepares = True
    return prepare


@torch.no_grad()
def held_data(held):
    for parameter in held:
        parameter.data.add_(noise(parameter))


@torch.no_grad()
def held_in_place(held):
    for parameter in held:
        parameter.add_(noise(parameter))


def held_aliases(held):
    for alias in held:
        alias *= 2


def state_dict_alias(module):
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1.5)


def vector(module):
    parameters = list(module.parameters())
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters) * 1.5, parameters)


def optimizer(module):
    step = torch.optim.SGD(module.parameters(), 0.1)
    module(torch.ones(1, 2, 8)).square().mean().backward()
    step.step()
    step.zero_grad()


def old_optimizer(module):
    """As optimizers were written before torch.no_grad."""
    module(torch.ones(1, 2, 8)).square().mean().backward()
    for parameter in module.parameters():
        parameter.data.add_(parameter.grad.data, alpha=-0.1)
        parameter.grad = None


@torch.no_grad()
def average(module):
    """The averaged weights of a training go in."""
    other = copy.deepcopy(module)
    for mine, average in zip(module.parameters(), other.parameters(), strict=True):
        average.add_(noise(average))
        mine.lerp_(average, 0.5)


def adapt(module):
    torch.manual_seed(3)
    for block in module.blocks:
        block.up = Adapter(block.up)


def adapt_and_merge(module):
    adapt(module)
    module(torch.ones(1, 2, 8))
    with torch.no_grad():
        for block in module.blocks:
            block.up = block.up.merged()


def quantize_some(module):
    part = module.blocks[2]
    quantize(part)


def new_block(module):
    torch.manual_seed(4)
    module.blocks[2] = Layer()


def more_blocks(module):
    torch.manual_seed(4)
    module.blocks.append(Layer())


def fewer_blocks(module):
    module.blocks = module.blocks[:5]


def other_order(module):
    module.blocks = nn.ModuleList(list(module.blocks)[::-1])


def add_submodule(module):
    torch.manual_seed(4)
    for block in module.blocks:
        block.add_module("extra", nn.Linear(WIDTH, WIDTH))
        block.register_forward_hook(lambda block, args, out: block.extra(out))


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def parametrization(module):
    for block in module.blocks:
        parametrize.register_parametrization(block.up, "weight", Double())


def parametrization_and_back(module):
    parametrization(module)
    module(torch.ones(1, 2, 8))
    for block in module.blocks:
        parametrize.remove_parametrizations(block.up, "weight")


def weight_norm(module):
    for block in module.blocks:
        torch.nn.utils.parametrizations.weight_norm(block.up)


def spectral_norm(module):
    torch.manual_seed(5)
    for block in module.blocks:
        torch.nn.utils.parametrizations.spectral_norm(block.up)


def old_weight_norm(module):
    for block in module.blocks:
        torch.nn.utils.weight_norm(block.up)


def pruned(module):
    for block in module.blocks:
        prune.l1_unstructured(block.up, "weight", 0.3)


def buffers(module):
    for block in module.blocks:
        block.calls.add_(5)
        block.calls = block.calls + 1
        block.register_buffer("more", torch.ones(3))


def share(module):
    module.share_memory()
    each(add)(module)


def freeze(module):
    module.requires_grad_(False)
    each(add)(module)
    module.requires_grad_(True)


def init(module):
    torch.manual_seed(7)
    for layer in layers(module):
        layer.reset_parameters()


def prehook(module):
    """One block edits the next, while the module runs."""
    for block, following in zip(module.blocks, list(module.blocks)[1:], strict=False):

        def edit(block, args, following=following):
            following.up.weight.data.mul_(1.01)

        block.register_forward_pre_hook(edit)


def scale_weight(layer, args):
    layer.weight.data.mul_(1.01)


def own_hook(module):
    """A block edits itself as it runs."""
    for block in module.blocks:
        block.up.register_forward_pre_hook(scale_weight)


@torch.no_grad()
def own_copy(module):
    def edit(layer, args):
        with torch.no_grad():
            layer.weight.copy_(layer.weight / layer.weight.norm())
            layer.bias.data = layer.bias.data * 2

    for block in module.blocks:
        block.up.register_forward_pre_hook(edit)


EDITS = {
    "w.data += x": each(add),
    "w.data = x": each(set_data),
    "w.data[...] = x": each(set_item),
    "w.data.copy_": each(lambda layer: layer.weight.data.copy_(noise(layer.weight))),
    "w.add_": each(lambda layer: layer.weight.add_(1)),
    "w.copy_": each(lambda layer: layer.weight.copy_(noise(layer.weight))),
    "w.set_": each(resize),
    "w.detach().mul_": each(lambda layer: layer.weight.detach().mul_(2)),
    "numpy": each(numpy),
    "storage": each(fill_storage),
    "swap_tensors": each(swap),
    "other strides": each(tie),
    "Parameter replaced": each(replace),
    "register_parameter": each(register),
    "table": each(through_the_table),
    "deleted and set": each(delete_and_add),
    "bias removed": each(remove_bias),
    "load_state_dict": load(False),
    "load_state_dict(assign=True)": load(True),
    "load_state_dict of a block": load_one_block,
    "state_dict written to": state_dict_alias,
    "vector_to_parameters": vector,
    "optimizer": optimizer,
    "old optimizer": old_optimizer,
    "averaged weights": average,
    "reset_parameters": init,
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to(bfloat16) of a block": lambda module: module.blocks[1].to(torch.bfloat16).to(torch.float32),
    "half and back": lambda module: module.half().float(),
    "to(cpu)": lambda module: module.to("cpu"),
    "share_memory": share,
    "requires_grad_": freeze,
    "adapters": adapt,
    "adapters merged": adapt_and_merge,
    "quantized": quantize_some,
    "block replaced": new_block,
    "block added": more_blocks,
    "blocks removed": fewer_blocks,
    "order": other_order,
    "submodule": add_submodule,
    "parametrization": parametrization,
    "parametrization and back": parametrization_and_back,
    "weight_norm": weight_norm,
    "old weight_norm": old_weight_norm,
    "spectral_norm": spectral_norm,
    "buffers": buffers,
    "held: p.data.add_": with_held(held_data),
    "held: p.add_": with_held(held_in_place),
    "hook edits the next block": prehook,
    "hook edits its block": own_hook,
    "block edits itself": own_copy,
}


# Edits that are noticed each in another way.
FIRST = ("w.data += x", "w.data = x", "Parameter replaced", "load_state_dict(assign=True)", "half", "adapters merged", "block edits itself")


@pytest.mark.parametrize(
    ("name", "when"),
    [*((name, when) for name in EDITS for when in ("between runs", "and no run after")), *((name, "before the first run") for name in FIRST)],
)
def test_edits(name, when):
    torch.manual_seed(1)
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    edit = EDITS[name]
    edits = [edit(network) if hasattr(edit, "prepares") else edit for network in (module, reference)]
    x = torch.randn(2, 4, 8)
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()) as handle:
        assert 0 < len(handle.plan.resident) < BLOCKS
        if when != "before the first run":
            assert same(module, reference, x) and same(module, reference, x)
        for network, change in zip((module, reference), edits, strict=True):
            change(network)
        x = x.to(next(reference.parameters()).dtype)
        if when != "and no run after":
            for _ in range(3):
                assert same(module, reference, x)
            assert_same(state_of(module), state_of(reference))
    assert_same(state_of(module), state_of(reference))
    assert same(module, reference, x)
    assert_same(state_of(module), state_of(reference))


@pytest.mark.parametrize("run", [True, False], ids=["and run", "and leave"])
@pytest.mark.parametrize("take", [torch.Tensor.detach, lambda p: p.data, lambda p: p.detach().numpy()], ids=["detach", "data", "numpy"])
def test_memory_that_was_held_before(take, run):
    """What stays on the device lies elsewhere now: writing to its former memory is refused, at the next run where a version tells, and not lost."""
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    held = [[take(parameter) for parameter in network.parameters()] for network in (module, reference)]
    with (
        pytest.raises(RuntimeError, match=r"embed.weight was written to through a reference from before the offload context"),
        tessera.offload(module, gigabytes(module, ROOM), device=Arena()),
    ):
        assert same(module, reference, x)
        for aliases in held:
            held_aliases(aliases)
        if run:
            module(x)
            assert take is not torch.Tensor.detach  # it has been refused
    assert_same(list(module.named_parameters()), list(reference.named_parameters()))


def test_memory_that_was_held_before_follows_what_is_done_inside():
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    states = [network.state_dict() for network in (module, reference)]
    with tessera.offload(module, gigabytes(module, ROOM), device=Arena()):
        for edit in (each(add), optimizer):
            for network in (module, reference):
                edit(network)
            assert same(module, reference, x)
    assert_same(list(states[0].items()), list(states[1].items()))


def test_an_edit_beyond_the_budget_is_refused_and_not_lost():
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    with tessera.offload(module, gigabytes(module, 2.5), device=Arena()):
        for network in (module, reference):
            pruned(network)  # masks, which stay on the device
        with pytest.raises(ValueError, match=r"Network was edited inside the offload context and cannot go on there: budget_gb is .* too small"):
            module(x)
        assert same(module, reference, x)
    assert_same(state_of(module), state_of(reference))


def double_in_place(layer, args):
    layer.weight.mul_(2)


def test_an_in_place_edit_of_a_leaf_is_refused_as_torch_does():
    module = Network(BLOCKS)
    for network in (module, copy.deepcopy(module)):
        for block in network.blocks:
            block.up.register_forward_pre_hook(double_in_place)
        with pytest.raises(RuntimeError, match=r"leaf Variable that requires grad|requires a gradient and was written to in place"):
            if network is module:
                with tessera.offload(module, gigabytes(module, 2), device=Arena()):
                    module(torch.randn(1, 2, 8))
            else:
                network(torch.randn(1, 2, 8))
    assert untouched_tables(module)


def test_weights_of_a_file(tmp_path):
    """They have no values outside of their blocks: what writes to them there is refused; what replaces them is kept."""
    from safetensors.torch import save_file

    whole = Network(BLOCKS)
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    with torch.device("meta"):
        module = Network(BLOCKS)
    x = torch.randn(1, 4, 8)
    with tessera.offload(module, gigabytes(whole, ROOM), device=Arena(), weights=tmp_path / "weights.safetensors") as handle, torch.no_grad():
        assert torch.equal(module(x), whole(x))
        streamed = handle._units[handle.plan.streamed[0]].block.module
        for network in (module, whole):
            network.blocks[1].up.weight = nn.Parameter(torch.ones(4 * WIDTH, WIDTH))
            network.head.weight.data.mul_(2)
        assert torch.equal(module(x), whole(x)) and torch.equal(module(x), whole(x))
        hook = streamed.up.register_forward_pre_hook(scale_weight)
        with pytest.raises(RuntimeError, match=r"up.weight lies in a file and was written to while its block ran"):
            module(x)
        hook.remove()
        streamed.up.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"blocks.\d.up.weight lies in a file and was written to"):
            module(x)
    assert torch.equal(module.blocks[1].up.weight, whole.blocks[1].up.weight) and torch.equal(module.head.weight, whole.head.weight)
    assert module.embed.weight.is_meta
