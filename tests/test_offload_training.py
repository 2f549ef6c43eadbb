"""Training of an offloaded module after edits, and in an order that has still to be learnt: bitwise as without offload."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from offload_models import Arena, Network, add, gigabytes, replace, set_data

import tessera

BLOCKS = 7


def trained(module, x):
    """The output of a training step, which adds to the gradients."""
    out = module(x)
    out.square().sum().backward()
    return out.detach().clone()


def gradients(module):
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()]


def assert_trained_the_same(mine, other):
    for a, b in zip(mine, other, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def half_and_back(layer):
    layer.half().float()


def load_assigned(layer):
    layer.load_state_dict({name: tensor * 1.5 for name, tensor in layer.state_dict().items()}, assign=True)


@pytest.mark.parametrize("between", ["", "n", "nn", "h"], ids=["train", "run and train", "two runs and train", "by a hook in a run, and train"])
@pytest.mark.parametrize("edit", [set_data, add, replace, half_and_back, load_assigned])
def test_training_after_an_edit_of_a_later_block(edit, between):
    """Seen before the forward begins: else the blocks before it would have run for a graph that is lost."""
    torch.manual_seed(6)
    module = Network(BLOCKS)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    results = []
    for network in (module, reference):
        with tessera.offload(module, gigabytes(module, 3), device=Arena()) if network is module else contextlib.nullcontext():
            outputs = [trained(network, x), trained(network, x)]
            layer = network.blocks[5].up
            with torch.no_grad():
                if between == "h":
                    hook = network.blocks[3].register_forward_hook(lambda *_, layer=layer: edit(layer))
                    outputs.append(network(x))
                    hook.remove()
                else:
                    edit(layer)
                outputs += [network(x) for _ in between.strip("h")]
            outputs += [trained(network, x) for _ in range(3)]
        results.append(outputs + gradients(network))
    assert_trained_the_same(*results)


class Ordered(Network):
    """Its blocks run in a given order, also more than once."""

    def __init__(self, order):
        super().__init__(max(order) + 1)
        self.order = order

    def forward(self, x):
        x = self.embed(x)
        for index in self.order:
            x = self.blocks[index](x)
        return self.head(x)


ORDERS = {"reversed twice": [*range(7, -1, -1)] * 2, "twice": [*range(8)] * 2, "zigzag": [3, 0, 3, 1, 5, 4, 7, 6, 2], "reversed": [*range(7, -1, -1)]}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("part", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("forwards", [1, 2], ids=["one graph", "two graphs"])
def test_training_in_an_order_that_is_learnt_while_a_graph_waits(order, part, forwards):
    torch.manual_seed(7)
    module = Ordered(order)
    reference = copy.deepcopy(module)
    x = torch.randn(2, 4, 8)
    for network in (module, reference):
        with tessera.offload(module, gigabytes(module, 8 * part), device=Arena()) if network is module else contextlib.nullcontext() as handle:
            for _ in range(3):
                sum(network(x).square().sum() for _ in range(forwards)).backward()
            if network is module:
                assert 0 < len(handle.plan.resident) < 8
    assert_trained_the_same(gradients(module), gradients(reference))
