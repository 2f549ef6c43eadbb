"""Train the transparent decoder on drawn layers and their latents, which dataset.py makes.

python -m tessera.training.layers.train_decoder --work DIR --minutes 20 [--resume]    writes DIR/decoder.pt
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.models.default.networks import unwhiten
from tessera.models.layers.default.vocabulary import Kind
from tessera.models.layers.regions import LAYER_SPACING, PATCH, TOKEN, WHOLE, Regions
from tessera.models.layers.transparent_vae import TransparentDecoder

from ..loop import Run, launch, optimisers, parser
from ..optimizer import Team
from . import dataset, drawn
from .train import Layouts, take_up

CLIPS = 0.6  # of the steps
AUGMENTATION = 0.2  # most noise on a latent, as samplers leave some; in the normalised latent's units
TOKENS = 700  # of a step, of 16 pixels


def build() -> TransparentDecoder:
    return TransparentDecoder(channels=16, width=128, blocks=3, hidden=256, tail=True, layer_spacing=LAYER_SPACING)


def example(layouts: Layouts, index: int, generator: torch.Generator, augmentation: float) -> tuple[Tensor, list[Tensor], Regions]:
    """A latent as the VAE decodes it `(16, layers * latent frames, height, width)`; the foregrounds, as TransparentDecoder.pictures gives them; the
    regions on the latent's grid."""
    regions, sample = layouts.regions(index), layouts.samples[index]
    strip = layouts.strip(index).float()[None]
    level = augmentation * torch.rand((), generator=generator)
    strip = strip + level * torch.randn(strip.shape, generator=generator)
    canvas = torch.zeros(1, 16, len(regions.boxes) * regions.frames, PATCH * regions.height, PATCH * regions.width)
    latent = unwhiten(regions.scatter(strip, canvas, PATCH))[0]
    parts = []
    for kind, (_, _, width, height) in zip(sample["shown"].tolist(), regions.boxes[WHOLE:], strict=True):
        picture = drawn.foreground(Kind(*kind), width * TOKEN, height * TOKEN, layouts.frames) * 2 - 1
        parts.append(picture.movedim(-1, 1))
    return latent, parts, regions.finer(PATCH)


def joined(pictures: list[Tensor]) -> Tensor:
    """`(4, pixels)` of pictures `(frames, 4, height, width)`."""
    return torch.cat([picture.movedim(1, 0).flatten(1) for picture in pictures], 1)


def loss_of(made: Tensor, target: Tensor) -> Tensor:
    """Alpha everywhere, and colour where it shows. `(4, pixels)`."""
    alpha = (target[3:] + 1) / 2
    colour = ((made[:3] - target[:3]).square() * (alpha + 0.05)).mean()
    return colour + 2 * F.mse_loss(made[3], target[3]) + 0.1 * F.l1_loss(made[3], target[3])


@torch.no_grad()
def held_out(model: TransparentDecoder, layouts: Layouts, many: int) -> tuple[float, float, float]:
    """PSNR in dB of colours where a layer is opaque, and of alpha; IoU of alpha over a half."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(3)
    for index in torch.randperm(len(layouts.samples), generator=generator)[:many].tolist():
        latent, layers, regions = example(layouts, index, generator, 0.0)
        made, target = joined(model.pictures(latent.to(model.fc_in.weight.device), regions, WHOLE)).clamp(-1, 1).cpu(), joined(layers)
        solid, mine, theirs = target[3] > 0.99, made[3] > 0, target[3] > 0
        error = (made - target).square()
        overlap = (mine & theirs).sum() / (mine | theirs).sum()
        sums += torch.stack([error[:3].mean(0)[solid].mean(), error[3].mean(), overlap])
    colour, alpha, iou = (sums / many).tolist()
    return -10 * math.log10(colour / 4), -10 * math.log10(alpha / 4), iou


def train(team: Team, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = build().to(options.device)
    opts = optimisers(model.named_parameters(), lambda name, p: p.ndim == 2 and name.startswith("blocks"), options.rate, 1 / 10, adam_decay=0.01)
    run = Run(model, opts, os.path.join(options.work, "decoder.pt"), team, options)
    generator = torch.Generator().manual_seed(70 + run.step + 10**7 * team.rank)
    known: dict[int, Layouts] = {}

    def losses(layouts: Layouts, which: range) -> Iterator[Tensor]:
        for index in which:
            latent, layers, regions = example(layouts, index, generator, AUGMENTATION)
            yield loss_of(joined(model.pictures(latent.to(options.device), regions, WHOLE)), joined(layers).to(options.device)) / len(which)

    def report() -> None:
        run.save()
        found = {frames: held_out(model, Layouts(options.work, frames, dataset.shards(options.work, frames)[:1]), 24) for frames in known}
        print(f"  {run.step} held out (colour dB, alpha dB, IoU): {found}", flush=True)

    for _ in run.steps(flat=0.3):
        if run.step % 200 == 0 or not known:
            take_up(known, options.work)
        layouts = known[9 if 9 in known and float(torch.rand((), generator=generator)) < CLIPS else 1]
        run.update(losses(layouts, layouts.batch(TOKENS, generator)))
        if run.every(100):
            print(f"{run.step} {run.seconds:.0f}s loss {run.means()[0]:.4f}", flush=True)
        if run.due("report", 150):
            report()
    if team.rank == 0:
        report()


def main() -> None:
    options = parser(__doc__, minutes=20, rate=0.02, adam="a tenth", port=29543)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    launch(train, options.parse_args())


if __name__ == "__main__":
    main()
