"""Train the VAE of the layered weights on drawn layers over grey and on merged pictures.

python -m tessera.training.layers.train_vae train --work DIR --minutes 15 [--workers 2] [--resume]    writes DIR/vae.pt
python -m tessera.training.layers.train_vae fold  --work DIR                                          statistics; DIR/vae_folded.pt

It starts from the VAE of the default video model.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tessera.models.default import networks
from tessera.models.layers.regions import MAX_FOREGROUNDS, TOKEN
from tessera.models.layers.transparent_vae import grey_blended

from ..default import export
from ..default.train_dit import load_vae
from ..default.train_vae import hidden, psnr
from ..loop import Run, launch, optimisers, parser, store
from ..optimizer import Team
from . import drawn

# until this fraction of the time: (batch, frames, side) in turn; side 0: whole canvases
STAGES = (
    (0.55, ((8, 1, 48), (2, 9, 48), (6, 1, 64))),
    (0.8, ((6, 1, 64), (1, 9, 64), (4, 1, 80))),
    (9.0, ((1, 1, 0), (6, 1, 64), (1, 9, 0), (4, 1, 80))),
)


def below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def over_grey(layer: Tensor) -> Tensor:
    """`(frames, height, width, 4)` in 0..1 -> `(3, frames, height, width)` in -1..1, as the VAE sees a layer."""
    return grey_blended(layer).movedim(-1, 0) * 2 - 1


def layer_on_canvas(side: int, frames: int, generator: torch.Generator) -> Tensor:
    """`(frames, side, side, 4)`: one foreground somewhere on a transparent canvas."""
    limit = max(1, min(6, side // TOKEN - 1))
    width, height = (TOKEN * (1 + below(limit, generator)) for _ in range(2))
    said = drawn.caption(1, generator, 1.0 if frames > 1 else 0.2)
    out = torch.zeros(frames, side, side, 4)
    x, y = (below((side - size) // 8 + 1, generator) * 8 for size in (width, height))
    out[:, y : y + height, x : x + width] = drawn.foreground(said.kinds[0], width, height, frames)
    return out


def picture(frames: int, side: int, generator: torch.Generator) -> Tensor:
    """`(3, frames, height, width)` in -1..1: merged, a foreground over grey, or a ground. side 0: a whole canvas."""
    what = float(torch.rand((), generator=generator))
    if what < 0.4:
        return over_grey(layer_on_canvas(side or 96, frames, generator))
    said = drawn.caption(foregrounds := drawn.count(generator, MAX_FOREGROUNDS), generator, 0.7 if frames > 1 else 0.1)
    regions = drawn.layout(foregrounds, generator, 8 if frames > 1 else 10)
    boxes = [drawn.pixels(box) for box in regions.boxes]
    _, _, width, height = boxes[0]
    layers = [
        (box, drawn.foreground(kind, *box[2:], frames)) for box, kind in zip(boxes[2:], drawn.assign(said, foregrounds, generator), strict=True)
    ]
    back = drawn.ground(said.ground, width, height, generator)
    out = drawn.merged(back, layers if what < 0.92 else []).movedim(-1, 0) * 2 - 1
    out = out.expand(-1, frames, -1, -1)
    if not side:
        return out
    x, y = below(width - side + 1, generator), below(height - side + 1, generator)
    return out[..., y : y + side, x : x + side]


@torch.no_grad()
def held_out(model: networks.WanVAE, frames: int = 1, many: int = 24) -> tuple[float, float]:
    """Mean and least PSNR of whole canvases of a seed of their own."""
    generator = torch.Generator().manual_seed(10**6)
    found = [psnr(model.decode(model.encode(x)), x) for x in (picture(frames, 0, generator)[None] for _ in range(many))]
    return sum(found) / many, min(found)


def train(team: Team, options: argparse.Namespace) -> None:
    os.makedirs(options.work, exist_ok=True)
    model = networks.build_vae()
    model.load_state_dict({name: value.float() for name, value in load_file(Path(export.HERE, export.VAE_FILE)).items()})
    networks.channels_last(model)
    opts = optimisers(model.named_parameters(), hidden, options.rate, 1 / 4, adam_decay=0.01)
    run = Run(model, opts, os.path.join(options.work, "vae.pt"), team, options)
    generator = torch.Generator().manual_seed(1 + run.step + 10**7 * team.rank)
    for done in run.steps(warmup=50, flat=0.3, floor=0.02):
        sizes = next(sizes for until, sizes in STAGES if done < until)
        batch, frames, side = sizes[run.step % len(sizes)]
        x = torch.stack([picture(frames, side, generator) for _ in range(batch)]).contiguous(memory_format=torch.channels_last_3d)
        mean, logvar = model.moments(x)
        logvar = logvar.clamp(-12, 4)
        y = model.decode(mean + torch.randn(mean.shape, generator=generator) * (0.5 * logvar).exp())
        mse = F.mse_loss(y, x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        run.update([2 * mse + 0.1 * F.l1_loss(y, x) + options.kl * kl], (mse.item(), kl.item()))
        if run.every(100):
            mse_mean, kl_mean = run.means()
            print(f"{run.step} {run.seconds:.0f}s psnr {-10 * math.log10(mse_mean / 4):.2f} kl {kl_mean:.2f}", flush=True)
        if run.due("save", 120):
            run.save()
            print(f"  {run.step} held out: pictures {held_out(model)}", flush=True)
    if team.rank == 0:
        run.save()
        print(f"done: {run.step} steps, held out: pictures {held_out(model)}, clips {held_out(model, 9, 8)}", flush=True)


@torch.no_grad()
def fold(options: argparse.Namespace) -> None:
    """Measure channel statistics of merged pictures, grounds and foregrounds in their boxes, and fold Wan 2.1's into the VAE."""
    model = load_vae(options.work, "vae.pt")
    generator = torch.Generator().manual_seed(5)
    found = [model.encode(picture(frames, 0, generator)[None]).flatten(2)[0] for frames in (1, 9) for _ in range(150)]
    z = torch.cat(found, 1)
    mean, std = z.mean(1), z.std(1)
    print("latent mean", mean.tolist(), "std", std.tolist())
    networks.fold_statistics(model, mean, std)
    store(dict(model=model.state_dict(), mean=mean, std=std), os.path.join(options.work, "vae_folded.pt"))


def main() -> None:
    options = parser(__doc__, minutes=15, rate=0.01, adam="a quarter", port=29541)
    options.add_argument("what", choices=("train", "fold"))
    options.add_argument("--kl", type=float, default=1e-4)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.what == "fold":
        fold(chosen)
    else:
        launch(train, chosen)


if __name__ == "__main__":
    main()
