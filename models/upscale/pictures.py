"""Pictures of any size through an upscaling network: how large, in which patches, and what becomes of alpha."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from ..media.resize import resize
from .tiling import MapPatches, OnPatch, Operator, Progress, Tiling, overlapping, run_within_memory

NAMED = {"HD 1280 x 720": (1280, 720), "Full HD 1920 x 1080": (1920, 1080), "QHD 2560 x 1440": (2560, 1440), "4K UHD 3840 x 2160": (3840, 2160)}
NAMED |= {"8K UHD 7680 x 4320": (7680, 4320)}
MAX_PASSES = 3  # of the network; beyond it the rest is interpolated
SMALLEST_TILE = 64


def target_size(width: int, height: int, *, factor: float | None = None, megapixels: float | None = None, name: str | None = None) -> tuple[int, int]:
    """(width, height) to upscale to, aspect ratio kept: by a factor, to an area in millions of pixels, or as large as fits a named size.

    A portrait picture fits the named size turned on its side. Raises ValueError that names the input.
    """
    if name is not None:
        if name not in NAMED:
            raise ValueError(f"named size is {name!r}; use one of {', '.join(NAMED)}")
        long, short = NAMED[name]
        factor = min(long / max(width, height), short / min(width, height))
    elif megapixels is not None:
        if not 0 < megapixels <= 10_000:
            raise ValueError(f"megapixels is {megapixels:g}; use a number above 0, up to 10000")
        factor = sqrt(megapixels * 1e6 / (width * height))
    elif factor is None or not 0 < factor <= 64:
        raise ValueError(f"factor is {factor}; use a number above 0, up to 64")
    return max(round(width * factor), 1), max(round(height * factor), 1)


@dataclass(frozen=True)
class Network:
    """An upscaling network as `pictures` sees it.

    function: float32 `(1, 3, height, width)` in 0..1 -> the same, `scale` times as large. minimum, multiple: sides that it takes.
    """

    function: Operator
    scale: int
    minimum: int = 1
    multiple: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """The network on a patch of any size: padded to what it takes, cropped again."""
        height, width = x.shape[-2:]
        sides = [max(ceil(side / self.multiple) * self.multiple, ceil(self.minimum / self.multiple) * self.multiple) for side in (height, width)]
        out = self.function(_extended(x, sides[0] - height, sides[1] - width))
        return out[..., : height * self.scale, : width * self.scale].float()

    def map_patch(self, patch: Tensor) -> Tensor:
        """The same for one patch `(3, height, width)`."""
        return self(patch[None])[0]


def _extended(x: Tensor, bottom: int, right: int) -> Tensor:
    """Mirrored at the lower and right edge, as often as it takes."""
    for axis, more in ((-2, bottom), (-1, right)):
        while more > 0:
            side = x.shape[axis]
            part = min(more, side - 1) or 1
            mirrored = x.flip(axis).narrow(axis, 1 if side > 1 else 0, part)
            x, more = torch.cat([x, mirrored], axis), more - part
    return x


def passes(width: int, height: int, size: tuple[int, int], scale: int) -> int:
    """How often the network runs to reach `size`, after which the rest is interpolated (downwards wherever possible)."""
    count, reached = 0, 1.0
    needed = max(size[0] / width, size[1] / height)
    while scale > 1 and reached < needed and count < MAX_PASSES:
        count, reached = count + 1, reached * scale
    return count


def plan(height: int, width: int, tile: int, overlap: int) -> Tiling:
    """Patches of at most `tile` with `overlap`; the outer quarter of an overlap is not used, the rest is blended.

    There are as few as possible, and they are as small as that many can be: positions that are computed twice cost time and bring nothing.
    """
    tile = max(tile, 4)
    overlap = min(overlap, tile // 2)

    def fitting(side: int) -> int:
        count = max(ceil((side - overlap) / (tile - overlap)), 1)
        return min(max(ceil((side + (count - 1) * overlap) / count / 8) * 8, 2 * overlap), tile)

    return Tiling(tuple(overlapping(side, fitting(side), overlap, overlap // 4) for side in (height, width)))


def upscale(
    picture: Tensor,
    network: Network,
    size: tuple[int, int],
    *,
    tile: int = 256,
    overlap: int = 32,
    progress: Progress | None = None,
    on_patch: OnPatch | None = None,
    device: torch.device | None = None,
    map_patches: MapPatches | None = None,
) -> Tensor:
    """A picture `(channels, height, width)` in 0..1, channels 1 (grey), 3 or 4 (straight alpha), at `size` (width, height), float32.

    tile and overlap are in pixels of the network's input. Alpha is enlarged by interpolation and then follows the edges of the
    enlarged colours. `progress` belongs to the last pass. map_patches: does what `network.map_patch` does, elsewhere (`workers.py`).
    Raises ValueError for another number of channels, and where the network makes NaN or infinity.
    """
    if picture.shape[0] not in (1, 3, 4):
        raise ValueError(f"the picture has {picture.shape[0]} channels; use 1 (grey), 3 (RGB) or 4 (RGBA)")
    colour = picture[:3].float()
    if colour.shape[0] == 1:
        colour = colour.expand(3, -1, -1)
    count = passes(picture.shape[-1], picture.shape[-2], size, network.scale)
    for index in range(count):
        height, width = colour.shape[-2:]
        colour = run_within_memory(
            network.map_patch,
            colour,
            partial(plan, height, width, overlap=overlap),
            tile,
            smallest=SMALLEST_TILE,
            scale=(network.scale, network.scale),
            progress=progress if index == count - 1 else None,
            on_patch=on_patch,
            device=device,
            map_patches=map_patches,
        )
    if count and not colour.isfinite().all():  # saved, it would be black or white
        cause, values = ("the network makes of the picture", colour) if picture.isfinite().all() else ("the picture has", picture)
        found = "NaN (not a number)" if values.isnan().any() else "infinity"
        raise ValueError(f"{cause} {found} among its values; use another one")
    colour = resize(colour, size).clamp(0, 1)
    if picture.shape[0] == 1:
        return colour.mean(0, keepdim=True)
    if picture.shape[0] == 3:
        return colour
    return torch.cat([colour, guided_alpha(picture[3:].float(), picture[:3].float(), colour)])


def guided_alpha(alpha: Tensor, small: Tensor, large: Tensor, radius: int = 2, epsilon: float = 1e-5) -> Tensor:
    """Alpha `(1, height, width)` enlarged to the size of `large` with its edges: guided upsampling (He and Sun 2015, arXiv:1505.00996).

    small, large: the colours before and after. Alpha is taken as a linear function of luminance in every window of the small picture, and
    that function is applied to the large one. Where alpha is the same all over a window it stays exactly what it was.
    """
    size = (large.shape[-1], large.shape[-2])
    weights = torch.tensor([0.2126, 0.7152, 0.0722], device=alpha.device).view(3, 1, 1)
    guide, target = ((colour * weights).sum(0, keepdim=True)[None] for colour in (small, large))
    signal = alpha[None]

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)

    mean_guide, mean_signal = mean(guide), mean(signal)
    slope = (mean(guide * signal) - mean_guide * mean_signal) / ((mean(guide * guide) - mean_guide**2).clamp_min(0) + epsilon)
    offset = mean_signal - slope * mean_guide
    followed = resize(mean(slope)[0], size) * target[0] + resize(mean(offset)[0], size)
    spread = F.max_pool2d(signal, 2 * radius + 1, 1, radius) + F.max_pool2d(-signal, 2 * radius + 1, 1, radius)
    flat = F.interpolate((spread < 1e-6).float(), size=(size[1], size[0]), mode="nearest")[0] > 0
    return torch.where(flat, F.interpolate(signal, size=(size[1], size[0]), mode="nearest")[0], followed).clamp(0, 1)
