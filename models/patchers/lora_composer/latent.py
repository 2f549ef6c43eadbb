"""What the paper does with the attention maps: re-initialisation of the noise, and the gradient steps of concept enhancement."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .concepts import Concept
from .maps import Maps

STEP_SIZE, MOVES, STEPS, PATIENCE = 20.0, 26, 50, 5
"""The authors move the latent at steps 0 to 25 of 50, by 20 sqrt(1 .. 1/2); from step 5 on a loss that rises ends it."""


def reinitialise(noise: Tensor, maps: Maps, concepts: Sequence[Concept], canvas: tuple[int, int]) -> Tensor:
    """Each box gets a copy of the box-sized window of `noise` `(batch, ..., height, width)` in which its words are attended to most.

    The result has the mean and the deviation of the noise, which is not all one value. Every box holds a cell of the maps.
    """
    out = noise.clone()
    height, width = maps.size
    steps = [-(-full // cells) for full, cells in zip(noise.shape[-2:], maps.size, strict=True)]
    for index, concept in enumerate(concepts):
        rows, columns = concept.box.cells(height, width, canvas)
        window = (rows.stop - rows.start, columns.stop - columns.start)
        scores = F.avg_pool2d(maps.concept(index).sum(-1)[:, None], window, stride=1)[:, 0]
        for sample, best in enumerate(scores.flatten(1).argmax(1).tolist()):
            corner = (best // scores.shape[-1], best % scores.shape[-1])
            source, target = [], []
            for axis, (first, cells, step) in enumerate(zip((rows.start, columns.start), window, steps, strict=True)):
                full = noise.shape[axis - 2]
                size = min(cells * step, full - max(first, corner[axis]) * step)  # the last cell of an odd size is not whole
                source.append(slice(corner[axis] * step, corner[axis] * step + size))
                target.append(slice(first * step, first * step + size))
            out[sample, ..., target[0], target[1]] = noise[sample, ..., source[0], source[1]]
    dims = tuple(range(1, noise.ndim))
    mean, std = noise.mean(dims, keepdim=True), noise.std(dims, keepdim=True)
    return (out - out.mean(dims, keepdim=True)) / out.std(dims, keepdim=True) * std + mean


def enhancement_loss(maps: Maps, concepts: Sequence[Concept], canvas: tuple[int, int]) -> Tensor:
    """float32 `(batch,)`: small where every concept's words are attended to strongly and all over its box, and its box attends to itself.

    Per concept twice the mean over its words of 8 (1 - mean of the best fifth, under a Gaussian around the box's middle) + 2 L1(1 in the box's
    rows and columns, their maxima), which for the paper's two words is its sum; and 10 times the strongest self-attention from the box to
    elsewhere. Every box holds a cell of the maps.
    """
    height, width = maps.size
    own = torch.stack(maps.own).mean(0)
    total = own.new_zeros(len(own))
    for index, concept in enumerate(concepts):
        rows, columns = concept.box.cells(height, width, canvas)
        inside = torch.zeros(height, width, device=own.device)
        inside[rows, columns] = 1.0
        best = max(int(inside.sum() * 0.2), 1)
        gauss = torch.zeros_like(inside)
        gauss[rows, columns] = _bell(rows.stop - rows.start, own.device)[:, None] * _bell(columns.stop - columns.start, own.device)
        gauss = gauss / gauss.max()
        smooth = _smooth(maps.concept(index).movedim(-1, 1))
        strongest = (smooth * gauss).flatten(2).topk(best, -1).values.mean(-1)
        words = 8.0 * (1.0 - strongest).clamp_min(0)
        boxed = smooth * inside
        for axis in (-2, -1):
            words = words + 2.0 * (boxed.amax(axis) - inside.amax(axis)).abs().mean(-1)
        total = total + 2.0 * words.mean(1)
        flat = inside.flatten().bool()
        if not flat.all():
            outward = own[:, flat][:, :, ~flat].flatten(1)
            total = total + 10.0 * outward.topk(min(best, outward.shape[1]), -1).values.mean(-1)
    return total


def _bell(cells: int, device: torch.device) -> Tensor:
    """exp(-x^2 / 2) over x = -1..1."""
    return torch.exp(-0.5 * torch.linspace(-1.0, 1.0, cells, device=device) ** 2)


def _smooth(x: Tensor) -> Tensor:
    """3 x 3 smoothing of `(batch, maps, height, width)` with the authors' kernel exp(-(d / 2 sigma)^2), sigma 0.5, borders reflected."""
    if min(x.shape[-2:]) < 2:
        return x
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], device=x.device) ** 2))
    kernel = line[:, None] * line / line.sum() ** 2
    return F.conv2d(F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None]).reshape(x.shape)


class Schedule:
    """When and how far the latents of a batch are moved: in the authors' share of the steps, and at most as often.

    A latent whose loss has risen is moved by that step too, and stays from the next one on.
    """

    def __init__(self, steps: int, strength: float, batch: int):
        self.steps, self.strength = steps, strength
        self.losses: list[Tensor] = []
        self.moving = torch.ones(batch, dtype=torch.bool)

    def size(self, step: int) -> float:
        """The step size in the latent of variance 1; 0 where every latent stays."""
        if step >= min(MOVES, max(self.steps * MOVES // STEPS, 1)) or not self.moving.any():
            return 0.0
        return self.strength * STEP_SIZE * math.sqrt(1.0 - 0.5 * step / max(self.steps - 1, 1))

    def record(self, step: int, losses: Tensor) -> Tensor:
        """Takes a step's losses `(batch,)`. Returns which latents it moves, bool `(batch,)`."""
        moving = self.moving
        if self.losses and step >= PATIENCE:
            self.moving = moving & (losses <= self.losses[-1])
        self.losses.append(losses)
        return moving
