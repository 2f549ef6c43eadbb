"""Small modules to offload, and what the tests ask of them. Needs torch alone: a bare GPU machine has no more."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tessera.models.offload import find_blocks
from tessera.models.offload.devices import CpuArena
from tessera.models.offload.planner import GB

WIDTH = 32


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.qkv = nn.Linear(width, 3 * width, bias=False, dtype=dtype)
        self.up, self.down = nn.Linear(width, 4 * width, dtype=dtype), nn.Linear(4 * width, width, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(width, dtype=dtype))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls.add_(1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v) * self.scale
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self, blocks: int = 7, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH, dtype=dtype)
        self.blocks = nn.ModuleList(Layer(dtype=dtype) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 8, dtype=dtype)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def gigabytes(module: nn.Module, blocks: float) -> float:
    """A budget with room for that many blocks and for what is outside of them."""
    sizes = [block.nbytes for block in find_blocks(module)]
    rest = sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()]) - sum(sizes)
    return (rest + 256 * 40 + blocks * (max(sizes) + 256 * 9)) / GB


def same_state(module: nn.Module, reference: nn.Module) -> bool:
    states = (module.state_dict(), reference.state_dict())
    return all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def untouched(module: nn.Module) -> bool:
    return not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Scaled(torch.Tensor):
    """A quantized weight as tensor subclass: int8 values with a scale for each row."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Scaled(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Scaled(args[0].values, args[0].scale)
        args = torch.utils._pytree.tree_map_only(Scaled, lambda x: x.values.to(x.scale.dtype) * x.scale, args)
        return function(*args, **(kwargs or {}))


def quantize(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            layer.weight = nn.Parameter(Scaled((layer.weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)


# ---- edits ----------------------------------------------------------------------------------------------------------------------------------


class Arena(CpuArena):
    def bandwidth(self, *, pinned):
        return 1e9  # not measured: it takes longer than all the rest


def noise(tensor):
    return 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())).to(tensor.dtype)


def layers(module):
    """Linear layers everywhere: in blocks that stay, in blocks that move, outside of them."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def each(edit):
    """An edit of every linear layer."""

    def edits(module):
        with torch.no_grad():
            for layer in layers(module):
                edit(layer)

    return edits


def add(layer):
    layer.weight.data += noise(layer.weight)


def set_data(layer):
    layer.weight.data = layer.weight.data + noise(layer.weight)


def replace(layer):
    layer.weight = nn.Parameter(layer.weight + noise(layer.weight))


def state_of(module):
    return [(name, tensor.clone()) for name, tensor in module.state_dict().items()]


def assert_same(mine, other):
    assert [name for name, _ in mine] == [name for name, _ in other]
    for (name, a), (_, b) in zip(mine, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def same(module, reference, x):
    with torch.no_grad():
        return torch.equal(module(x), reference(x))


def untouched_tables(module):
    return all(type(part._parameters) is dict and type(part._buffers) is dict for part in module.modules())


def assert_weights(module, reference):
    assert_same(list(module.named_parameters()), list(reference.named_parameters()))
