"""Drawn layered pictures and clips: shapes that fill their boxes over a dark, smooth ground. Colours and alpha are 0..1.

A layer's box says where its shape is; which of the caption's kinds it shows is left open, as in ART's anonymous regions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.models.default.vocabulary import COLOURS, MOTIONS
from tessera.models.layers.default.vocabulary import SHAPES, Caption, Kind
from tessera.models.layers.document import Box
from tessera.models.layers.regions import TOKEN, Regions

from ..default.clips import DIRECTION, PALETTE

MARGIN = 1.5  # pixels between shape and box
MOVING = 0.62  # side of a moving shape, of its box
SAMPLES = 4  # a pixel's side is so many samples


def inside(shape: int, u: Tensor, v: Tensor) -> Tensor:
    """Where a shape covers the square -1..1; u to the right, v down."""
    name = SHAPES[shape]
    within = (u.abs() <= 1) & (v.abs() <= 1)
    if name == "disc":
        return u.square() + v.square() <= 1
    if name == "square":
        return within
    if name == "triangle":
        return within & (2 * u.abs() <= 1 + v)
    if name == "diamond":
        return u.abs() + v.abs() <= 1
    if name == "ring":
        radius = u.square() + v.square()
        return (radius <= 1) & (radius >= 0.3)
    return within & ((u.abs() <= 0.36) | (v.abs() <= 0.36))  # cross


def coverage(kind: Kind, width: int, height: int, progress: float = 0.0) -> Tensor:
    """Alpha `(height, width)` of a shape in a box of that many pixels, with an edge of 2 pixels. progress: 0 to 1, of a motion."""
    half = torch.tensor([width, height]) / 2 - MARGIN
    centre = torch.tensor([width, height]) / 2
    if kind.motion >= 0:
        small = half * MOVING
        centre = centre + DIRECTION[kind.motion] * (half - small) * (2 * progress - 1)
        half = small
    steps = [(torch.arange(-SAMPLES // 2, size * SAMPLES + SAMPLES // 2) + 0.5) / SAMPLES for size in (width, height)]
    u, v = ((steps[axis] - centre[axis]) / half[axis] for axis in (0, 1))
    covered = inside(kind.shape, u[None], v[:, None]).float()
    return F.avg_pool2d(covered[None, None], 2 * SAMPLES, SAMPLES)[0, 0]


def foreground(kind: Kind, width: int, height: int, frames: int = 1) -> Tensor:
    """`(frames, height, width, 4)`, straight alpha, of a box in pixels."""
    alpha = torch.stack([coverage(kind, width, height, frame / max(frames - 1, 1)) for frame in range(frames)])
    return torch.cat([PALETTE[kind.colour].expand(*alpha.shape, 3), alpha[..., None]], -1)


def ground(colour: int, width: int, height: int, generator: torch.Generator) -> Tensor:
    """`(height, width, 3)`: a ramp in a random direction between two dark shades; colour -1: of any."""
    shades = 0.03 + 0.19 * torch.rand(2, 3, generator=generator)
    if colour >= 0:
        tint = PALETTE[colour]
        shades = tint * (0.12 + 0.25 * torch.rand(2, 1, generator=generator)) + 0.02
    x, y = (torch.arange(size) / size - 0.5 for size in (width, height))
    angle = 6.2832 * torch.rand((), generator=generator)
    ramp = 0.5 + 0.7 * (angle.cos() * x[None] + angle.sin() * y[:, None])
    return shades[0] + (shades[1] - shades[0]) * ramp[..., None]


def merged(back: Tensor, layers: list[tuple[Box, Tensor]]) -> Tensor:
    """`(height, width, 3)` and layers `(frames, height, width, 4)` in boxes in pixels, lowest first -> `(frames, height, width, 3)`."""
    frames = max([layer.shape[0] for _, layer in layers], default=1)
    out = back.repeat(frames, 1, 1, 1)
    for (x, y, width, height), layer in layers:
        part = out[:, y : y + height, x : x + width]
        part.lerp_(layer[..., :3], layer[..., 3:])
    return out


def count(generator: torch.Generator, most: int) -> int:
    """How many foregrounds: few more often than many, 1 to `most`."""
    return int(torch.exp(torch.rand((), generator=generator) * torch.tensor(most + 0.99).log()))


def layout(foregrounds: int, generator: torch.Generator, longest: int = 10) -> Regions:
    """Random boxes on a random canvas of 6 to `longest` tokens a side, smaller and on a larger canvas where there are many. Some overlap."""

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    least = 6 if foregrounds <= 8 else 8
    width, height = between(least, longest), between(least, longest)
    if foregrounds > 16:
        width = height = longest
    side = max(1, min(5, round((1.3 * width * height / max(foregrounds, 1)) ** 0.5)))
    covered = torch.zeros(height, width)
    boxes = []
    for _ in range(foregrounds):
        tries = []
        for _ in range(8):  # the one that hides least of the others
            w, h = between(max(1, side - 1), side + (side > 1)), between(max(1, side - 1), side + (side > 1))
            x, y = between(0, width - w), between(0, height - h)
            tries.append((float(covered[y : y + h, x : x + w].mean()), (x, y, w, h)))
        x, y, w, h = box = min(tries)[1]
        covered[y : y + h, x : x + w] = 1
        boxes.append(box)
    return Regions(width, height, ((0, 0, width, height),) * 2 + tuple(boxes))


def caption(foregrounds: int, generator: torch.Generator, moving: float = 0.0) -> Caption:
    """A random caption for that many layers; each kind moves with the probability `moving`."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    wanted = min(foregrounds, 1 + below(6))
    kinds: dict[tuple[int, int], Kind] = {}
    while len(kinds) < wanted:
        colour, shape = below(len(COLOURS)), below(len(SHAPES))
        kinds[colour, shape] = Kind(colour, shape, below(len(MOTIONS)) if torch.rand((), generator=generator) < moving else -1)
    return Caption(tuple(kinds.values()), below(len(COLOURS) + 1) - 1)


def assign(said: Caption, foregrounds: int, generator: torch.Generator) -> list[Kind]:
    """Which kind each layer shows: every kind at least once, in any order."""
    extra = torch.randint(max(len(said.kinds), 1), (foregrounds - len(said.kinds),), generator=generator).tolist()
    order = torch.randperm(foregrounds, generator=generator).tolist()
    chosen = [*range(len(said.kinds)), *extra]
    return [said.kinds[chosen[place]] for place in order]


def pixels(box: Box) -> Box:
    """A box in tokens -> in pixels."""
    x, y, width, height = (TOKEN * value for value in box)
    return x, y, width, height
