"""Attention maps of the concepts' words, and what the paper does with them: re-initialisation of the noise and concept enhancement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...families import layout_of
from .concepts import Concept
from .isolation import Isolation

if TYPE_CHECKING:
    from .composer import Call

MAP_SCALE = 4
"""The attention maps that are looked at are this many times smaller than the latent (16 x 32 for 512 x 1024 pixels in the paper)."""

STEP_SIZE, LAST_STEP, PATIENCE = 20.0, 25, 5


@dataclass
class Maps:
    """Attention maps of one forward, of its conditional batch. Lists over layers; means over heads.

    size: (height, width) of the tokens that are looked at. cross: per concept `(batch, frames * height * width, words)`. with_self: also
    collect `own`, the self-attention `(batch, height * width, height * width)` (UNet).
    """

    size: tuple[int, int]
    with_self: bool = False
    cross: dict[int, list[Tensor]] = field(default_factory=dict)
    own: list[Tensor] = field(default_factory=list)

    def look(self, call: Call, module: Any, x: Tensor) -> None:
        """At a cross-attention: the concepts' keys against the base's queries of the whole picture."""
        if call.composer.kind == "unet":
            if x.shape[1] != math.prod(self.size):
                return
            to_q, to_k, heads = module.to_q, module.to_k, module.heads
        else:
            heads = module.num_heads
            to_q, to_k = (lambda x: module.norm_q(module.q(x))), (lambda x: module.norm_k(module.k(x)))
        q = to_q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for index in range(len(call.composer.concepts)):
            with call.concept(index):
                k = to_k(call.text(index, x)).unflatten(-1, (heads, -1)).transpose(1, 2)
            self._keep(call, index, q, k, None)

    def look_joint(self, call: Call, q: Tensor, k: Tensor, scale: float | None) -> None:
        """At a joint attention of text and picture: the same with the appended prompts."""
        assert call.layout is not None
        first = q.shape[2] - call.layout.image_tokens + call.layout.references_before
        last = q.shape[2] - call.layout.references_after
        start = q.shape[2] - call.layout.image_tokens - sum(call.prompts)
        for index, length in enumerate(call.prompts):
            self._keep(call, index, q[:, :, first:last], k[:, :, start : start + length], scale)
            start += length

    def look_self(self, q: Tensor, k: Tensor, isolation: Isolation | None, scale: float | None) -> None:
        if self.with_self and q.shape[2] == math.prod(self.size):
            self.own.append(_probabilities(q, k, None if isolation is None else isolation.bias(torch.float32), scale))

    def _keep(self, call: Call, index: int, q: Tensor, k: Tensor, scale: float | None) -> None:
        words = call.composer.concepts[index].words
        heads = (
            _probabilities(q[:, [head]], k[:, [head]], None, scale)[..., list(words)] for head in range(q.shape[1])
        )  # one by one: videos are long
        self.cross.setdefault(index, []).append(sum(heads, torch.zeros((), device=q.device)) / q.shape[1])

    def concept(self, index: int) -> Tensor:
        """`(batch, height, width, words)`, the mean over layers and frames."""
        return torch.stack(self.cross[index]).mean(0).unflatten(1, (-1, *self.size)).mean(1)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if bias is None else scores + bias).softmax(-1).mean(1)


def map_size(network: nn.Module, latent_shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of the tokens whose maps are looked at: of a UNet, the level with cross-attention whose scale is nearest to MAP_SCALE."""
    layout = layout_of(network, latent_shape, {})
    if layout is not None:
        return layout.height, layout.width
    scale, scales = 1, set()
    for block in network.get_submodule("input_blocks").children():
        scale *= 2 if any(type(module).__name__ == "Downsample" for module in block.modules()) else 1
        if any(name.endswith("attn2") for name, _ in block.named_modules()):
            scales.add(scale)
    height, width = latent_shape[-2:]
    for _ in range(min(scales, key=lambda found: abs(found - MAP_SCALE)).bit_length() - 1):
        height, width = -(-height // 2), -(-width // 2)
    return height, width


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
