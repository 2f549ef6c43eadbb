"""The Wan 2.1 video VAE and text-to-video transformer at toy size, in plain torch.

Module names give Wan's native state-dict layout (github.com/Wan-Video/Wan2.1, Apache-2.0), so the files load in any
Wan 2.1 loader. Video is (batch, channel, time, height, width). The VAE here runs on whole sequences (no frame cache);
that is the same function as the cached, chunk-by-chunk form used at inference elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Model = TypeVar("Model", bound=nn.Module)
Table = tuple[Tensor, Tensor]
"""cos and sin of the rotary angles."""

# Channel statistics of Wan 2.1 latents (Wan2.1 repository, wan/modules/vae.py, class WanVAE); samplers whiten with them.
WAN21_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
WAN21_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

VAE_CONFIG: dict[str, Any] = dict(dim=8, z_dim=16, mult=(1, 2, 4, 4), blocks=2, time_down=(False, True, True))
DIT_CONFIG: dict[str, Any] = dict(dim=192, heads=3, layers=6, ffn=576, channels=16, text_dim=64, freq_dim=256)


# ---------------------------------------------------------------- VAE


class CausalConv3d(nn.Conv3d):
    """3-D convolution padded with zeros in the past only: (B, C, T, H, W) -> (B, C', T, H, W)."""

    bias: Tensor

    def __init__(self, cin: int, cout: int, kernel: int = 3) -> None:
        super().__init__(cin, cout, kernel, padding=(0, kernel // 2, kernel // 2))
        self.past = kernel - 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.past, 0)) if self.past else x)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over channels; `dims` trailing broadcast dimensions in gamma."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-12).rsqrt() * self.gamma


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, plus a (1x1x1) shortcut."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(cin), nn.SiLU(), CausalConv3d(cin, cout), ChannelNorm(cout), nn.SiLU(), nn.Identity(), CausalConv3d(cout, cout)
        )
        self.shortcut = CausalConv3d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head attention inside each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = x.transpose(1, 2).reshape(b * t, c, h, w)
        q, k, v = self.to_qkv(self.norm(y)).reshape(b * t, 1, 3 * c, h * w).transpose(2, 3).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.transpose(2, 3).reshape(b * t, c, h, w))
        return x + y.reshape(b, t, c, h, w).transpose(1, 2)


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D module to each frame of (B, C, T, H, W)."""
    b, c, t, h, w = x.shape
    y = module(x.transpose(1, 2).reshape(b * t, c, h, w))
    return y.reshape(b, t, *y.shape[1:]).transpose(1, 2)


class TimeConv(nn.Conv3d):
    """Kernel 3 in time only; padding is left to the caller."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__(cin, cout, (3, 1, 1), stride=(stride, 1, 1))


class Down(nn.Module):
    """Halve height and width; with `time`, frames 1 + 2n -> 1 + n (the first frame is kept as is)."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if time:
            self.time_conv = TimeConv(channels, channels, 2)
        self.time = time

    def forward(self, x: Tensor) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x


class Up(nn.Module):
    """Double height and width, halve channels; with `time`, frames 1 + n -> 1 + 2n."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1))
        if time:
            self.time_conv = TimeConv(channels, channels * 2)
        self.time = time

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        if self.time and t > 1:
            y = self.time_conv(F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0)))
            y = y.reshape(b, 2, c, t - 1, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t - 2, h, w)
            x = torch.cat([x[:, :, :1], y], 2)
        return per_frame(self.resample, x)


class Encoder(nn.Module):
    """(B, 3, 1+4n, 8h, 8w) -> (B, 2 z_dim, 1+n, h, w)."""

    def __init__(self, dim: int, z_dim: int, mult: Sequence[int], blocks: int, time_down: Sequence[bool]) -> None:
        super().__init__()
        dims = [dim * m for m in (1, *mult)]
        self.conv1 = CausalConv3d(3, dims[0])
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(dims)):
            layers += [ResBlock(a if j == 0 else b, b) for j in range(blocks)]
            if i < len(mult) - 1:
                layers.append(Down(b, time_down[i]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = nn.Sequential(ResBlock(b, b), FrameAttention(b), ResBlock(b, b))
        self.head = nn.Sequential(ChannelNorm(b), nn.SiLU(), CausalConv3d(b, 2 * z_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    """(B, z_dim, 1+n, h, w) -> (B, 3, 1+4n, 8h, 8w)."""

    def __init__(self, dim: int, z_dim: int, mult: Sequence[int], blocks: int, time_down: Sequence[bool]) -> None:
        super().__init__()
        dims = [dim * m for m in (mult[-1], *mult[::-1])]
        self.conv1 = CausalConv3d(z_dim, dims[0])
        self.middle = nn.Sequential(ResBlock(dims[0], dims[0]), FrameAttention(dims[0]), ResBlock(dims[0], dims[0]))
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(dims)):
            a = a // 2 if i else a
            layers += [ResBlock(a if j == 0 else b, b) for j in range(blocks + 1)]
            if i < len(mult) - 1:
                layers.append(Up(b, time_down[::-1][i]))
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(ChannelNorm(b), nn.SiLU(), CausalConv3d(b, 3))

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(z))))


class WanVAE(nn.Module):
    """Video in [-1, 1] <-> latents with a factor 4 in time (first frame alone) and 8 in space."""

    def __init__(
        self, dim: int = 8, z_dim: int = 16, mult: Sequence[int] = (1, 2, 4, 4), blocks: int = 2, time_down: Sequence[bool] = (False, True, True)
    ) -> None:
        super().__init__()
        self.encoder = Encoder(dim, z_dim, mult, blocks, time_down)
        self.conv1 = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim, mult, blocks, time_down)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 1+4n, 8h, 8w) -> mean and log variance, each (B, z_dim, 1+n, h, w)."""
        return self.conv1(self.encoder(x)).chunk(2, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.moments(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.conv2(z))


def init_vae(model: WanVAE, seed: int = 0) -> WanVAE:
    """Random weights. Biases are random too: an RMS norm hides amplitude unless there is a constant to compare with."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                scale = 0.5 if "conv1" in name or "resample" in name else 0.1 if "residual" in name else 0.0
                p.copy_(torch.randn(p.shape, generator=g) * scale)
            else:
                gain = 0.2 if "residual.6" in name or "proj" in name else 1.4 if "residual.2" in name else 1.0
                p.copy_(torch.randn(p.shape, generator=g) * gain / p[0].numel() ** 0.5)
        for m in model.modules():  # time convolutions start as "copy the current frame"
            if isinstance(m, TimeConv):
                m.weight.mul_(0.1)
                for i in range(m.out_channels):
                    m.weight[i, i % m.in_channels, -1] += 1.0
        model.conv1.bias[model.conv2.in_channels :] = -4.0  # little posterior noise at first
    return model


def channels_last(model: Model) -> Model:
    """Store convolution weights channels-last (faster on CPU); values do not change."""
    for m in model.modules():
        if isinstance(m, nn.Conv3d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(m, nn.Conv2d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)
    return model


def fold_statistics(model: WanVAE, mean: Tensor, std: Tensor) -> WanVAE:
    """Rescale the two 1x1x1 latent convolutions so that latents with channel `mean`, `std` (16,) get Wan 2.1's statistics.

    decode(encode(x)) is unchanged in exact arithmetic.
    """
    target_mean, target_std = torch.tensor(WAN21_MEAN), torch.tensor(WAN21_STD)
    n, c1, c2 = len(mean), model.conv1, model.conv2
    gain = target_std / std
    with torch.no_grad():
        c1.weight[:n] *= gain[:, None, None, None, None]
        c1.bias[:n] = (c1.bias[:n] - mean) * gain + target_mean
        c1.bias[n:] += 2 * gain.log()
        c2.bias += (c2.weight[:, :, 0, 0, 0] * (mean - target_mean / gain)).sum(1)
        c2.weight /= gain[None, :, None, None, None]
    return model


def whiten(z: Tensor) -> Tensor:
    """Wan 2.1 latents (B, 16, T, H, W) -> the space the transformer works in."""
    shape = (1, -1, 1, 1, 1)
    return (z - z.new_tensor(WAN21_MEAN).view(shape)) / z.new_tensor(WAN21_STD).view(shape)


def unwhiten(z: Tensor) -> Tensor:
    shape = (1, -1, 1, 1, 1)
    return z * z.new_tensor(WAN21_STD).view(shape) + z.new_tensor(WAN21_MEAN).view(shape)


# ---------------------------------------------------------------- transformer


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): cosines then sines, base 10000."""
    half = dim // 2
    angle = t.float()[:, None] * torch.pow(10000.0, -torch.arange(half, device=t.device).float() / half)
    return torch.cat([angle.cos(), angle.sin()], 1)


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Rotary channels per axis (time, height, width)."""
    k = 2 * (head_dim // 6)
    return head_dim - 2 * k, k, k


def rotary_frequencies(n: int) -> Tensor:
    """(n/2,) rotation per position of each channel pair of one axis."""
    return torch.pow(10000.0, -torch.arange(0, n, 2, dtype=torch.float64) / n)


def rotary(grid: tuple[int, int, int], head_dim: int, device: torch.device | None = None) -> Table:
    """cos and sin, each (T*H*W, 1, head_dim/2), for tokens in raster order."""
    parts = []
    for size, n, axis in zip(grid, axis_sizes(head_dim), range(3), strict=True):
        a = torch.arange(size, dtype=torch.float64)[:, None] * rotary_frequencies(n)
        shape = [1, 1, 1, n // 2]
        shape[axis] = size
        parts.append(a.view(shape).expand(*grid, n // 2))
    angle = torch.cat(parts, -1).reshape(-1, 1, head_dim // 2)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of (B, L, heads, head_dim)."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class PlainAttention(torch.autograd.Function):
    """Softmax attention (B, heads, L, d) by plain matrix products: on CPU, twice as fast in training as the fused one."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        p = q @ k.mT
        p = (p if bias is None else p + bias.to(p.dtype)).softmax(-1)
        y = p @ v
        ctx.save_for_backward(q, k, v, p, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p, y = ctx.saved_tensors
        ds = (g @ v.mT).sub_((g * y).sum(-1, keepdim=True)).mul_(p)
        return (ds @ k) * q.shape[-1] ** -0.5, ds.mT @ q, p.mT @ g, None


plain_attention: Callable[..., Tensor] = PlainAttention.apply


class Attention(nn.Module):
    """Multi-head attention of x (B, L, dim) over itself or over `context`; q and k normed over the full dim."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def qk(self, x: Tensor, context: Tensor | None = None, table: Table | None = None) -> tuple[Tensor, Tensor]:
        """q and k as (B, heads, L, head_dim), rotated when a table is given."""
        context = x if context is None else context
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        k = self.norm_k(self.k(context)).unflatten(-1, (self.heads, -1))
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        return q.transpose(1, 2), k.transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor | None = None, table: Table | None = None, bias: Tensor | None = None) -> Tensor:
        """bias: `(B, 1, 1, keys)` added to the scores; no gradient goes to it."""
        q, k = self.qk(x, context, table)
        v = self.v(x if context is None else context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k = q.to(v.dtype), k.to(v.dtype)
        plain = v.device.type == "cpu" and torch.is_grad_enabled()
        y = plain_attention(q, k, v, bias) if plain else F.scaled_dot_product_attention(q, k, v, bias)
        return self.o(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Modulated self-attention, cross-attention, modulated feed-forward. x (B, L, dim), e (B, 6, dim)."""

    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.self_attn = Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, 1e-6)
        self.cross_attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor, context: Tensor, table: Table, bias: Tensor | None = None, context_bias: Tensor | None = None) -> Tensor:
        m = (self.modulation + e).chunk(6, 1)
        x = x + self.self_attn(self.norm1(x) * (1 + m[1]) + m[0], table=table, bias=bias) * m[2]
        x = x + self.cross_attn(self.norm3(x), context, bias=context_bias)
        return x + self.ffn(self.norm2(x) * (1 + m[4]) + m[3]) * m[5]


class Head(nn.Module):
    """(B, L, dim), e (B, dim) -> (B, L, 4 channels)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[:, None]).chunk(2, 1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanTransformer(nn.Module):
    """Velocity model: latents (B, 16, T, H, W), t in 0..1000 (B,), context (B, words, text_dim) -> (B, 16, T, H, W)."""

    blocks: Any  # a ModuleList of Block

    def __init__(
        self, dim: int = 192, heads: int = 3, layers: int = 6, ffn: int = 576, channels: int = 16, text_dim: int = 64, freq_dim: int = 256
    ) -> None:
        super().__init__()
        self.dim, self.freq_dim, self.channels, self.head_dim = dim, freq_dim, channels, dim // heads
        self.patch_embedding = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, heads, ffn) for _ in range(layers))
        self.head = Head(dim, 4 * channels)
        self._tables: dict[tuple[int | str, ...], Table] = {}

    def table(self, grid: tuple[int, int, int], device: torch.device) -> Table:
        key = (*grid, str(device))
        if key not in self._tables:
            self._tables[key] = rotary(grid, self.head_dim, device)
        return self._tables[key]

    def embed(self, x: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Table]:
        """Token stream (B, L, dim), time vector (B, dim), block modulation (B, 6, dim), context, rotary table."""
        _b, _, f, h, w = x.shape
        y = self.patch_embedding(x).flatten(2).transpose(1, 2)
        e = self.time_embedding(sinusoid(t, self.freq_dim))
        return y, e, self.time_projection(e).unflatten(1, (6, -1)), self.text_embedding(context), self.table((f, h // 2, w // 2), x.device)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        b, c, f, h, w = x.shape
        y, e, e6, context, table = self.embed(x, t, context)
        for block in self.blocks:
            y = block(y, e6, context, table)
        y = self.head(y, e).view(b, f, h // 2, w // 2, 1, 2, 2, c)
        return y.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, f, h, w)


def local_bias(head_dim: int, axes: Sequence[int], strength: float) -> Tensor:
    """Constant (head_dim,) for the q and k biases: after rotation q.k then falls with distance along `axes`.

    Uses the three fastest channel pairs of each axis (0 time, 1 height, 2 width).
    """
    out, start = torch.zeros(head_dim), 0
    for axis, n in enumerate(axis_sizes(head_dim)):
        if axis in axes:
            out[start : start + 6 : 2] = strength
        start += n
    return out


def init_transformer(model: WanTransformer, seed: int = 0) -> WanTransformer:
    """Random weights: zero head, open residual gates, and per-head attention that starts local in space, time or both."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.fill_(1.0)
            elif name.endswith("modulation"):
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
            elif name.endswith("bias"):
                p.zero_()
            else:
                s = p[0].numel() ** -0.5
                if name.startswith("head.head"):
                    s = 0.0
                elif name.startswith("time_projection"):
                    s *= 0.1
                elif ".o." in name or "ffn.2" in name:
                    s *= 0.3
                p.copy_(torch.randn(p.shape, generator=g) * s)
        for depth, block in enumerate(model.blocks):
            block.modulation[:, 2] += 0.5
            block.modulation[:, 5] += 0.5
            a, d = block.self_attn, model.head_dim
            kinds = ((0, 1, 2), (0,), (1, 2) if depth % 2 == 0 else ())
            for lin in (a.q, a.k):
                lin.bias.copy_(torch.cat([local_bias(d, kinds[h % 3], 2.5) for h in range(a.heads)]))
            a.norm_q.weight.fill_(1.3)
            a.norm_k.weight.fill_(1.3)
    return model


def build_vae(**over: Any) -> WanVAE:
    return WanVAE(**{**VAE_CONFIG, **over})


def build_transformer(**over: Any) -> WanTransformer:
    return WanTransformer(**{**DIT_CONFIG, **over})
