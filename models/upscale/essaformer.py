"""ESSAformer: super-resolution of hyperspectral cubes, any number of bands (Zhang et al., ICCV 2023, arXiv 2307.14010).

One up- and one downsampling stage, each followed by attention over all pixels, are applied in turn with shared weights. The attention
weighs pixels by the correlation of their spectra; it is linear in the number of pixels, which is why it can run at the enlarged size. The
state-dict layout is that of the published code (github.com/Rexzhan/ESSAformer).

Features are (batch, channels, height, width); inside the attention they are tokens (batch, tokens, channels), tokens = height * width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import log2, prod, sqrt
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..weight_files import check_fit
from .tiling import Progress, Tiling, overlapping, run_within_memory, stream

EPSILON = 1e-7  # what the published code adds to the energy of a key's spectrum
REACH = 11  # input pixels that the convolutions see to each side: 9 at x2 and x3, 11 at every other scale; the attention sees everything
SMALLEST_TILE = 32


def spectral_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """v + phi(q) (psi(k)^T v) / sqrt(tokens), ESSA of the paper (section 3.3): spectral correlation, kernelized to first order.

    q, k, v: `(batch, tokens, channels)`, one floating dtype; so is the result. phi is the square of the spectrum without its mean, at unit
    length over the channels; psi is that square as shares of its sum, at unit length over the tokens. Computed in float32 at least:
    squares leave the range of half precision. Costs `2 * tokens * channels**2` multiply-adds, and no `tokens x tokens` matrix exists.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = ((x - x.mean(-1, keepdim=True)).square() for x in (q.to(wide), k.to(wide)))
    k = k / (k.sum(-1, keepdim=True) + EPSILON)
    # The unit length over the tokens is put on the small matrix. The shares of q cancel in its unit length, but for the smallest number that
    # the published code divides by: 1e-12, of shares.
    length = k.norm(dim=1).clamp_min(1e-12).unsqueeze(-1)
    context = (k.mT @ v.to(wide)) / (length * sqrt(v.shape[1]))
    return torch.baddbmm(v.to(wide), F.normalize(q, dim=-1, eps=1e-12 * EPSILON), context).to(v.dtype)


class SpectralAttention(nn.Module):
    """Spectral attention between projections; (batch, tokens, dim) in and out."""

    def __init__(self, dim: int, operations: Any) -> None:
        super().__init__()
        self.lnqkv = operations.Linear(dim, dim * 3)
        self.ln = operations.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(spectral_attention(*self.lnqkv(x).chunk(3, -1)))


class Refinement(nn.Module):
    """Attention over all pixels, merged with its input by convolutions; (batch, dim, height, width) in and out.

    name: of the convolutions in the published layout, where it differs between the two sizes.
    """

    def __init__(self, dim: int, name: str, operations: Any) -> None:
        super().__init__()
        self.name = name
        self.norm = operations.LayerNorm(dim)
        self.attn = SpectralAttention(dim, operations)
        self.drop = nn.Dropout2d(0.2)
        layers = [operations.Conv2d(dim * 2, dim * 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(0.2)]
        layers += [operations.Conv2d(dim * 2, dim * 2, 3, padding=1), nn.LeakyReLU(0.2), nn.Dropout2d(0.2)]
        self.add_module(name, nn.Sequential(*layers, operations.Conv2d(dim * 2, dim, 1)))

    def forward(self, x: Tensor) -> Tensor:
        read = self.attn(self.norm(x.flatten(2).mT)).mT.unflatten(-1, x.shape[-2:])
        return x + self.get_submodule(self.name)(torch.cat((self.drop(read), x), 1))


def _stages(upscale: int) -> list[int]:
    """Factors of the sub-pixel convolutions: 3, or as many 2 as it takes."""
    return [3] if upscale == 3 else [2] * round(log2(upscale))


class IterativeRefinement(nn.Module):
    """Up, down, up, down, up, each refined and added to the last result of its size; (batch, dim, h, w) -> (batch, dim, upscale * h, upscale * w)."""

    def __init__(self, dim: int, upscale: int, operations: Any) -> None:
        super().__init__()
        self.convup = Refinement(dim, "convu", operations)
        self.convdown = Refinement(dim, "convd", operations)
        up: list[nn.Module] = []
        down: list[nn.Module] = []
        for factor in _stages(upscale):
            up += [operations.Conv2d(dim, dim * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
            down += [operations.Conv2d(dim, dim // factor**2, 3, padding=1), nn.PixelUnshuffle(factor)]
        self.convupsample, self.convdownsample = nn.Sequential(*up), nn.Sequential(*down)

    def forward(self, small: Tensor) -> Tensor:
        large = self.convup(self.convupsample(small))
        for _ in range(2):
            small = self.convdown(self.convdownsample(large) + small)
            large = self.convup(self.convupsample(small) + large)
        return large


class ESSAformer(nn.Module):
    """Cubes (batch, bands, height, width) -> (batch, bands, upscale * height, upscale * width), any size from 1 x 1, not clamped.

    The published weights expect reflectance or radiance divided by the largest value of the scene. dim: channels inside; a multiple of 4, of 9
    for x3. operations: where Linear, Conv2d and LayerNorm come from; a host hands in its own to manage their memory.
    Raises ValueError for another scale than 3 and powers of two, for another dim, and for an input that is not a batch of non-empty cubes.
    """

    def __init__(self, bands: int, dim: int = 256, upscale: int = 4, *, operations: Any = torch.nn) -> None:
        super().__init__()
        if upscale != 3 and (upscale < 2 or upscale & (upscale - 1)):
            raise ValueError(f"ESSAformer: upscale is {upscale}; the architecture has 3 and powers of two")
        multiple = 9 if upscale == 3 else 4
        if dim < multiple or dim % multiple:
            raise ValueError(f"ESSAformer: dim is {dim}; x{upscale} needs a multiple of {multiple}")
        self.bands = bands
        self.upscale = upscale
        self.conv_first = operations.Conv2d(bands, dim, 3, padding=1)
        self.blockup = IterativeRefinement(dim, upscale, operations)
        self.conv_last = operations.Conv2d(dim, bands, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.bands or 0 in x.shape:
            raise ValueError(f"ESSAformer: the input has shape {tuple(x.shape)}; expected (batch, {self.bands}, height, width), none of them 0")
        return self.conv_last(self.blockup(self.conv_first(x)))


def build(state_dict: Mapping[str, Tensor], operations: Any = torch.nn) -> ESSAformer:
    """The network of a state dict in the published layout, in evaluation mode and float32; bands, dim and scale are those of the tensors.

    Raises ValueError that names the first tensor that does not fit.
    """
    first = state_dict.get("conv_first.weight")
    stages = [tensor for key, tensor in state_dict.items() if key.startswith("blockup.convupsample.") and key.endswith(".weight")]
    if first is None or first.ndim != 4 or 0 in first.shape or not stages or not all(stage.ndim for stage in stages):
        raise ValueError("these are not the weights of an ESSAformer: conv_first.weight or blockup.convupsample is missing")
    upscale = prod(round(sqrt(stage.shape[0] / first.shape[0])) for stage in stages)
    make = partial(ESSAformer, first.shape[1], first.shape[0], upscale)
    check_fit(state_dict, make, "an ESSAformer")
    network = make(operations=operations)
    network.load_state_dict(state_dict)
    return network.eval()


def super_resolve(
    rows: Iterable[Tensor],
    network: Callable[[Tensor], Tensor],
    upscale: int,
    *,
    tile: int = 128,
    overlap: int = 32,
    device: torch.device | None = None,
    steps_down: list[str] | None = None,
) -> Iterator[Tensor]:
    """A cube of any height, row by row: `(bands, width)` each, to rows `(bands, upscale * width)`, float32, on the rows' device.

    Holds at most two strips of `tile` rows, and the patches of one strip's width pass through `network`, (1, bands, h, w) -> (1, bands, upscale *
    h, upscale * w), one at a time. tile, overlap: input pixels; with an overlap of 30 or more the convolutions see in every patch what they see in
    the whole cube, and only the attention is the patch's own. A patch for which there is no memory is halved, then all
    further ones are; each time is told in `steps_down`.
    """
    overlap = min(overlap, tile // 2)
    margin = min(REACH, 3 * overlap // 8)
    steps_down = [] if steps_down is None else steps_down

    def tiling(height: int, width: int, tile: int) -> Tiling:
        shared = min(overlap, tile // 2)
        return Tiling(tuple(overlapping(side, tile, shared, min(margin, 3 * shared // 8)) for side in (height, width)))

    def strip(x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        progress = Progress(steps_down=steps_down)
        out = run_within_memory(
            lambda patch: network(patch[None])[0],
            x,
            lambda tile: tiling(x.shape[-2], x.shape[-1], tile),
            tile >> len(steps_down),
            smallest=SMALLEST_TILE,
            scale=(upscale, upscale),
            progress=progress,
            device=device,
        )
        return out.transpose(0, 1)

    return stream(strip, rows, tile, overlap, scale=upscale, margin=margin)
