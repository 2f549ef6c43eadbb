"""Drawn training clips (one filled shape moving over a dark smooth background) and a rule-based reader of such clips.

Clips are (3, T, H, W) in [-1, 1]. Captions are index rows [colour, shape, motion] into the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.models.default.vocabulary import COLOURS, MOTIONS, SHAPES

PALETTE = torch.tensor([[0.95, 0.15, 0.15], [0.15, 0.85, 0.25], [0.2, 0.35, 1.0], [1.0, 0.9, 0.15], [0.97, 0.97, 0.97], [0.95, 0.2, 0.9]])
DIRECTION = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])  # (x, y) of left, right, up, down
REACH = torch.tensor([[1.0, 1.0], [0.886, 0.886], [1.083, 0.938]])  # half width and height over r, per shape


def random_captions(n: int, generator: torch.Generator | None = None, device: str | torch.device = "cpu") -> Tensor:
    """(n, 3) captions, balanced over the 72 combinations in random order."""
    total = len(COLOURS) * len(SHAPES) * len(MOTIONS)
    parts = [torch.randperm(total, generator=generator, device=device) for _ in range(-(-n // total))]
    i = torch.cat(parts)[:n]
    return torch.stack([i // (len(SHAPES) * len(MOTIONS)), i // len(MOTIONS) % len(SHAPES), i % len(MOTIONS)], 1)


def coverage(shape: Tensor, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """How much of each pixel the shape covers, 0..1, with a 2-pixel edge; offsets from the box centre in pixels."""
    disc = (dx.square() + dy.square()).sqrt() - r
    square = torch.maximum(dx.abs(), dy.abs()) - 0.886 * r
    up = dy - 0.3125 * r  # triangle: centroid below the box centre, apex up
    triangle = torch.maximum(0.866 * dx.abs() - 0.5 * up, up) - 0.625 * r
    d = torch.where(shape == 0, disc, torch.where(shape == 1, square, triangle))
    return (0.5 - d / 2).clamp(0, 1)


def draw(
    captions: Tensor,
    frames: int = 33,
    size: int = 128,
    generator: torch.Generator | None = None,
    window: tuple[int, float] | None = None,
) -> Tensor:
    """(B, 3) captions -> (B, 3, frames, size, size); with window=(side, towards) only a side x side crop of each.

    Speed is 1 to 2.2 pixels per frame at size 128 (in proportion at other sizes), less where the shape would leave the
    frame. A fraction `towards` of the crops is placed near the shape.
    """
    dev, n = captions.device, len(captions)

    def u(*s: int) -> Tensor:
        return torch.rand(n, *s, generator=generator, device=dev)

    shape, move = captions[:, 1], DIRECTION.to(dev)[captions[:, 2]]
    r = (0.14 + 0.10 * u()) * size
    half = REACH.to(dev)[shape] * r[:, None] + 1
    room = (size - 2 * half).clamp_min(0)
    along = move.abs()
    travel = torch.minimum((1 + 1.2 * u()) * size / 128 * (frames - 1), (room * along).sum(1))
    start = half + u(2) * (room - along * travel[:, None])
    start = start + along * travel[:, None] * (move < 0)  # left and up start at the far end
    steps = torch.linspace(0, 1, frames, device=dev)
    centre = start[:, None] + steps[None, :, None] * (move * travel[:, None])[:, None]  # (B, T, 2)

    if window is None:
        side, corner = size, torch.zeros(n, 2, device=dev)
    else:
        side, towards = window
        near = centre[torch.arange(n, device=dev), (u() * frames).long().clamp_max(frames - 1)]
        near = near + (2 * u(2) - 1) * (r[:, None] + side / 4) - side / 2
        corner = torch.where((u() < towards)[:, None], near, u(2) * (size - side)).round().clamp(0, size - side)
    axis = torch.arange(side, device=dev) + 0.5
    x, y = corner[:, :1] + axis, corner[:, 1:] + axis  # (B, side) each
    angle = 6.2832 * u()
    ramp = 0.5 + 0.7 * (angle.cos()[:, None, None] * (x / size - 0.5)[:, None] + angle.sin()[:, None, None] * (y / size - 0.5)[:, :, None])
    a, b = 0.03 + 0.19 * u(3), 0.03 + 0.19 * u(3)
    ground = a[..., None, None] + (b - a)[..., None, None] * ramp[:, None]  # (B, 3, side, side)

    dx = x[:, None, None, :] - centre[:, :, 0, None, None]
    dy = y[:, None, :, None] - centre[:, :, 1, None, None]
    m = coverage(shape[:, None, None, None], dx, dy, r[:, None, None, None])[:, None]  # (B, 1, T, side, side)
    colour = PALETTE.to(dev)[captions[:, 0]][:, :, None, None, None]
    return 2 * (ground[:, :, None] + (colour - ground[:, :, None]) * m) - 1


def masks(clip: Tensor, level: float = 0.5) -> Tensor:
    """(T, H, W) bool: pixels much brighter than the dark background, in their strongest channel."""
    return ((clip + 1) / 2).amax(0) > level


def box(mask: Tensor) -> list[int]:
    """Bounding box (top, bottom, left, right), end exclusive, of the rows and columns with a fair share of the mask."""
    out = []
    for dim in (1, 0):
        count = mask.sum(dim)
        keep = (count > 0.08 * count.max()).nonzero().flatten()
        out += [int(keep[0]), int(keep[-1]) + 1]
    return out


def overlap(mask: Tensor, edges: Sequence[int]) -> Tensor:
    """Intersection over union of the mask with a disc, a square and a triangle filling the box: (3,)."""
    top, bottom, left, right = edges
    h, w = mask.shape
    y = ((torch.arange(h) + 0.5 - top) / (bottom - top))[:, None]
    x = ((torch.arange(w) + 0.5 - left) / (right - left))[None]
    inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    shapes = torch.stack([(2 * x - 1).square() + (2 * y - 1).square() <= 1, inside, inside & ((2 * x - 1).abs() <= y)])
    return (shapes & mask).sum((1, 2)) / (shapes | mask).sum((1, 2)).clamp_min(1)


def read(clip: Tensor) -> dict[str, Any]:
    """What a clip (3, T, H, W) shows: dict(colour, shape, motion as indices or None, fit = overlap with that shape)."""
    clip = clip.detach().float().cpu().clamp(-1, 1)
    mask = masks(clip)
    area = mask.float().mean((1, 2))
    good = ((area > 0.01) & (area < 0.6)).nonzero().flatten().tolist()
    result: dict[str, Any] = dict(colour=None, shape=None, motion=None, fit=0.0)
    if len(good) < max(2, clip.shape[1] // 2):
        return result
    mean = torch.stack([((clip[:, t] + 1) / 2)[:, mask[t]].mean(1) for t in good]).mean(0)

    def hue(c: Tensor) -> Tensor:
        return c / c.norm(dim=-1, keepdim=True)

    result["colour"] = int((hue(PALETTE) - hue(mean)).norm(dim=1).argmin())
    fits = torch.stack([overlap(mask[t], box(mask[t])) for t in good]).mean(0)
    result["shape"], result["fit"] = int(fits.argmax()), float(fits.max())
    h, w = mask.shape[1:]
    grid = torch.stack([torch.arange(w).float()[None].expand(h, w), torch.arange(h).float()[:, None].expand(h, w)])
    where = torch.stack([grid[:, mask[t]].mean(1) for t in good])
    k = max(1, len(good) // 8)
    shift = (where[-k:].mean(0) - where[:k].mean(0)) / torch.tensor([w, h])
    if shift.abs().max() > 0.03:
        result["motion"] = int((DIRECTION @ shift).argmax())
    return result


def score(clip: Tensor) -> tuple[int | None, int | None, int | None]:
    """(colour, shape, motion) indices read from the pixels, None where nothing clear is there."""
    r = read(clip)
    return r["colour"], r["shape"], r["motion"]
