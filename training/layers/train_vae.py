"""Train the VAE of the layered weights on drawn layers over grey and on merged pictures.

python -m tessera.training.layers.train_vae train --work DIR --minutes 15 [--workers 2] [--resume]    writes DIR/vae.pt
python -m tessera.training.layers.train_vae fold  --work DIR                                          statistics; DIR/vae_folded.pt

It starts from the VAE of the default video model.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tessera.models.default import networks
from tessera.models.layers.regions import MAX_FOREGROUNDS, TOKEN
from tessera.models.layers.transparent_vae import grey_blended

from ..default import export
from ..optimizer import Muon, launch, resume, set_rate, store
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


def load_vae(work: str, name: str = "vae_folded.pt") -> networks.WanVAE:
    model = networks.build_vae()
    model.load_state_dict(torch.load(os.path.join(work, name), weights_only=True)["model"])
    return networks.channels_last(model).eval()


def psnr(a: Tensor, b: Tensor) -> float:
    """dB of pictures in -1..1."""
    return float(-10 * torch.log10((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean() / 4))


@torch.no_grad()
def held_out(model: networks.WanVAE, frames: int = 1, many: int = 24) -> tuple[float, float]:
    """Mean and least PSNR of whole canvases of a seed of their own."""
    generator = torch.Generator().manual_seed(10**6)
    found = [psnr(model.decode(model.encode(x)), x) for x in (picture(frames, 0, generator)[None] for _ in range(many))]
    return sum(found) / many, min(found)


def train(team, options) -> None:
    torch.set_num_threads(options.threads)
    os.makedirs(options.work, exist_ok=True)
    path = os.path.join(options.work, "vae.pt")
    model = networks.build_vae()
    model.load_state_dict({name: value.float() for name, value in load_file(Path(export.HERE, export.VAE_FILE)).items()})
    networks.channels_last(model)
    big = [p for k, p in model.named_parameters() if p.ndim >= 4 and "gamma" not in k and "decoder.head" not in k and k != "encoder.conv1.weight"]
    ids = {id(p) for p in big}
    optimisers = [Muon(big, options.rate), torch.optim.AdamW([p for p in model.parameters() if id(p) not in ids], options.rate / 4, (0.9, 0.98))]
    step, used = 0, 0.0
    if options.resume:
        saved = resume(path, model, optimisers)
        step, used = saved["step"], saved["used"]
    generator = torch.Generator().manual_seed(1 + step + 10**7 * team.rank)
    begin, total, mark, log = time.time() - used, options.minutes * 60, time.time(), []

    def save() -> None:
        state = dict(model=model.state_dict(), optimisers=[x.state_dict() for x in optimisers], step=step, used=time.time() - begin)
        store(state, path)

    while (done := team.agree((time.time() - begin) / total)) < 1:
        sizes = next(sizes for until, sizes in STAGES if done < until)
        batch, frames, side = sizes[step % len(sizes)]
        set_rate(optimisers, min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * max(0.0, (done - 0.3) / 0.7)))))
        x = torch.stack([picture(frames, side, generator) for _ in range(batch)]).contiguous(memory_format=torch.channels_last_3d)
        mean, logvar = model.moments(x)
        logvar = logvar.clamp(-12, 4)
        y = model.decode(mean + torch.randn(mean.shape, generator=generator) * (0.5 * logvar).exp())
        mse = F.mse_loss(y, x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        model.zero_grad()
        (2 * mse + 0.1 * F.l1_loss(y, x) + options.kl * kl).backward()
        team.average(list(model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step += 1
        log.append((mse.item(), kl.item()))
        if team.rank == 0 and step % 100 == 0:
            mse_mean, kl_mean = torch.tensor(log).mean(0).tolist()
            print(f"{step} {time.time() - begin:.0f}s psnr {-10 * math.log10(mse_mean / 4):.2f} kl {kl_mean:.2f}", flush=True)
            log = []
        if team.rank == 0 and time.time() - mark > 120:
            save()
            print(f"  {step} held out: pictures {held_out(model)}", flush=True)
            mark = time.time()
    if team.rank == 0:
        save()
        print(f"done: {step} steps, held out: pictures {held_out(model)}, clips {held_out(model, 9, 8)}", flush=True)


@torch.no_grad()
def fold(options) -> None:
    """Measure channel statistics of merged pictures, grounds and foregrounds in their boxes, and fold Wan 2.1's into the VAE."""
    model = load_vae(options.work, "vae.pt")
    generator = torch.Generator().manual_seed(5)
    found = [model.encode(picture(frames, 0, generator)[None]).flatten(2)[0] for frames in (1, 9) for _ in range(150)]
    z = torch.cat(found, 1)
    mean, std = z.mean(1), z.std(1)
    print("latent mean", mean.tolist(), "std", std.tolist())
    networks.fold_statistics(model, mean, std)
    torch.save(dict(model=model.state_dict(), mean=mean, std=std), os.path.join(options.work, "vae_folded.pt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "fold"))
    parser.add_argument("--work", required=True)
    parser.add_argument("--minutes", type=float, default=15, help="total, including the time before --resume")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--rate", type=float, default=0.01, help="Muon step; AdamW uses a quarter of it")
    parser.add_argument("--kl", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that average gradients")
    parser.add_argument("--rank", type=int, default=-1, help="start only this worker here")
    parser.add_argument("--port", type=int, default=29541)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "fold":
        fold(options)
    else:
        launch(train, options)


if __name__ == "__main__":
    main()
