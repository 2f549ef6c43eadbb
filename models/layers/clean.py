"""Pictures that a model generated become layers: alpha cleaned, named, ordered, cut to what is there.

Pictures are float32 `(height, width, 4)` in 0..1, sRGB with straight alpha, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import ImageColor
from torch import Tensor
from torch.nn import functional as F

from .document import Layer
from .layout import trimmed

OPAQUE = 0.95  # alpha from which a pixel's colour is taken for its own: of another colour below, at most a twentieth is mixed in
MERGED = "Merged"  # name of the merged picture, where it is kept

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Cleaning:
    """What is wrong with a picture's edges. The defaults change nothing.

    matte: the colour (0..1) over which it was composed before its alpha was added, or None. low, high: alpha up to low becomes 0 and from
    high on 1. specks: connected pixels fewer than this become transparent. bleed: how far colours reach outwards, in pixels.
    Raises ValueError.
    """

    matte: Colour | None = None
    low: float = 0.0
    high: float = 1.0
    specks: int = 0
    bleed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low is {self.low} and high is {self.high}; use 0 <= low < high <= 1")
        if min(self.specks, self.bleed) < 0:
            raise ValueError(f"specks is {self.specks} and bleed is {self.bleed}; use numbers of pixels from 0 up")


def colour(text: str) -> Colour | None:
    """ "none", or a colour as in CSS: a name, #rgb, #rrggbb, rgb(r, g, b). Raises ValueError."""
    if text.strip().lower() == "none":
        return None
    try:
        red, green, blue = ImageColor.getrgb(text.strip())[:3]
    except ValueError:
        raise ValueError(f"matte is {text!r:.60}; use none, or a colour such as black, white, grey or #336699") from None
    return red / 255, green / 255, blue / 255


def cleaned(picture: Tensor, cleaning: Cleaning) -> Tensor:
    """Every step of a cleaning: the matte while alpha is still the one that was composed with, edges when alpha is final."""
    if cleaning.matte is not None:
        picture = without_matte(picture, cleaning.matte)
    picture = levelled(picture, cleaning.low, cleaning.high)
    return bled(without_specks(picture, cleaning.specks), cleaning.bleed)


def without_matte(picture: Tensor, matte: Colour) -> Tensor:
    """A picture I that was composed over one colour M, un-premultiplied: C = (I - (1 - a) M) / a, clipped to 0..1 (Smith and Blinn 1996).

    Pixels without alpha, whose colour is unknown, keep theirs.
    """
    behind, alpha = picture.new_tensor(matte), picture[..., 3:]
    # Where alpha is tiny this is rounding noise: it is clipped, and weighs as little in whatever it is composed over.
    own = ((picture[..., :3] - (1 - alpha) * behind) / alpha.clamp_min(torch.finfo(alpha.dtype).tiny)).clamp(0, 1)
    return torch.cat([torch.where(alpha > 0, own, picture[..., :3]), alpha], -1)


def levelled(picture: Tensor, low: float, high: float) -> Tensor:
    """Alpha up to `low` becomes 0, from `high` on 1, and is linear in between."""
    return torch.cat([picture[..., :3], ((picture[..., 3:] - low) / (high - low)).clamp(0, 1)], -1)


def without_specks(picture: Tensor, pixels: int) -> Tensor:
    """Groups of fewer than `pixels` pixels that are not transparent (neighbours touch, at corners too) become transparent."""
    there = picture[..., 3] > 0
    if pixels < 2 or not there.any():
        return picture
    groups = _groups(there)
    small = groups.flatten().bincount(minlength=there.numel())[groups] < pixels
    alpha = picture[..., 3].clone()
    alpha[there] = alpha[there].masked_fill(small, 0)
    return torch.cat([picture[..., :3], alpha[..., None]], -1)


def _groups(there: Tensor) -> Tensor:
    """The connected group of each true pixel of `(height, width)`, in raster order: a number below height x width, one a group.

    Labels spread to neighbours, and every label points to the least that it has met (the hook and jump of Shiloach and Vishkin 1982), so
    that a long thin group takes far fewer rounds than it has pixels.
    """
    height, width = there.shape
    parent = torch.arange(height * width, device=there.device)
    labels = parent[there.flatten()]
    field = torch.full((1, 1, height, width), float("inf"), dtype=torch.float64, device=there.device)  # pools are for floats; 53 bits hold them all
    while True:
        field[0, 0][there] = labels.double()
        least = -F.max_pool2d(-field, 3, 1, 1)[0, 0][there].long()
        if torch.equal(least, labels):
            return labels
        parent.scatter_reduce_(0, labels, least, "amin")
        while not torch.equal(parent, parent[parent]):
            parent = parent[parent]
        labels = parent[labels]


def bled(picture: Tensor, reach: int, opaque: float = OPAQUE) -> Tensor:
    """Colours of soft edges and of transparent pixels from the nearest pixel whose alpha is `opaque` or more, `reach` pixels away at most.

    Transparent pixels with none so near take the colour of the nearest one that is not transparent. Alpha stays. What is composed over
    another ground, or resized, then has no fringe of the old one.
    """
    if reach < 1:
        return picture
    out = picture.clone(memory_format=torch.contiguous_format)
    colours, alpha = out.view(-1, 4)[:, :3], picture[..., 3]
    left = alpha < opaque
    for sources in (~left, alpha > 0):
        index, near = _nearest(sources, reach)
        taking = near & left
        colours[taking.flatten()] = colours[index[taking]]
        left = left & ~taking
    return out


def _nearest(sources: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """For each pixel of `(height, width)` the nearest true one (flat index), and whether there is one within `reach` pixels. Exact.

    Along the columns first, then along the rows over the columns' results (Felzenszwalb and Huttenlocher 2012), no further than `reach`.
    """
    height, width = sources.shape
    far = reach + 1
    rows = torch.arange(height, dtype=torch.int32, device=sources.device)[:, None]
    above = torch.where(sources, rows, -far).cummax(0).values
    below = torch.where(sources, rows, height + far).flip(0).cummin(0).values.flip(0)
    row = torch.where(rows - above <= below - rows, above, below)
    square = (row - rows).clamp(-far, far) ** 2
    columns = torch.arange(width, device=sources.device)
    best, column = square.clone(), columns.repeat(height, 1)
    for step in range(1, min(reach, width - 1) + 1):
        for to, of in ((slice(step, None), slice(None, -step)), (slice(None, -step), slice(step, None))):
            distance = square[:, of] + step * step
            column[:, to] = torch.where(distance < best[:, to], columns[of], column[:, to])
            best[:, to] = torch.minimum(best[:, to], distance)
    return row.gather(1, column).long() * width + column, best <= reach * reach


def stacked(
    pictures: Sequence[Layer],
    names: Sequence[str] = (),
    *,
    merged: str = "a layer",
    top_first: bool = False,
    cleaning: Cleaning | None = None,
    trim: bool = True,
    threshold: float = 0.0,
    drop_empty: bool = False,
    numbered_from: int = 1,
) -> tuple[list[Layer], list[str]]:
    """A model's pictures as layers, lowest first, and a line about each thing that the user should know.

    names: of the pictures, in their order; those without are numbered. merged: what the first picture is, "a layer", or the merged
    picture, which is "left out" or "hidden" below the others; it takes no name. top_first: the first of the others is the uppermost. A
    cleaning makes masks part of the pictures. threshold: alpha up to it counts as nothing there, for trim and drop_empty. Raises ValueError.
    """
    shown, notes = list(pictures), []
    first = [] if merged == "a layer" else [replace(shown.pop(0), name=MERGED, visible=False)]
    if not shown:
        raise ValueError(f"image has only the merged picture, which is {merged}; give a batch, or set first to a layer")
    if len(names) > len(shown):
        notes.append(f"names has {len(names)} lines for {len(shown)} layers; not used: {', '.join(names[len(shown) :])}")
    given = [name for name in names[: len(shown)] if name]
    if given and len(given) < len(shown):
        notes.append(f"{len(shown) - len(given)} of {len(shown)} layers have no name and are numbered")
    out: list[Layer] = []
    for index, layer in enumerate(shown):
        layer = replace(layer, name=(names[index] if index < len(names) else "") or f"Layer {numbered_from + index}")
        if cleaning is not None:
            image = layer.image if layer.mask is None else torch.cat([layer.image[..., :3], layer.image[..., 3:] * layer.mask[..., None]], -1)
            layer = replace(layer, image=cleaned(image, cleaning), mask=None)
        alpha = layer.image[..., 3] if layer.mask is None else layer.image[..., 3] * layer.mask
        if drop_empty and not (alpha > threshold).any():
            notes.append(f"{layer.name}: empty, left out")
            continue
        out.append(trimmed(layer, threshold) if trim else layer)
    return (first if merged == "hidden" else []) + (out[::-1] if top_first else out), notes
