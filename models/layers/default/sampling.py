"""Generate layered pictures and clips with the trained networks, without a host: shifted schedule, Euler steps, classifier-free guidance."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ...default.networks import WanVAE, unwhiten
from ...default.sampling import schedule
from ..regions import PATCH, TOKEN, WHOLE, Regions
from ..transparent_vae import TransparentDecoder
from . import vocabulary
from .networks import LayeredTransformer, collate

STEPS, CFG, SHIFT = 20, 2.0, 5.0  # as in the workflows


@torch.no_grad()
def latents(
    model: LayeredTransformer, regions: Regions, caption: vocabulary.Caption, seed: int, *, steps: int = STEPS, cfg: float = CFG, shift: float = SHIFT
) -> Tensor:
    """`(16, layers * frames, 2 * height, 2 * width)`, as a VAE decodes them, zeros outside of the boxes."""
    said = collate([regions, regions], [vocabulary.embed(caption), vocabulary.embed(vocabulary.Caption(()))])
    x = torch.randn(1, model.channels, 1, PATCH, PATCH * regions.tokens, generator=torch.Generator().manual_seed(seed))
    levels = schedule(steps, shift).tolist()
    for now, after in itertools.pairwise(levels):
        with_caption, without = model(x.repeat(2, 1, 1, 1, 1), torch.full((2,), 1000 * now), **said).chunk(2)
        x = x + (after - now) * (without + cfg * (with_caption - without))
    canvas = torch.zeros(1, model.channels, len(regions.boxes) * regions.frames, PATCH * regions.height, PATCH * regions.width)
    return regions.scatter(unwhiten(x)[:, :, 0], canvas, PATCH)[0]


class Decoded(NamedTuple):
    """In 0..1. merged, back: `(frames, height, width, 3)`. layers: `(foregrounds, frames, height, width, 4)`, straight alpha, transparent
    outside of their boxes."""

    merged: Tensor
    back: Tensor
    layers: Tensor

    def composite(self) -> Tensor:
        """The layers over the ground: like `merged`."""
        out = self.back
        for layer in self.layers:
            out = torch.lerp(out, layer[..., :3], layer[..., 3:])
        return out


@torch.no_grad()
def decode(vae: WanVAE, decoder: TransparentDecoder, latent: Tensor, regions: Regions) -> Decoded:
    """What `latents` made, as Decode Region Layers and Decode Region Video decode it."""
    whole = latent[None, :, : WHOLE * regions.frames].split(regions.frames, 2)
    merged, back = ((vae.decode(part)[0].movedim(0, -1).clamp(-1, 1) + 1) / 2 for part in whole)
    layers = torch.tensor([0.5, 0.5, 0.5, 0.0]).repeat(len(regions.boxes) - WHOLE, *merged.shape[:3], 1)
    for whole, layer, (x, y, width, height) in zip(layers, decoder(latent, regions.finer(PATCH), WHOLE), regions.boxes[WHOLE:], strict=True):
        whole[:, TOKEN * y : TOKEN * (y + height), TOKEN * x : TOKEN * (x + width)] = layer
    return Decoded(merged, back, layers)
