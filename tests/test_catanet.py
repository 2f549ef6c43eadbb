"""CATANet against a second derivation in float64 with plain loops, at every kind of size, dtype and mode."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tessera.models.upscale import catanet
from tessera.models.upscale.catanet import CATANet

WEIGHTS = "models/upscale/upscale_models"


def network(scale: int, **options) -> CATANet:
    """Random weights, large enough that each part matters in the output."""
    net = CATANet(scale, **options).eval()
    for block in net.blocks:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.2)
    return net


# ---------------------------------------------------------------- the paper's formulas, once more


def conv(x, weight, bias, groups=1):
    """Convolution with zeros around; x (channels, height, width)."""
    out_channels, in_group, side, _ = weight.shape
    _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    out = np.zeros((out_channels, height, width))
    per_group = out_channels // groups
    for o in range(out_channels):
        for i in range(in_group):
            for dy in range(side):
                for dx in range(side):
                    out[o] += weight[o, i, dy, dx] * padded[o // per_group * in_group + i, dy : dy + height, dx : dx + width]
        if bias is not None:
            out[o] += bias[o]
    return out


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def attention_of_one(query, keys, values):
    """One query (36,) over keys (n, 36) and values (n, 40), four heads."""
    out = np.zeros(40)
    for head in range(4):
        scores = keys[:, 9 * head : 9 * head + 9] @ query[9 * head : 9 * head + 9] / math.sqrt(9)
        share = np.exp(scores - scores.max())
        out[10 * head : 10 * head + 10] = share @ values[:, 10 * head : 10 * head + 10] / share.sum()
    return out


def feed_forward(tokens, height, width, p):
    """tokens (height * width, 40), raster order."""
    hidden = gelu(layer_norm(tokens, p["norm.weight"], p["norm.bias"]) @ p["fn.fc1.weight"].T + p["fn.fc1.bias"])
    image = hidden.T.reshape(-1, height, width)
    near = gelu(conv(image, p["fn.dwconv.depthwise_conv.0.weight"], p["fn.dwconv.depthwise_conv.0.bias"], groups=96))
    return (hidden + near.reshape(96, -1).T) @ p["fn.fc2.weight"].T + p["fn.fc2.bias"]


def under(p, prefix):
    return {key.removeprefix(prefix): value for key, value in p.items() if key.startswith(prefix)}


def token_aggregation(x, p, group):
    _, height, width = x.shape
    tokens = x.reshape(40, -1).T
    normed = layer_norm(tokens, p["norm.weight"], p["norm.bias"])
    n = len(normed)
    members: list[list[int]] = [[] for _ in p["means"]]
    for i, token in enumerate(normed):
        members[max(range(len(members)), key=lambda j: token @ p["means"][j] / np.linalg.norm(p["means"][j]))].append(i)
    order = [i for member in members for i in member]
    mirrored = order + order[::-1]  # what the last group lacks comes back from the end
    q, k, v = (normed @ p[f"iasa_attn.to_{name}.weight"].T for name in "qkv")
    centre_k, centre_v = (p["means"] @ p[f"irca_attn.to_{name}.weight"].T for name in "kv")
    size = min(n, group)
    groups = math.ceil(n / size)
    # Back from the end: (groups * size - n) tokens, then a whole group more, which is the second half of the last group's keys.
    line = order + order[n - (groups * size - n) - size :][::-1]
    assert line == mirrored[: len(line)]
    out = np.zeros((n, 40))
    for rank, i in enumerate(order):
        first = rank // size * size
        keys = line[first : first + 2 * size]
        out[i] = attention_of_one(q[i], k[keys], v[keys]) + attention_of_one(q[i], centre_k, centre_v)
    out = out @ p["iasa_attn.proj.weight"].T @ p["conv1x1.weight"][:, :, 0, 0].T
    tokens = tokens + out
    return (tokens + feed_forward(tokens, height, width, under(p, "mlp."))).T.reshape(x.shape)


def local_region(x, p, side):
    _, height, width = x.shape

    def starts(size):
        out = list(range(0, size - side, side - 2))
        return [*out, size - side]

    total, covers = np.zeros_like(x), np.zeros((height, width))
    a = under(p, "layer.0.")
    for top in starts(height):
        for left in starts(width):
            tokens = x[:, top : top + side, left : left + side].reshape(40, -1).T
            normed = layer_norm(tokens, a["norm.weight"], a["norm.bias"])
            q, k, v = (normed @ a[f"fn.to_{name}.weight"].T for name in "qkv")
            out = tokens + np.array([attention_of_one(one, k, v) for one in q]) @ a["fn.proj.weight"].T
            total[:, top : top + side, left : left + side] += out.T.reshape(40, side, side)
            covers[top : top + side, left : left + side] += 1
    tokens = (total / covers).reshape(40, -1).T
    return (tokens + feed_forward(tokens, height, width, under(p, "layer.1."))).T.reshape(x.shape)


def shuffle(x, factor):
    """Sub-pixel convolution's rearrangement."""
    channels, height, width = x.shape
    out = np.zeros((channels // factor**2, height * factor, width * factor))
    for dy in range(factor):
        for dx in range(factor):
            out[:, dy::factor, dx::factor] = x[dy * factor + dx :: factor**2]
    return out


def bilinear(x, factor):
    _, height, width = x.shape
    out = np.zeros((x.shape[0], height * factor, width * factor))
    for row in range(height * factor):
        for column in range(width * factor):
            y, z = max((row + 0.5) / factor - 0.5, 0), max((column + 0.5) / factor - 0.5, 0)
            top, left = int(y), int(z)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = x[:, top, left] * (1 - z + left) + x[:, top, right] * (z - left)
            lower = x[:, below, left] * (1 - z + left) + x[:, below, right] * (z - left)
            out[:, row, column] = upper * (1 - y + top) + lower * (y - top)
    return out


def rederived(state, x, scale):
    """The whole network; x (3, height, width), sides of 28 or more."""
    p = {key: value.double().numpy() for key, value in state.items()}
    shallow = conv(x, p["first_conv.weight"], p["first_conv.bias"])
    deep = shallow
    for i in range(8):
        inner = token_aggregation(deep, under(p, f"blocks.{i}.0."), [256, 128, 64, 32][i % 4])
        inner = local_region(inner, under(p, f"blocks.{i}.1."), [16, 20, 24, 28][i % 4])
        deep = deep + conv(inner, p[f"mid_convs.{i}.weight"], p[f"mid_convs.{i}.bias"])
    deep = deep + shallow
    for name in ("upconv1", "upconv2") if scale == 4 else ("upconv",):
        deep = shuffle(conv(deep, p[f"{name}.weight"], p[f"{name}.bias"]), 2 if scale == 4 else scale)
        deep = np.where(deep > 0, deep, 0.1 * deep)
    return conv(deep, p["last_conv.weight"], p["last_conv.bias"]) + bilinear(x, scale)


# 31 x 29: three windows of 16 pixels meet in one row.
@pytest.mark.parametrize(("scale", "height", "width"), [(2, 31, 29), (3, 28, 28), (4, 28, 28)])
def test_forward_equals_the_rederivation(scale, height, width):
    net = network(scale).double()
    x = torch.rand(1, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        out = net(x)[0].numpy()
    expected = rederived(net.state_dict(), x[0].numpy(), scale)
    assert np.abs(expected - bilinear(x[0].numpy(), scale)).max() > 0.3  # the network does something
    np.testing.assert_allclose(out, expected, atol=1e-10)


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize(("scale", "parameters", "tensors"), [(2, 477_435, 286), (3, 549_635, 286), (4, 535_195, 288)])
def test_published_layout(scale, parameters, tensors):
    net = CATANet(scale)
    assert sum(p.numel() for p in net.parameters()) == parameters
    state = net.state_dict()
    assert len(state) == tensors
    inner = [f"blocks.{i}.0.{name}" for i in range(8) for name in ("means", "initted", "norm.weight", "mlp.norm.bias", "mlp.fn.fc1.weight")]
    inner += [f"blocks.{i}.0.{name}" for i in range(8) for name in ("irca_attn.to_k.weight", "iasa_attn.to_q.weight", "conv1x1.weight")]
    inner += [f"blocks.{i}.1.layer.0.{name}" for i in range(8) for name in ("norm.weight", "fn.to_v.weight", "fn.proj.weight")]
    inner += [f"blocks.{i}.1.layer.1.fn.dwconv.depthwise_conv.0.bias" for i in range(8)]
    assert {*inner, "first_conv.weight", "mid_convs.7.bias", "last_conv.bias", "upconv1.weight" if scale == 4 else "upconv.weight"} <= set(state)
    assert catanet.build(state).upscale == scale


def test_refusals_name_the_cause():
    with pytest.raises(ValueError, match="upscale is 5"):
        CATANet(5)
    with pytest.raises(ValueError, match="tail"):
        catanet.build({"first_conv.weight": torch.zeros(40, 3, 3, 3)})
    for shape in ((3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32)):
        with pytest.raises(ValueError, match="none of them 0"):
            CATANet(2)(torch.zeros(shape))


def test_layer_classes_come_from_the_host():
    made = []

    class Operations:
        Linear = type(
            "Linear", (torch.nn.Linear,), {"__init__": lambda self, *a, **k: (made.append(self), torch.nn.Linear.__init__(self, *a, **k))[1]}
        )
        Conv2d = type("Conv2d", (torch.nn.Conv2d,), {})
        LayerNorm = type("LayerNorm", (torch.nn.LayerNorm,), {})

    net = CATANet(2, operations=Operations)
    assert made
    for module in net.modules():
        if next(module.parameters(recurse=False), None) is not None:
            assert type(module) in (Operations.Linear, Operations.Conv2d, Operations.LayerNorm)


# ---------------------------------------------------------------- sizes


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 66), st.integers(1, 66), st.sampled_from(catanet.SCALES))
def test_any_size(height, width, scale):
    torch.manual_seed(0)
    x = torch.rand(1, 3, height, width)
    with torch.no_grad():
        out = network(scale)(x)
    assert out.shape == (1, 3, scale * height, scale * width)
    assert out.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(17, 23), (1, 1), (28, 28), (29, 61), (2, 40)])
def test_small_pictures_are_mirrored_and_cropped(height, width):
    net = network(2)
    x = torch.rand(2, 3, height, width)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, max(0, 28 - height)), (0, max(0, 28 - width))), "reflect" if min(height, width) > 1 else "edge")
    with torch.no_grad():
        assert torch.equal(net(x), net(torch.from_numpy(padded))[..., : 2 * height, : 2 * width])


def test_windows_cover_every_pixel():
    for window in catanet.WINDOW:
        for size in range(28, 160):
            rows = catanet.window_rows(size, window, torch.device("cpu"))
            assert set(rows.flatten().tolist()) == set(range(size))
            gaps = rows[1:, 0] - rows[:-1, 0]
            assert ((gaps > 0) & (gaps <= window - 2)).all()


def test_windows_alone_keep_a_constant():
    """With what the layers add switched off, cutting into windows and averaging is the identity, also where three windows meet."""
    block = catanet.LocalRegionAttention(16, torch.nn)
    for name, parameter in block.named_parameters():
        if "proj" in name or "fc2" in name:
            torch.nn.init.zeros_(parameter)
    x = torch.rand(1, 40, 31, 45)
    torch.testing.assert_close(block(x), x, atol=1e-6, rtol=0)


def test_pictures_of_a_batch_do_not_mix():
    net = network(2)
    x = torch.rand(3, 3, 30, 34)
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.cat([net(one[None]) for one in x]), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- modes and dtypes


def test_centres_are_frozen_in_evaluation():
    net = network(2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        first = net(torch.rand(1, 3, 32, 32))
        net(torch.rand(1, 3, 40, 40) * 5)
        for block in net.blocks:
            block[0].initted.fill_(True)
        assert torch.equal(net(torch.zeros(1, 3, 32, 32)), net(torch.zeros(1, 3, 32, 32)))
    assert first.isfinite().all()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items() if not key.endswith("initted"))


def test_training_moves_the_centres_as_in_the_paper():
    """One block: k-means from the stored centres, then an exponential moving average towards the result."""
    block = catanet.TokenAggregationBlock(16, 256, num_iterations=3, ema_decay=0.9, operations=torch.nn).double().train()
    block.initted.fill_(True)
    before = block.means.clone().numpy()
    x = torch.randn(2, 40, 20, 30, dtype=torch.float64)
    block(x)
    tokens = layer_norm(x.flatten(2).transpose(1, 2).reshape(-1, 40).numpy(), 1, 0)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    centres = before
    for _ in range(3):
        centres = centres / np.linalg.norm(centres, axis=-1, keepdims=True)
        nearest = (tokens @ centres.T).argmax(-1)
        sums = [tokens[nearest == j].sum(0) if (nearest == j).any() else centres[j] for j in range(16)]
        centres = np.array([total / np.linalg.norm(total) for total in sums])
    np.testing.assert_allclose(block.means.numpy(), 0.9 * before + 0.1 * centres, atol=1e-12)


def test_the_first_batch_sets_the_centres_and_gradients_flow():
    net = CATANet(2, num_iterations=2).train()
    net(torch.rand(2, 3, 32, 32)).abs().mean().backward()
    for block in net.blocks:
        assert bool(block[0].initted)
        torch.testing.assert_close(block[0].means.norm(dim=-1), torch.ones(len(block[0].means)))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_centre_without_tokens_stays():
    tokens = torch.eye(40)[:1].expand(1, 50, 40)
    centres = torch.eye(40)[:2] * 3
    assert torch.equal(catanet.refine_centres(tokens, centres), torch.eye(40)[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Finite everywhere, near float32 for the trained weights, also for black pictures and strong contrast."""
    net = shipped(2)
    board = (torch.arange(30)[:, None] // 5 + torch.arange(28) // 5) % 2
    pictures = torch.stack([torch.zeros(3, 30, 28), board.expand(3, 30, 28).float(), torch.ones(3, 30, 28)])
    with torch.no_grad():
        expected = net(pictures)
        out = net.to(dtype)(pictures.to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert (out.float() - expected).abs().mean() < (0.002 if dtype == torch.float16 else 0.01)


def test_compiles_whole():
    net = network(2)
    net.blocks, net.mid_convs = net.blocks[:2], net.mid_convs[:2]  # the other six are these with other sizes
    x = torch.rand(1, 3, 33, 20)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), expected, atol=1e-5, rtol=0)


def test_never_waits_for_the_device():
    """On the meta device any look at a value raises: the forward pass needs shapes alone."""
    for scale in catanet.SCALES:
        assert CATANet(scale).eval().to("meta")(torch.empty(1, 3, 50, 17, device="meta")).shape == (1, 3, 50 * scale, 17 * scale)
    CATANet(2).train().to("meta")(torch.empty(1, 3, 50, 40, device="meta"))


# ---------------------------------------------------------------- our weights


def shipped(scale: int) -> CATANet:
    from conftest import ROOT

    return catanet.build(load_file(ROOT / WEIGHTS / f"tessera_catanet_x{scale}.safetensors"))


def test_weight_files(root):
    files = sorted((root / WEIGHTS).glob("*.safetensors"))
    assert [file.name for file in files] == ["tessera_catanet_x2.safetensors", "tessera_catanet_x4.safetensors"]
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["license"] == "Apache-2.0"
        assert {"title", "architecture", "dataset", "training"} <= set(metadata)


def test_eight_bits_where_the_scale_is_free():
    """A weight file holds the network that was trained: moving a power of two into a norm is exact, rounding costs little."""
    from tessera.training.upscale import train_catanet

    state = network(2).state_dict()
    small = train_catanet.compact(state)
    eight = [key for key, value in small.items() if value.dtype == torch.float8_e4m3fn]
    assert len(eight) == 8 * (2 + 3)
    assert sum(small[key].numel() for key in eight) == 97_280
    plain = dict(small)
    for key in eight:  # the power of two moved back
        norm = key.rpartition(".fn.")[0] + ".norm."
        plain |= {key: small[key].float() / 64} | {norm + name: small[norm + name].float() * 64 for name in ("weight", "bias")}
    x = torch.rand(1, 3, 40, 30)
    with torch.no_grad():
        assert torch.equal(catanet.build(small)(x), catanet.build(plain)(x))
    assert all((plain[key] - state[key]).abs().max() <= state[key].abs().max() / 16 for key in plain if state[key].is_floating_point())


@pytest.mark.parametrize("scale", [2, 4])
def test_one_colour_stays_one_colour(scale):
    colours = torch.tensor([(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (0.9, 0.9, 0.9), (0.1, 0.1, 0.1), (1, 0, 0), (0.1, 0.2, 0.8)])[:, :, None, None]
    with torch.no_grad():
        out = shipped(scale)(colours.expand(-1, -1, 40, 40)).clamp(0, 1) * 255
    assert ((out.amax((2, 3)) - out.amin((2, 3))) <= 2).all()
    assert ((out.mean((2, 3)) - colours[:, :, 0, 0] * 255).abs() <= 1).all()


@pytest.mark.parametrize("scale", [2, 4])
def test_weights_beat_bicubic_on_drawn_edges(scale):
    """No photograph is at hand here (README.md has those): discs and slanted bars that training never drew."""
    y, x = torch.meshgrid(torch.arange(768) / 768, torch.arange(768) / 768, indexing="ij")
    disc = ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.09).float()
    bars = (((x * 3 + y) * 3) % 1 < 0.5).float()
    large = torch.stack([0.2 + 0.6 * disc, 0.9 - 0.5 * bars, 0.3 + 0.3 * disc + 0.3 * bars])[None]
    high = torch.nn.functional.interpolate(large, (192, 192), mode="area")
    low = torch.nn.functional.interpolate(high, (192 // scale, 192 // scale), mode="bicubic", antialias=True)
    bicubic = torch.nn.functional.interpolate(low, (192, 192), mode="bicubic", antialias=True)
    with torch.no_grad():
        ours = shipped(scale)(low)
    inner = (..., slice(8, -8), slice(8, -8))
    assert 10 * torch.log10((bicubic - high)[inner].square().mean() / (ours - high)[inner].square().mean()) > 0.8
