"""Latents of drawn layered pictures and clips, in files that training reads while more are made.

python -m tessera.training.layers.dataset table --work DIR [--frames 9]                   every foreground there is, in every size of box
python -m tessera.training.layers.dataset cache --work DIR --samples 12000 [--frames 9]   layouts with their merged picture and ground

A foreground's latent does not depend on where it is, but for what the autoencoder sees beyond its box, which is grey: it is encoded once, with
a token of grey around it. Shard 000 of the layouts is held out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.models.default.networks import WanVAE, whiten
from tessera.models.default.vocabulary import MOTIONS
from tessera.models.layers.default.vocabulary import Caption, Kind, kinds
from tessera.models.layers.document import Box
from tessera.models.layers.regions import MAX_FOREGROUNDS, TOKEN

from ..default.train_dit import load_vae
from ..loop import store
from . import drawn
from .train_vae import over_grey

SIZES = range(1, 7)  # tokens of a box's side, as drawn.layout makes them
SHARD = 120
IN_CLIPS = 6  # foregrounds at most; of pictures as many as the method has


def foreground_latents(vae: WanVAE, what: list[Kind], width: int, height: int, frames: int) -> Tensor:
    """Of boxes in tokens: `(kinds, 16, latent frames, 2 * height, 2 * width)`, normalised."""
    layers = torch.stack([drawn.foreground(kind, width * TOKEN, height * TOKEN, frames) for kind in what])
    seen = torch.stack([over_grey(F.pad(layer, (0, 0, TOKEN, TOKEN, TOKEN, TOKEN))) for layer in layers])
    return whiten(torch.cat([vae.encode(part) for part in seen.split(6)]))[..., 2:-2, 2:-2]


def sample(frames: int, generator: torch.Generator, foregrounds: int | None = None) -> dict[str, Any]:
    """One layout: boxes in tokens `(layers, 4)`, which kind each foreground shows, the caption. foregrounds: None: as many as it happens."""
    if foregrounds is None:
        foregrounds = drawn.count(generator, IN_CLIPS if frames > 1 else MAX_FOREGROUNDS)
    regions = drawn.layout(foregrounds, generator, 8 if frames > 1 else 10)
    said = drawn.caption(foregrounds, generator, 0.7 if frames > 1 else 0.15)
    shown = drawn.assign(said, foregrounds, generator)
    return dict(boxes=torch.tensor(regions.boxes), shown=torch.tensor(shown), kinds=torch.tensor(said.kinds), ground=said.ground)


def caption_of(found: dict[str, Any]) -> Caption:
    return Caption(tuple(Kind(*row) for row in found["kinds"].tolist()), found["ground"])


def boxes_of(found: dict[str, Any]) -> list[Box]:
    return [tuple(row) for row in found["boxes"].tolist()]


def pictures_of(found: dict[str, Any], frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[tuple[Box, Tensor]]]:
    """Merged `(frames, height, width, 3)`, ground `(height, width, 3)` and the foregrounds in boxes in pixels. generator: of the ground."""
    boxes = [drawn.pixels(box) for box in boxes_of(found)]
    layers = [(box, drawn.foreground(Kind(*kind), *box[2:], frames)) for box, kind in zip(boxes[2:], found["shown"].tolist(), strict=True)]
    back = drawn.ground(found["ground"], *boxes[0][2:], generator)
    return drawn.merged(back, layers), back, layers


def whole_latents(vae: WanVAE, merged: Tensor, back: Tensor) -> Tensor:
    """`(2, 16, latent frames, height / 8, width / 8)`, normalised: of the merged picture and of the ground."""
    seen = torch.stack([merged, back.expand_as(merged)]).movedim(-1, 1) * 2 - 1
    return whiten(torch.cat([vae.encode(x[None]) for x in seen]))


def shards(work: str, frames: int) -> list[str]:
    """Paths of the layouts' files that are complete, the held-out one first."""
    folder = os.path.join(work, f"layouts{frames}")
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".pt")) if os.path.isdir(folder) else []


def table_path(work: str, frames: int) -> str:
    return os.path.join(work, f"foregrounds{frames}.pt")


def table(vae: WanVAE, options: argparse.Namespace) -> None:
    every = kinds((-1, *range(len(MOTIONS))))
    found = {}
    for width in SIZES:
        for height in SIZES:
            latents = foreground_latents(vae, every, width, height, options.frames).half()
            found.update({(*kind, width, height): latent.clone() for kind, latent in zip(every, latents, strict=True)})
        print(f"boxes {width} tokens wide done", flush=True)
    store(found, table_path(options.work, options.frames))


def cache(vae: WanVAE, options: argparse.Namespace) -> None:
    folder = os.path.join(options.work, f"layouts{options.frames}")
    os.makedirs(folder, exist_ok=True)
    begin = time.time()
    for number in range(-(-options.samples // SHARD) + 1):
        path = os.path.join(folder, f"{number:03d}.pt")
        if os.path.exists(path):
            continue
        generator = torch.Generator().manual_seed(1000 * options.frames + number)
        store(list(_samples(vae, options.frames, generator)), path)
        print(f"shard {number} {time.time() - begin:.0f}s", flush=True)


def _samples(vae: WanVAE, frames: int, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    for _ in range(SHARD):
        found = sample(frames, generator)
        merged, back, _ = pictures_of(found, frames, generator)
        yield found | dict(whole=whole_latents(vae, merged, back).half())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "cache"))
    parser.add_argument("--work", required=True)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--samples", type=int, default=12000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        dict(table=table, cache=cache)[options.what](load_vae(options.work), options)


if __name__ == "__main__":
    main()
