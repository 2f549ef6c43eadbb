"""CATANet: image super-resolution by content-aware token aggregation (Liu et al., CVPR 2025, arXiv 2503.06896), x2, x3 and x4.

Eight blocks, each of them a token aggregation block (attention between pixels that look alike, wherever they are) and a local-region
self-attention (attention inside overlapping windows). The state-dict layout is that of the published weights, so those files load as they are.

Features are (batch, channels, height, width); inside the token aggregation block they are tokens (batch, tokens, channels), tokens = height * width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..weight_files import check_fit

# The architecture's constants (section 4.1 of the paper); the weights do not tell the last three.
DIM = 40
QK_DIM = 36
MLP_DIM = 96
HEADS = 4
NUM_TOKENS = (16, 32, 64, 128, 16, 32, 64, 128)  # centres of each block
GROUP_SIZE = (256, 128, 64, 32, 256, 128, 64, 32)  # tokens of a group of each block
WINDOW = (16, 20, 24, 28, 16, 20, 24, 28)  # side of the local windows of each block, pixels
WINDOW_OVERLAP = 2  # pixels

MIN_SIDE = max(WINDOW)  # a smaller picture would not fill one window of the fourth and eighth block
SCALES = (2, 3, 4)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim of q)) v: every attention of the network comes through here.

    q: `(batch, heads, q_len, qk_dim)`, k: `(batch, heads, k_len, qk_dim)`, v: `(batch, heads, k_len, v_dim)`, one floating dtype. Returns
    `(batch, heads, q_len, v_dim)`.
    """
    qk_dim, v_dim = q.shape[-1], v.shape[-1]
    # Zero channels leave the scores as they are. Unequal or odd widths (9 and 10 here) would keep torch from its fused kernels, which
    # need no memory for the score matrix: that matters more than speed, the 28-pixel windows of a 512 x 512 picture have 3.5 GB of scores.
    width = -(-max(qk_dim, v_dim) // 8) * 8
    q, k, v = F.pad(q, (0, width - qk_dim)), F.pad(k, (0, width - qk_dim)), F.pad(v, (0, width - v_dim))
    return F.scaled_dot_product_attention(q, k, v, scale=qk_dim**-0.5)[..., :v_dim]


def split_heads(x: Tensor) -> Tensor:
    """(batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim) -> (batch, tokens, heads * head_dim)."""
    return x.transpose(1, 2).flatten(-2)


def to_tokens(x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> (batch, height * width, channels)."""
    return x.flatten(2).transpose(1, 2)


def to_image(x: Tensor, height: int, width: int) -> Tensor:
    """(batch, height * width, channels) -> (batch, channels, height, width)."""
    return x.transpose(1, 2).unflatten(-1, (height, width))


class PreNorm(nn.Module):
    """fn(LayerNorm(x)), further arguments handed on."""

    def __init__(self, fn: nn.Module, operations: Any) -> None:
        super().__init__()
        self.norm = operations.LayerNorm(DIM)
        self.fn = fn

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.fn(self.norm(x), *args)


class DepthwiseConv(nn.Module):
    """GELU of a 5 x 5 convolution per channel; (batch, tokens, channels) in and out."""

    def __init__(self, channels: int, operations: Any) -> None:
        super().__init__()
        self.depthwise_conv = nn.Sequential(operations.Conv2d(channels, channels, 5, padding=2, groups=channels), nn.GELU())

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return to_tokens(self.depthwise_conv(to_image(x, height, width)))


class ConvFFN(nn.Module):
    """Feed-forward layer whose hidden channels see their neighbourhood; (batch, tokens, DIM) in and out."""

    def __init__(self, operations: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(DIM, MLP_DIM)
        self.dwconv = DepthwiseConv(MLP_DIM, operations)
        self.fc2 = operations.Linear(MLP_DIM, DIM)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x, height, width))


def nearest_centre(tokens: Tensor, centres: Tensor) -> Tensor:
    """Index of the centre with the largest cosine similarity to each token; tokens (batch, n, DIM), centres (m, DIM) -> int64 (batch, n)."""
    # A token's length scales all its similarities alike, so only centres are normalised. At least float32: half precision would confuse neighbours.
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return (tokens.to(dtype) @ F.normalize(centres.to(dtype), dim=-1).mT).argmax(-1)


def refine_centres(tokens: Tensor, centres: Tensor) -> Tensor:
    """One step of spherical k-means over the whole batch: the unit-length mean direction of each centre's tokens, differentiable in `tokens`.

    tokens (batch, n, DIM), centres (m, DIM) float32; returns (m, DIM) float32. A centre without tokens stays, at unit length.
    """
    directions = F.normalize(tokens.to(centres.dtype), dim=-1).flatten(0, 1)
    centres = F.normalize(centres, dim=-1)
    nearest = (directions.detach() @ centres.mT).argmax(-1)
    sums = torch.zeros_like(centres).index_add(0, nearest, directions)
    counts = torch.zeros_like(centres[:, 0]).index_add(0, nearest, torch.ones_like(directions[:, 0]))
    return torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), centres)


class InterGroupAttention(nn.Module):
    """Keys and values of the centres, which all tokens read (IRCA, inter-group cross-attention)."""

    def __init__(self, operations: Any) -> None:
        super().__init__()
        self.to_k = operations.Linear(DIM, QK_DIM, bias=False)
        self.to_v = operations.Linear(DIM, DIM, bias=False)

    def forward(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """(m, DIM) -> k (1, HEADS, m, QK_DIM / HEADS), v (1, HEADS, m, DIM / HEADS)."""
        return split_heads(self.to_k(centres)[None]), split_heads(self.to_v(centres)[None])


class IntraGroupAttention(nn.Module):
    """Attention inside groups of similar tokens (IASA, intra-group self-attention), plus what the tokens read from the centres."""

    def __init__(self, group_size: int, operations: Any) -> None:
        super().__init__()
        self.group_size = group_size
        self.to_q = operations.Linear(DIM, QK_DIM, bias=False)
        self.to_k = operations.Linear(DIM, QK_DIM, bias=False)
        self.to_v = operations.Linear(DIM, DIM, bias=False)
        self.proj = operations.Linear(DIM, DIM, bias=False)

    def forward(self, tokens: Tensor, centre: Tensor, centre_k: Tensor, centre_v: Tensor) -> Tensor:
        """tokens (batch, n, DIM), centre int64 (batch, n), centre_k and centre_v from `InterGroupAttention`; returns (batch, n, DIM)."""
        batch, n, _ = tokens.shape
        # Sorted by centre, each run of group_size tokens is a group. Stable: equal inputs give equal groups on every device.
        order = centre.argsort(dim=-1, stable=True) + torch.arange(batch, device=tokens.device)[:, None] * n
        order = order.flatten()
        ranked = tokens.flatten(0, 1).index_select(0, order).unflatten(0, (batch, n))
        q, k, v = self.to_q(ranked), self.to_k(ranked), self.to_v(ranked)

        size = min(n, self.group_size)
        groups = -(-n // size)
        missing = groups * size - n
        # The last group is filled up, and gets its second half of keys, by going back from the end. The published weights were trained so.
        grouped_q = torch.cat((q, q[:, n - missing :].flip(1)), 1).unflatten(1, (groups, size)).flatten(0, 1)
        grouped_k, grouped_v = (_with_next_group(torch.cat((x, x[:, n - missing - size :].flip(1)), 1), size) for x in (k, v))
        within = attend(split_heads(grouped_q), split_heads(grouped_k), split_heads(grouped_v))
        within = join_heads(within).unflatten(0, (batch, groups)).flatten(1, 2)[:, :n]

        across = join_heads(attend(split_heads(q), centre_k.expand(batch, -1, -1, -1), centre_v.expand(batch, -1, -1, -1)))
        out = (within + across).flatten(0, 1)
        return self.proj(torch.empty_like(out).index_copy(0, order, out).unflatten(0, (batch, n)))


def _with_next_group(x: Tensor, size: int) -> Tensor:
    """Each group of tokens followed by the next one: (batch, (groups + 1) * size, channels) -> (batch * groups, 2 * size, channels)."""
    groups = x.unflatten(1, (-1, size))
    return torch.cat((groups[:, :-1], groups[:, 1:]), 2).flatten(0, 1)


class TokenAggregationBlock(nn.Module):
    """TAB of the paper: tokens are grouped by their nearest centre, read their group and all centres, then pass a ConvFFN.

    The centres (`means`) are learned by averaging. In training mode each batch refines them by `num_iterations` k-means steps and moves the
    stored ones by an exponential moving average with `ema_decay`. In evaluation mode they are constants, and the output depends on nothing else.
    """

    means: Tensor
    initted: Tensor

    def __init__(self, num_tokens: int, group_size: int, num_iterations: int, ema_decay: float, operations: Any) -> None:
        super().__init__()
        self.num_iterations = num_iterations
        self.ema_decay = ema_decay
        self.norm = operations.LayerNorm(DIM)
        self.mlp = PreNorm(ConvFFN(operations), operations)
        self.irca_attn = InterGroupAttention(operations)
        self.iasa_attn = IntraGroupAttention(group_size, operations)
        self.register_buffer("means", torch.randn(num_tokens, DIM))
        # Whether `means` has seen a batch. Training alone uses it, and on the device: reading it on the host would wait for the GPU in each block.
        self.register_buffer("initted", torch.tensor(False))
        self.conv1x1 = operations.Conv2d(DIM, DIM, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = to_tokens(x)
        normed = self.norm(tokens)
        centres = self._train_centres(normed) if self.training else self.means.to(normed.dtype)
        k, v = self.irca_attn(centres)
        out = self.iasa_attn(normed, nearest_centre(normed.detach(), centres.detach()), k, v)
        tokens = tokens + to_tokens(self.conv1x1(to_image(out, height, width)))
        return to_image(tokens + self.mlp(tokens, height, width), height, width)

    def _train_centres(self, tokens: Tensor) -> Tensor:
        """This batch's centres (m, DIM), differentiable in the last step; moves the stored ones towards them."""
        with torch.no_grad():
            first = F.interpolate(tokens.mT, len(self.means), mode="area").mean(0).mT  # stretches of the raster scan, averaged
            centres = torch.where(self.initted, self.means, first)
            for _ in range(self.num_iterations - 1):
                centres = refine_centres(tokens, centres)
        centres = refine_centres(tokens, centres)
        with torch.no_grad():
            self.means.copy_(torch.where(self.initted, self.means.lerp(centres, 1 - self.ema_decay), centres))
            self.initted.fill_(True)
        return centres


class WindowAttention(nn.Module):
    """Multi-head self-attention of the tokens of each window; (batch, tokens, DIM) in and out."""

    def __init__(self, operations: Any) -> None:
        super().__init__()
        self.to_q = operations.Linear(DIM, QK_DIM, bias=False)
        self.to_k = operations.Linear(DIM, QK_DIM, bias=False)
        self.to_v = operations.Linear(DIM, DIM, bias=False)
        self.proj = operations.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(join_heads(attend(split_heads(self.to_q(x)), split_heads(self.to_k(x)), split_heads(self.to_v(x)))))


def window_rows(size: int, window: int, device: torch.device) -> Tensor:
    """Pixel indices of the windows along one axis, int64 (windows, window): steps of window - WINDOW_OVERLAP, the last one moved back to fit."""
    step = window - WINDOW_OVERLAP
    count = 1 + -(-(size - window) // step)
    starts = (torch.arange(count, device=device) * step).clamp(max=size - window)
    return starts[:, None] + torch.arange(window, device=device)


class LocalRegionAttention(nn.Module):
    """LRSA of the paper: self-attention in overlapping windows, averaged where they overlap, then a ConvFFN."""

    def __init__(self, window: int, operations: Any) -> None:
        super().__init__()
        self.window = window
        self.layer = nn.ModuleList([PreNorm(WindowAttention(operations), operations), PreNorm(ConvFFN(operations), operations)])

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        attention, ffn = self.layer
        rows, columns = window_rows(height, self.window, x.device), window_rows(width, self.window, x.device)
        # (batch, channels, height, width) -> (batch * windows, window * window, channels)
        pixels = x.permute(0, 2, 3, 1).index_select(1, rows.flatten()).index_select(2, columns.flatten())
        pixels = pixels.unflatten(2, columns.shape).unflatten(1, rows.shape).transpose(2, 3)
        windows = pixels.flatten(3, 4).flatten(0, 2)
        windows = windows + attention(windows)
        pixels = windows.reshape(pixels.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        merged = _overlap_mean(_overlap_mean(pixels, columns, width, 2), rows, height, 1)
        tokens = merged.flatten(1, 2)
        return to_image(tokens + ffn(tokens, height, width), height, width)


def _overlap_mean(x: Tensor, index: Tensor, size: int, dim: int) -> Tensor:
    """Mean of the window pixels that lie on each of `size` positions along `dim`; `index` from `window_rows`."""
    # The published code divides a pixel that three windows cover by four: a dim line where (side - window) mod (window - 2) is 1. This is the mean.
    covers = x.new_zeros(size).index_add(0, index.flatten(), x.new_ones(index.numel()))
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_add(dim, index.flatten(), x) / covers.view(-1, *[1] * (x.ndim - 1 - dim))


def reflect_pad(x: Tensor, min_side: int = MIN_SIDE) -> Tensor:
    """Pictures (batch, channels, height, width) mirrored at the bottom and right edge up to `min_side`, over and over for very small ones."""
    for dim in (-2, -1):
        size = x.shape[dim]
        if size < min_side:
            period = max(2 * (size - 1), 1)
            index = torch.arange(min_side, device=x.device) % period
            x = x.index_select(dim, torch.minimum(index, period - index) if size > 1 else index)
    return x


class CATANet(nn.Module):
    """Pictures (batch, in_chans, height, width) in [0, 1] -> (batch, in_chans, upscale * height, upscale * width), not clamped.

    Any size from 1 x 1; below MIN_SIDE a picture is mirrored up to it and the result cropped. Any floating dtype, that of the weights.
    operations: where Linear, Conv2d and LayerNorm come from; a host hands in its own to manage their memory.
    num_iterations, ema_decay: of the centres, in training mode only (5 and 0.999 in the paper).
    Raises ValueError for a scale that the architecture does not have, and for an input that is not a batch of non-empty pictures.
    """

    def __init__(self, upscale: int = 4, in_chans: int = 3, *, num_iterations: int = 5, ema_decay: float = 0.999, operations: Any = torch.nn) -> None:
        super().__init__()
        if upscale not in SCALES:
            raise ValueError(f"CATANet: upscale is {upscale}; the architecture has {SCALES}")
        self.upscale = upscale
        self.in_chans = in_chans
        self.first_conv = operations.Conv2d(in_chans, DIM, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [TokenAggregationBlock(num_tokens, group_size, num_iterations, ema_decay, operations), LocalRegionAttention(window, operations)]
            )
            for num_tokens, group_size, window in zip(NUM_TOKENS, GROUP_SIZE, WINDOW, strict=True)
        )
        self.mid_convs = nn.ModuleList(operations.Conv2d(DIM, DIM, 3, padding=1) for _ in self.blocks)
        if upscale == 4:
            self.upconv1 = operations.Conv2d(DIM, DIM * 4, 3, padding=1)
            self.upconv2 = operations.Conv2d(DIM, DIM * 4, 3, padding=1)
        else:
            self.upconv = operations.Conv2d(DIM, DIM * upscale**2, 3, padding=1)
        self.last_conv = operations.Conv2d(DIM, in_chans, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape:
            raise ValueError(f"CATANet: the input has shape {tuple(x.shape)}; expected (batch, {self.in_chans}, height, width), none of them 0")
        height, width = x.shape[-2:]
        x = reflect_pad(x)
        shallow = self.first_conv(x)
        deep = shallow
        for block, conv in zip(self.blocks, self.mid_convs, strict=True):
            residual = deep
            for part in block.children():
                deep = part(deep)
            deep = residual + conv(deep)
        deep = deep + shallow
        for conv in (self.upconv1, self.upconv2) if self.upscale == 4 else (self.upconv,):
            deep = F.leaky_relu(F.pixel_shuffle(conv(deep), 2 if self.upscale == 4 else self.upscale), 0.1)
        out = self.last_conv(deep) + F.interpolate(x, scale_factor=self.upscale, mode="bilinear", align_corners=False)
        return out[..., : height * self.upscale, : width * self.upscale]


def build(state_dict: Mapping[str, Tensor], operations: Any = torch.nn) -> CATANet:
    """The network of a state dict in the published layout, in evaluation mode and float32; the scale is that of the tail.

    Raises ValueError when the tail is none of CATANet's, and for the first key or shape that does not fit.
    """
    first, tail = state_dict.get("first_conv.weight"), state_dict.get("upconv.weight")
    if "upconv1.weight" in state_dict:
        upscale = 4
    else:
        upscale = 0 if tail is None or not tail.ndim else {DIM * scale**2: scale for scale in (2, 3)}.get(tail.shape[0], 0)
    if not upscale or first is None or first.ndim != 4:
        raise ValueError("CATANet: no first_conv, or an upsampling tail that is neither upconv (x2, x3) nor upconv1 and upconv2 (x4)")
    make = partial(CATANet, upscale, first.shape[1])
    check_fit(state_dict, make, "CATANet")
    network = make(operations=operations)
    network.load_state_dict(state_dict)
    return network.eval()
