"""What the paper does with the attention maps: re-initialisation of the noise, and the gradient steps of concept enhancement."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .concepts import Concept
from .maps import Maps

STEP_SIZE, LAST_STEP, PATIENCE = 20.0, 25, 5


def reinitialise(noise: Tensor, maps: Maps, concepts: Sequence[Concept], canvas: tuple[int, int]) -> Tensor:
    """Each box gets a copy of the box-sized window of `noise` `(batch, ..., height, width)` in which its words are attended to most.

    The result has the mean and the deviation of the noise. A box that is smaller than a cell of the maps is left as it is.
    """
    out = noise.clone()
    height, width = maps.size
    steps = [-(-full // cells) for full, cells in zip(noise.shape[-2:], maps.size, strict=True)]
    for index, concept in enumerate(concepts):
        rows, columns = concept.box.cells(height, width, canvas)
        window = (rows.stop - rows.start, columns.stop - columns.start)
        if 0 in window:
            continue
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
    """Scalar: small where every concept's words are attended to strongly and all over its box, and its box attends to itself.

    Per word 8 (1 - mean of the best fifth, under a Gaussian around the box's middle) + 2 L1(1 in the box's rows and columns, their maxima);
    per concept 10 times the strongest self-attention from the box to elsewhere.
    """
    height, width = maps.size
    own = torch.stack(maps.own).mean(0)
    total = own.new_zeros(())
    for index, concept in enumerate(concepts):
        rows, columns = concept.box.cells(height, width, canvas)
        inside = torch.zeros(height, width, device=own.device)
        inside[rows, columns] = 1.0
        best = max(int(inside.sum() * 0.2), 1)
        if not inside.any():
            continue
        gauss = torch.zeros_like(inside)
        gauss[rows, columns] = _bell(rows.stop - rows.start, own.device)[:, None] * _bell(columns.stop - columns.start, own.device)
        gauss = gauss / gauss.max()
        smooth = _smooth(maps.concept(index).movedim(-1, 1))
        strongest = (smooth * gauss).flatten(2).topk(best, -1).values.mean(-1)
        total = total + 8.0 * (1.0 - strongest).clamp_min(0).sum()
        boxed = smooth * inside
        for axis in (-2, -1):
            total = total + 2.0 * (boxed.amax(axis) - inside.amax(axis)).abs().mean(-1).sum()
        flat = inside.flatten().bool()
        if not flat.all():
            outward = own[:, flat][:, :, ~flat].flatten(1)
            total = total + 10.0 * outward.topk(min(best, outward.shape[1]), -1).values.mean(-1).sum()
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
    return F.conv2d(F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])[:, 0].unflatten(0, x.shape[:2])


class Schedule:
    """When and how far the latent is moved: 20 sqrt(1 .. 1/2) over the steps, until the loss rises after 5 steps, and 25 of 50 steps at most."""

    def __init__(self, steps: int, strength: float):
        self.steps, self.strength = steps, strength
        self.losses: list[float] = []
        self.stopped = strength <= 0

    def size(self, step: int) -> float:
        """The step size in the latent of variance 1; 0 where the latent stays."""
        last = min(LAST_STEP, (self.steps - 1) // 2)
        if self.stopped or step > last:
            return 0.0
        return self.strength * STEP_SIZE * math.sqrt(1.0 - 0.5 * step / max(self.steps - 1, 1))

    def record(self, step: int, loss: float) -> None:
        self.stopped = bool(self.losses) and loss > self.losses[-1] and step >= PATIENCE
        self.losses.append(loss)
