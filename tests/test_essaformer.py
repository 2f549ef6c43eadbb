"""ESSAformer against a second derivation in float64, its patches, the command on real files, and checkpoints that want to run code."""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file, save_file
from test_catanet import shuffle

from tessera.__main__ import main
from tessera.cli import hyperspectral
from tessera.models.upscale import convert_essaformer, essaformer
from tessera.models.upscale.essaformer import ESSAformer, spectral_attention, super_resolve


def network(bands=3, dim=8, upscale=2) -> ESSAformer:
    """Random weights, large enough that each part matters in the output."""
    net = ESSAformer(bands, dim, upscale).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.8)
    return net


def convolutions_alone(net: ESSAformer) -> ESSAformer:
    """Queries without variation over the channels correlate with nothing: the attention reads its own value only."""
    for part in (net.blockup.convup, net.blockup.convdown):
        dim = part.attn.ln.in_features
        torch.nn.init.zeros_(part.attn.lnqkv.weight[:dim])
        torch.nn.init.zeros_(part.attn.lnqkv.bias[:dim])
    return net


def nearest(bands: int, upscale: int = 2) -> ESSAformer:
    """Weights that repeat each pixel: refinements and the way down contribute nothing, the three ways up are averaged."""
    dim = 4 * math.ceil(bands / 4)
    net = ESSAformer(bands, dim, upscale).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for band in range(bands):
            net.conv_first.weight[band, band, 1, 1] = 1
            net.conv_last.weight[band, band, 1, 1] = 1 / 3
            for stage in net.blockup.convupsample[::2]:
                stage.weight[4 * band : 4 * band + 4, band, 1, 1] = 1
    return net


def repeated(cube: np.ndarray, scale: int = 2) -> np.ndarray:
    return cube.repeat(scale, -2).repeat(scale, -1)


# ---------------------------------------------------------------- the paper's formulas, once more


def attention(q, k, v):
    """Every pair of pixels on its own: q, k, v (tokens, channels)."""
    n, channels = q.shape
    query = np.zeros_like(q)
    for i in range(n):
        deviation = [(q[i, c] - sum(q[i]) / channels) ** 2 for c in range(channels)]
        share = [d / (sum(deviation) + 1e-7) for d in deviation]
        query[i] = [s / math.sqrt(sum(t * t for t in share)) for s in share]
    share = np.zeros_like(k)
    for j in range(n):
        deviation = [(k[j, c] - sum(k[j]) / channels) ** 2 for c in range(channels)]
        share[j] = [d / (sum(deviation) + 1e-7) for d in deviation]
    out = v.copy()
    for i in range(n):
        for j in range(n):
            weight = sum(query[i, c] * share[j, c] / math.sqrt(sum(share[:, c] ** 2)) for c in range(channels))
            out[i] += weight * v[j] / math.sqrt(n)
    return out


def conv(x, p, name):
    """Convolution with zeros around; x (channels, height, width)."""
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    side, (height, width) = weight.shape[-1], x.shape[1:]
    padded = np.pad(x, ((0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    out = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for dy in range(side):
        for dx in range(side):
            out += np.tensordot(weight[:, :, dy, dx], padded[:, dy : dy + height, dx : dx + width], 1)
    return out


def refine(x, p, name, convs):
    tokens = x.reshape(len(x), -1).T
    normed = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    normed = normed * p[f"{name}.norm.weight"] + p[f"{name}.norm.bias"]
    projected = normed @ p[f"{name}.attn.lnqkv.weight"].T + p[f"{name}.attn.lnqkv.bias"]
    read = attention(*np.split(projected, 3, 1)) @ p[f"{name}.attn.ln.weight"].T + p[f"{name}.attn.ln.bias"]
    y = np.concatenate((read.T.reshape(x.shape), x))
    for index in (0, 3):
        y = conv(y, p, f"{name}.{convs}.{index}")
        y = np.where(y > 0, y, 0.2 * y)
    return x + conv(y, p, f"{name}.{convs}.6")


def unshuffle(x, factor):
    out = np.zeros((x.shape[0] * factor**2, x.shape[1] // factor, x.shape[2] // factor))
    for dy in range(factor):
        for dx in range(factor):
            out[dy * factor + dx :: factor**2] = x[:, dy::factor, dx::factor]
    return out


def rederived(state, x, scale):
    p = {key: value.double().numpy() for key, value in state.items()}
    factors = [3] if scale == 3 else [2] * round(math.log2(scale))

    def up(y):
        for index, factor in enumerate(factors):
            y = shuffle(conv(y, p, f"blockup.convupsample.{2 * index}"), factor)
        return y

    def down(y):
        for index, factor in enumerate(factors):
            y = unshuffle(conv(y, p, f"blockup.convdownsample.{2 * index}"), factor)
        return y

    low = conv(x, p, "conv_first")
    high = refine(up(low), p, "blockup.convup", "convu")
    low = refine(down(high) + low, p, "blockup.convdown", "convd")
    high = refine(up(low) + high, p, "blockup.convup", "convu")
    low = refine(down(high) + low, p, "blockup.convdown", "convd")
    high = refine(up(low) + high, p, "blockup.convup", "convu")
    return conv(high, p, "conv_last")


def test_attention_equals_the_sum_over_all_pairs():
    q, k, v = torch.randn(3, 2, 11, 6, dtype=torch.float64)
    q[0, 3] *= 1e-4  # nearly the same in every channel: the small numbers in the divisors matter
    k[0, 5] *= 1e-4
    out = spectral_attention(q, k, v)
    for index in range(2):
        np.testing.assert_allclose(out[index], attention(q[index].numpy(), k[index].numpy(), v[index].numpy()), atol=1e-12)


def test_spectra_without_variation_read_nothing():
    v = torch.randn(1, 9, 4)
    assert torch.equal(spectral_attention(torch.full((1, 9, 4), 3.0), torch.randn(1, 9, 4), v), v)
    assert torch.equal(spectral_attention(torch.randn(1, 9, 4), torch.full((1, 9, 4), 3.0), v), v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_attention(dtype):
    """Spectra whose squares half precision cannot hold, at both ends."""
    q, k, v = torch.randn(3, 1, 50, 16)
    q, k = q * 1000, k * 1e-3
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = spectral_attention(q, k, v)
    assert out.dtype == dtype
    expected = attention(*(x[0].double().numpy() for x in (q, k, v)))
    np.testing.assert_allclose(out[0].double(), expected, atol=0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.parametrize(("scale", "dim", "height", "width"), [(2, 8, 3, 4), (3, 9, 2, 3), (4, 8, 2, 2)])
def test_forward_equals_the_rederivation(scale, dim, height, width):
    net = network(5, dim, scale).double()
    x = torch.rand(1, 5, height, width, dtype=torch.float64)
    with torch.no_grad():
        out = net(x)[0].numpy()
        np.testing.assert_allclose(out, rederived(net.state_dict(), x[0].numpy(), scale), atol=1e-10)
        assert np.abs(out - convolutions_alone(net)(x)[0].numpy()).max() > 1e-3  # the attention does something


# ---------------------------------------------------------------- layout


# Counted on the published code.
@pytest.mark.parametrize(("bands", "dim", "parameters"), [(128, 256, 11_640_832), (3, 64, 695_651)])
def test_published_size(bands, dim, parameters):
    with torch.device("meta"):
        net = ESSAformer(bands, dim, 4)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_published_layout():
    expected = {"conv_first", "conv_last"}
    for name, convs in (("convup", "convu"), ("convdown", "convd")):
        expected |= {f"blockup.{name}.{part}" for part in (f"{convs}.0", f"{convs}.3", f"{convs}.6", "norm", "attn.lnqkv", "attn.ln")}
        expected |= {f"blockup.{name}sample.{index}" for index in (0, 2)}
    state = ESSAformer(7, 8, 4).state_dict()
    assert set(state) == {f"{name}.{kind}" for name in expected for kind in ("weight", "bias")}


@pytest.mark.parametrize(("bands", "dim", "scale"), [(1, 4, 2), (31, 9, 3), (5, 12, 4), (2, 4, 8)])
def test_build_reads_bands_width_and_scale_from_the_weights(bands, dim, scale):
    net = network(bands, dim, scale)
    built = essaformer.build({key: value.half() for key, value in net.state_dict().items()})
    assert (built.bands, built.upscale, built.conv_first.out_channels, built.training) == (bands, scale, dim, False)
    x = torch.rand(1, bands, 3, 4)
    torch.testing.assert_close(built(x), net(x), atol=0.05, rtol=0.01)


def test_refusals_name_the_cause():
    with pytest.raises(ValueError, match="upscale is 6"):
        ESSAformer(3, 8, 6)
    with pytest.raises(ValueError, match="dim is 8; x3 needs a multiple of 9"):
        ESSAformer(3, 8, 3)
    for shape in ((3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match="none of them 0"):
            network()(torch.zeros(shape))
    with pytest.raises(ValueError, match="conv_first"):
        essaformer.build({"a": torch.zeros(1)})
    state = network().state_dict()
    with pytest.raises(ValueError, match=r"extra is \(1,\) and should be absent"):
        essaformer.build({**state, "extra": torch.zeros(1)})
    del state["blockup.convup.norm.bias"]
    with pytest.raises(ValueError, match=r"norm.bias is missing and should be \(8,\)"):
        essaformer.build(state)


def test_layer_classes_come_from_the_host():
    class Operations:
        Linear = type("Linear", (torch.nn.Linear,), {})
        Conv2d = type("Conv2d", (torch.nn.Conv2d,), {})
        LayerNorm = type("LayerNorm", (torch.nn.LayerNorm,), {})

    for module in ESSAformer(3, 8, 2, operations=Operations).modules():
        if next(module.parameters(recurse=False), None) is not None:
            assert type(module) in (Operations.Linear, Operations.Conv2d, Operations.LayerNorm)


def test_gradients_are_those_of_finite_differences():
    q, k, v = torch.randn(3, 1, 5, 4, dtype=torch.float64).requires_grad_().unbind()
    assert torch.autograd.gradcheck(spectral_attention, (q, k, v))


def test_training_drops_channels_and_reaches_every_parameter():
    net, x = network().train(), torch.rand(2, 3, 6, 6)
    out = net(x)
    assert not torch.equal(out, net(x))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# ---------------------------------------------------------------- patches


def rows_of(x: torch.Tensor):
    """(bands, height, width) row by row."""
    return (x[:, y] for y in range(x.shape[1]))


def resolve(x, net, scale, **options):
    with torch.no_grad():
        return torch.stack(list(super_resolve(rows_of(x), net, scale, **options)), 1)


@pytest.mark.parametrize(("scale", "reach"), [(2, 9), (3, 26 / 3), (4, 11), (8, 11)])
def test_reach(scale, reach):
    """How far one pixel changes the result, the attention aside."""
    net = convolutions_alone(network(1, 9 if scale == 3 else 8, scale)).double()
    x = torch.rand(1, 1, 25, 1, dtype=torch.float64)
    y = x.clone()
    y[..., 12, 0] += 1
    with torch.no_grad():
        changed = (net(x) != net(y))[0, 0].any(-1).nonzero()
    assert changed.max().item() + 1 == pytest.approx((13 + reach) * scale)
    assert changed.min().item() == pytest.approx((12 - reach) * scale)
    assert reach <= essaformer.REACH


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(40, 37, 16, 8), (5, 61, 16, 6), (33, 8, 8, 3), (1, 1, 16, 8), (29, 29, 4, 32)])
def test_patches_of_a_local_network_leave_no_trace(height, width, tile, overlap):
    """Repeating pixels is local: blended patches must be the repeated picture, and a constant one constant."""
    for x in (torch.rand(3, height, width), torch.full((3, height, width), 0.7)):
        out = resolve(x, lambda patch: patch.repeat_interleave(2, -2).repeat_interleave(2, -1), 2, tile=tile, overlap=overlap)
        torch.testing.assert_close(out, torch.from_numpy(repeated(x.numpy())), atol=1e-6, rtol=0)


def test_convolutions_see_the_whole_cube_in_every_patch():
    net = convolutions_alone(network(3, 8, 2))
    x = torch.rand(3, 70, 83)
    with torch.no_grad():
        whole = net(x[None])[0]
    torch.testing.assert_close(resolve(x, net, 2, tile=48, overlap=30), whole, atol=2e-5, rtol=1e-5)
    assert (resolve(x, net, 2, tile=48, overlap=0) - whole).abs().max() > 1e-3  # without the overlap one would see it


def test_a_cube_of_one_patch_is_the_network_itself():
    net, x = network(), torch.rand(3, 20, 17)
    with torch.no_grad():
        assert torch.equal(resolve(x, net, 2, tile=20), net(x[None])[0])


def test_memory_does_not_grow_with_the_height():
    """No more than two strips are ever taken in advance of what has come out."""
    taken = 0

    def rows():
        nonlocal taken
        for _ in range(300):
            taken += 1
            yield torch.zeros(2, 5)

    for index, _ in enumerate(super_resolve(rows(), lambda patch: patch, 1, tile=16, overlap=6)):
        assert taken - index <= 32
    assert index == 299


def test_patches_that_do_not_fit_are_halved_and_stay_so():
    asked = []

    def small_only(patch):
        asked.append(max(patch.shape[-2:]))
        if asked[-1] > 40:
            raise MemoryError
        return patch.repeat_interleave(2, -2).repeat_interleave(2, -1)

    x, told = torch.rand(3, 200, 130), []
    out = resolve(x, small_only, 2, tile=64, overlap=16, steps_down=told)
    torch.testing.assert_close(out, torch.from_numpy(repeated(x.numpy())), atol=1e-6, rtol=0)
    assert sum(side > 40 for side in asked) == 1
    assert told == ["tile 64 did not fit in memory (MemoryError); 32 was used"]
    with pytest.raises(MemoryError):
        resolve(x, lambda patch: (_ for _ in ()).throw(MemoryError()), 2, tile=64)


# ---------------------------------------------------------------- the command


@pytest.fixture
def model(tmp_path):
    save_file(nearest(6).state_dict(), tmp_path / "nearest.safetensors")
    return tmp_path / "nearest.safetensors"


def command(*arguments) -> int:
    return main(["hyperspectral", *map(str, arguments)])


def cube_of(dtype, shape=(6, 21, 18)) -> np.ndarray:
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return np.random.default_rng(0).normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    cube = np.random.default_rng(0).integers(info.min, info.max, shape, endpoint=True).astype(dtype)
    cube.flat[:2] = info.min, info.max
    return cube


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i2", "f2", "f4", ">f4", "f8"])
def test_npy_keeps_dtype_and_values(tmp_path, model, dtype):
    cube = cube_of(dtype)
    np.save(tmp_path / "in.npy", cube)
    assert command(tmp_path / "in.npy", tmp_path / "out.npy", "--model", model, "--tile", 12, "--overlap", 6, "--device", "cpu") == 0
    out = np.load(tmp_path / "out.npy", allow_pickle=False)
    assert out.dtype == cube.dtype
    if cube.dtype.kind == "f":
        np.testing.assert_allclose(out, repeated(cube), rtol=2e-3 if dtype == "f2" else 1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(out, repeated(cube))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy", "nearest.safetensors", "out.npy"]


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_with_bands_last(tmp_path, model, order, capsys):
    cube = cube_of("u2", (21, 18, 6))
    np.save(tmp_path / "in.npy", np.asarray(cube, order=order))
    assert command(tmp_path / "in.npy", tmp_path / "out.npy", "--model", model) == 1
    assert "has 21 bands (bands-first) and the model takes 6; the other layout would fit: add --layout bands-last" in capsys.readouterr().err
    assert command(tmp_path / "in.npy", tmp_path / "out.npy", "--model", model, "--layout", "bands-last") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), cube.repeat(2, 0).repeat(2, 1))
    assert "6 bands, 18 x 21 uint16, bands-last; 0 to 65535 are 0 to 1" in capsys.readouterr().out


def test_the_network_sees_the_range(tmp_path, capsys):
    """With weights that are not linear the range matters: 0..largest by default, and what --range says."""
    net = network(4, 8, 2)
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    cube = np.random.default_rng(1).uniform(100, 3000, (4, 9, 8)).astype("f4")
    np.save(tmp_path / "in.npy", cube)
    for options, low, high in (([], 0, float(cube.max())), (["--range", -50, 10_000], -50, 10_000)):
        assert command(tmp_path / "in.npy", tmp_path / "out.npy", "--model", tmp_path / "m.safetensors", "--overwrite", *options) == 0
        with torch.no_grad():
            expected = net(torch.from_numpy((cube - low) / (high - low))[None].float())[0].numpy() * (high - low) + low
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-4, atol=0.05)


def test_integers_are_rounded_and_held_inside(tmp_path):
    net = nearest(4)
    with torch.no_grad():
        net.conv_last.weight.mul_(1.25)
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    cube = np.arange(256, dtype="u1").reshape(4, 8, 8)
    np.save(tmp_path / "in.npy", cube)
    assert command(tmp_path / "in.npy", tmp_path / "out.npy", "--model", tmp_path / "m.safetensors") == 0
    out, exact = np.load(tmp_path / "out.npy").astype(float), repeated(cube * 1.25)
    assert (np.abs(out - exact.clip(0, 255)) <= 0.5001).all()
    assert (out[exact > 255] == 255).all()


WRITTEN = {
    "planar": dict(photometric="minisblack", planarconfig="separate"),
    "pages": dict(photometric="minisblack"),
    "deflated": dict(photometric="minisblack", planarconfig="separate", compression="zlib", predictor=True),
    "big-endian": dict(photometric="minisblack", planarconfig="separate", byteorder=">"),
    "bigtiff": dict(photometric="minisblack", planarconfig="separate", bigtiff=True),
    "tiled": dict(photometric="minisblack", planarconfig="separate", tile=(16, 16)),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_tiff_bands_first(tmp_path, model, kind):
    cube = cube_of("u2")
    tifffile.imwrite(tmp_path / "in.tif", cube, **WRITTEN[kind])
    assert command(tmp_path / "in.tif", tmp_path / "out.tif", "--model", model) == 0
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert (len(file.pages), file.pages[0].samplesperpixel, file.series[0].axes) == (1, 6, "SYX")
        out = file.asarray()
    assert out.dtype == np.uint16
    np.testing.assert_array_equal(out, repeated(cube))


def test_tiff_says_itself_that_bands_are_last(tmp_path, model):
    cube = cube_of("f4", (21, 18, 6))
    tifffile.imwrite(tmp_path / "in.tiff", cube, photometric="minisblack", planarconfig="contig")
    assert command(tmp_path / "in.tiff", tmp_path / "out.tiff", "--model", model) == 0
    with tifffile.TiffFile(tmp_path / "out.tiff") as file:
        assert (file.series[0].axes, file.series[0].shape) == ("YXS", (42, 36, 6))
        np.testing.assert_allclose(file.asarray(), cube.repeat(2, 0).repeat(2, 1), atol=1e-5, rtol=1e-5)


def test_without_tifffile_npy_still_works(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    np.save(tmp_path / "in.npy", cube_of("u1"))
    (tmp_path / "in.tif").write_bytes(b"II*\0")
    assert command(tmp_path / "in.npy", tmp_path / "out.npy", "--model", model) == 0
    assert command(tmp_path / "in.tif", tmp_path / "out2.npy", "--model", model) == 1
    assert "pip install tifffile" in capsys.readouterr().err


def with_nan():
    cube = cube_of("f4")
    cube[2, 3, 4] = np.nan
    return cube


def with_infinity():
    cube = cube_of("f8")
    cube[5] = -np.inf
    return cube


@pytest.mark.parametrize(
    ("cube", "message"),
    [
        (lambda: cube_of("u2", (5, 9, 9)), "has 5 bands (bands-first) and the model takes 6; use a cube of those bands, or a model for these"),
        (with_nan, "1 NaN or infinite values at index 2 of the first axis"),
        (with_infinity, "378 NaN or infinite values at index 5"),
        (lambda: cube_of("u2", (9, 9)), "shape (9, 9); use three axes"),
        (lambda: cube_of("u2", (1, 6, 9, 9)), "use three axes"),
        (lambda: np.array([[[{}]]], dtype=object), "not a .npy file of plain numbers"),
        (lambda: np.zeros((6, 4, 4), complex), "the array holds complex128"),
        (lambda: np.zeros((6, 4, 4), "i8"), "the array holds int64"),
        (lambda: np.zeros((6, 4, 4), bool), "the array holds bool"),
        (lambda: np.zeros((6, 4, 4), "U3"), "the array holds <U3"),
        (lambda: np.zeros((6, 4, 4)), "the largest value is 0; give --range"),
        (lambda: np.zeros((6, 0, 4)), "in.npy"),
    ],
)
def test_refused_cubes(tmp_path, model, capsys, cube, message):
    np.save(tmp_path / "in.npy", cube(), allow_pickle=True)
    refused(tmp_path, capsys, message, tmp_path / "in.npy", tmp_path / "out.npy", "--model", model)


def test_a_model_that_makes_no_numbers(tmp_path, capsys):
    state = network(6).state_dict()
    state["conv_first.bias"][0] = 3e38  # finite, and too large for the sums behind it
    save_file(state, tmp_path / "large.safetensors")
    np.save(tmp_path / "in.npy", cube_of("u2"))
    assert command(tmp_path / "in.npy", tmp_path / "out.npy", "--model", tmp_path / "large.safetensors") == 1
    assert "large.safetensors: makes NaN (not a number) or infinity of" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.npy", "large.safetensors"]


def refused(folder, capsys, message, *arguments):
    """One message that names the cause, and no file written."""
    before = sorted(folder.iterdir())
    assert command(*arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert sorted(folder.iterdir()) == before


def test_refused_files_and_options(tmp_path, model, capsys):
    np.save(tmp_path / "in.npy", cube_of("u2"))
    good, out, with_model = tmp_path / "in.npy", tmp_path / "out.npy", ("--model", model)
    (tmp_path / "noise.npy").write_bytes(b"\x80\x04noise")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes(good.read_bytes()[:500])
    (tmp_path / "noise.tif").write_bytes(b"no picture")
    tifffile.imwrite(tmp_path / "grey.tif", cube_of("u2", (9, 9)))
    (tmp_path / "there.npy").write_bytes(b"kept")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    for message, *arguments in (
        ("gone.npy: no such file", tmp_path / "gone.npy", out, *with_model),
        ("there.npy: the output exists; choose another or add --overwrite", good, tmp_path / "there.npy", *with_model),
        ("input and output are one file", good, good, *with_model, "--overwrite"),
        ("no such folder", good, tmp_path / "nowhere" / "out.npy", *with_model),
        ("the output ends in .png", good, tmp_path / "out.png", *with_model),
        ("the input ends in .safetensors", model, out, *with_model),
        ("noise.npy: not a .npy file", tmp_path / "noise.npy", out, *with_model),
        ("empty.npy: not a .npy file", tmp_path / "empty.npy", out, *with_model),
        ("cut.npy: not a .npy file", tmp_path / "cut.npy", out, *with_model),
        ("noise.tif: not a TIFF that can be read", tmp_path / "noise.tif", out, *with_model),
        ("shape (9, 9); use three axes", tmp_path / "grey.tif", out, *with_model),
        ("--model is missing", good, out),
        ("gone.safetensors: no such file", good, out, "--model", tmp_path / "gone.safetensors"),
        ("in.npy: not a safetensors file", good, out, "--model", good),
        ("other.safetensors: these are not the weights of an ESSAformer", good, out, "--model", tmp_path / "other.safetensors"),
        ("--range is 5 5; give --range LOW HIGH", good, out, *with_model, "--range", 5, 5),
        ("--range is 0 nan", good, out, *with_model, "--range", 0, "nan"),
        ("tile is 0", good, out, *with_model, "--tile", 0),
    ):
        refused(tmp_path, capsys, message, *arguments)
    if not torch.cuda.is_available():
        refused(tmp_path, capsys, "torch sees no CUDA GPU", good, out, *with_model, "--device", "cuda")
    assert (tmp_path / "there.npy").read_bytes() == b"kept"


def test_a_full_disk_is_noticed_before(tmp_path, model, capsys, monkeypatch):
    np.save(tmp_path / "in.npy", cube_of("u2"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=6 * 42 * 36 * 2 - 1))
    refused(tmp_path, capsys, "are free on that disk", tmp_path / "in.npy", tmp_path / "out.npy", "--model", model)


def test_an_interrupted_run_leaves_the_old_file(tmp_path, model, monkeypatch):
    np.save(tmp_path / "in.npy", cube_of("u2"))
    (tmp_path / "out.npy").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    calls = []

    def stopped(self, x):
        calls.append(sorted(tmp_path.iterdir()))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return x.repeat_interleave(2, -2).repeat_interleave(2, -1)

    monkeypatch.setattr(ESSAformer, "forward", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(hyperspectral.lines(tmp_path / "in.npy", tmp_path / "out.npy", model, overwrite=True, tile=12, overlap=4))
    assert len(calls[1]) == len(before) + 1  # it was writing
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "out.npy").read_bytes() == b"old"


# ---------------------------------------------------------------- checkpoints


PUBLISHED = ("ESSA", "blockup", "Convup", "Convdown", "PatchEmbed", "PatchUnEmbed", "ESSAttn", "Upsample", "Downsample")


@pytest.fixture
def authors(monkeypatch):
    """The authors' module, as it was when they saved their network: the classes of their names, the layers of ours."""
    module = types.ModuleType("model.ESSA")
    bases = dict.fromkeys(PUBLISHED, torch.nn.Module) | dict.fromkeys(("Upsample", "Downsample"), torch.nn.Sequential)
    for name, base in bases.items():
        setattr(module, name, type(name, (base,), {"__module__": "model.ESSA"}))
    monkeypatch.setitem(sys.modules, "model", types.ModuleType("model"))
    monkeypatch.setitem(sys.modules, "model.ESSA", module)
    return module


def as_published(net: ESSAformer, authors) -> torch.nn.Module:
    for path, name in (
        ("", "ESSA"),
        ("blockup", "blockup"),
        ("blockup.convup", "Convup"),
        ("blockup.convdown", "Convdown"),
        ("blockup.convup.attn", "ESSAttn"),
        ("blockup.convdown.attn", "ESSAttn"),
        ("blockup.convupsample", "Upsample"),
        ("blockup.convdownsample", "Downsample"),
    ):
        net.get_submodule(path).__class__ = getattr(authors, name)
    for part in (net.blockup.convup, net.blockup.convdown):
        part.patch_embed, part.patch_unembed = authors.PatchEmbed(), authors.PatchUnEmbed()
        part.patch_unembed.in_chans = 3
    return net


@pytest.mark.parametrize(
    "wrap", [lambda net: {"epoch": 40, "model": net}, lambda net: {"epoch": 40, "model": torch.nn.DataParallel(net)}, lambda net: net]
)
def test_converts_a_pickled_network(tmp_path, authors, monkeypatch, capsys, wrap):
    net = network(4, 8, 4)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    torch.save(wrap(as_published(net, authors)), tmp_path / "x4.pth")
    for name in ("model.ESSA", "model"):
        monkeypatch.delitem(sys.modules, name)  # nobody but the authors has these classes
    assert command("--convert", tmp_path / "x4.pth", tmp_path / "x4.safetensors") == 0
    assert "ESSAformer x4, 4 bands" in capsys.readouterr().out
    converted = load_file(tmp_path / "x4.safetensors")
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x4.pth", "x4.safetensors"]


@pytest.mark.parametrize("wrap", [lambda state: {"model": state}, lambda state: state, lambda state: {f"module.{k}": v for k, v in state.items()}])
def test_converts_a_state_dict(tmp_path, wrap):
    state = network().state_dict()
    torch.save(wrap(state), tmp_path / "m.pth")
    read = convert_essaformer.read_checkpoint(tmp_path / "m.pth").state_dict()
    assert all(torch.equal(read[key], state[key]) for key in state)


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["model", "beside", "inside", "weights"])
def test_a_checkpoint_that_runs_code_is_refused(tmp_path, authors, capsys, place):
    marker = tmp_path / "marker"
    call = Calls(exec, f"open({str(marker)!r}, 'w').close()")
    net = as_published(network(), authors)
    checkpoint = {"epoch": 1, "model": net}
    if place == "model":
        checkpoint["model"] = call
    elif place == "beside":
        checkpoint["epoch"] = call
    elif place == "inside":
        net.note = call
    else:
        checkpoint["model"] = OrderedDict(net.state_dict(), note=call)
    torch.save(checkpoint, tmp_path / "bad.pth")
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert marker.exists()  # the file does what it is meant to do
    marker.unlink()
    refused(tmp_path, capsys, "asks for builtins.exec", "--convert", tmp_path / "bad.pth", tmp_path / "out.safetensors")


def test_a_class_of_a_right_name_is_not_imported(tmp_path, monkeypatch):
    """A module on the path whose import would already be an attack."""
    marker = tmp_path / "marker"
    (tmp_path / "hostile.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nclass ESSA:\n    def __setstate__(self, state):\n        raise SystemExit\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    hostile = importlib.import_module("hostile")
    torch.save({"model": hostile.ESSA()}, tmp_path / "bad.pth")
    marker.unlink()
    monkeypatch.delitem(sys.modules, "hostile")
    with pytest.raises(ValueError, match="not a checkpoint of an ESSAformer"):
        convert_essaformer.read_checkpoint(tmp_path / "bad.pth")
    assert not marker.exists()
    assert "hostile" not in sys.modules


def test_refused_checkpoints(tmp_path, capsys):
    (tmp_path / "noise.pth").write_bytes(b"\x80\x02noise")
    torch.save(network().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"model": Calls(torch.nn.Sequential, 1, 2)}, tmp_path / "call.pth")
    whole = tmp_path / "whole.pth"
    torch.save(network().state_dict(), whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    target = tmp_path / "out.safetensors"
    for name, message in (
        ("noise", "not a checkpoint of torch 1.6 or later"),
        ("old", "not a checkpoint of torch 1.6 or later"),
        ("cut", "not a checkpoint of torch 1.6 or later"),
        ("list", "list.pth holds no weights"),
        ("numbers", "numbers.pth holds no weights"),
        ("other", "these are not the weights of an ESSAformer"),
        ("call", "call.pth: not a checkpoint of torch"),
        ("gone", "gone.pth: no such file"),
    ):
        refused(tmp_path, capsys, message, "--convert", tmp_path / f"{name}.pth", target)
    refused(tmp_path, capsys, "the output ends in .npy; use .safetensors", "--convert", whole, tmp_path / "out.npy")
