"""Train the VAE on drawn clips.

python -m tessera.training.default.train_vae --work DIR --minutes 40 [--resume] [--decoder-only] [--device cuda]

Writes DIR/vae.pt (weights, optimiser state, time used). --decoder-only keeps the encoder, hence all latents, as they are
and writes DIR/vae_decoder.pt, starting from DIR/vae.pt.
"""

from __future__ import annotations

import argparse
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.models.default import networks

from ..loop import Run, launch, optimisers, parser
from ..optimizer import Team
from . import clips

# (until this fraction of the time, [(batch, frames, side)]): crops first, whole frames last
STAGES = ((0.3, [(6, 5, 32)]), (0.65, [(4, 9, 32), (6, 5, 40)]), (0.88, [(2, 9, 64), (1, 17, 64), (4, 5, 64)]), (9.0, [(1, 9, 128), (2, 17, 64)]))
STAGES_DECODER = ((0.7, [(2, 9, 64), (1, 17, 64), (4, 9, 40)]), (9.0, [(1, 9, 128), (2, 17, 64)]))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of clips in [-1, 1]."""
    return float(-10 * torch.log10((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean() / 4))


@torch.no_grad()
def held_out(model: networks.WanVAE, n: int = 6, frames: int = 33, size: int = 128, seed: int = 10**6, device: str = "cpu") -> list[float]:
    """PSNR of each of n whole clips never used in training (own seed)."""
    g = torch.Generator(device).manual_seed(seed)
    captions = clips.random_captions(n, g, device)
    out = []
    for c in captions:
        x = clips.draw(c[None], frames, size, g)
        out.append(psnr(model.decode(model.encode(x)), x))
    return out


def hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether a weight of the VAE is for Muon: convolutions, but the first and the last one."""
    return parameter.ndim >= 4 and "gamma" not in name and "decoder.head" not in name and name != "encoder.conv1.weight"


def train(team: Team, o: argparse.Namespace) -> None:
    os.makedirs(o.work, exist_ok=True)
    model = networks.init_vae(networks.build_vae())
    if o.decoder_only and not o.resume:
        model.load_state_dict(torch.load(os.path.join(o.work, "vae.pt"), weights_only=True)["model"])
    networks.channels_last(model.to(o.device))
    trained = [(k, p) for k, p in model.named_parameters() if not o.decoder_only or k.startswith(("decoder", "conv2"))]
    path = os.path.join(o.work, "vae_decoder.pt" if o.decoder_only else "vae.pt")
    run = Run(model, optimisers(trained, hidden, o.rate, 1 / 4), path, team, o)
    g = torch.Generator(o.device).manual_seed(1 + run.step + 7 * o.decoder_only + 10**7 * team.rank)
    for done in run.steps(flat=0.2 if o.decoder_only else 0.35):
        sizes = next(s for until, s in (STAGES_DECODER if o.decoder_only else STAGES) if done < until)
        batch, frames, side = sizes[run.step % len(sizes)]
        x = clips.draw(clips.random_captions(batch, g, o.device), frames, 128, g, (side, 0.85) if side < 128 else None)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        with torch.set_grad_enabled(not o.decoder_only):
            mean, logvar = model.moments(x)
            logvar = logvar.clamp(-12, 4)
        z = mean + torch.randn(mean.shape, generator=g, device=o.device) * (0.5 * logvar).exp()
        y = model.decode(z)
        mse, l1 = F.mse_loss(y, x), F.l1_loss(y, x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        figures = (mse.item(), l1.item(), kl.item(), mean.std().item(), (0.5 * logvar).exp().mean().item())
        run.update([2 * mse + 0.1 * l1 + (0 if o.decoder_only else o.kl) * kl], figures)
        if run.every(100):
            a = run.means()
            print(
                f"{run.step} {run.seconds:.0f}s {batch, frames, side} psnr {-10 * math.log10(a[0] / 4):.2f} l1 {a[1]:.4f} kl {a[2]:.2f} "
                f"latent std {a[3]:.2f} noise {a[4]:.3f} rate {run.rate:.4f}",
                flush=True,
            )
        if run.due("save", 120):
            run.save()
            p = held_out(model, device=o.device)
            print(f"  {run.step} {run.seconds:.0f}s held-out 33x128 psnr mean {sum(p) / len(p):.2f} min {min(p):.2f} max {max(p):.2f}", flush=True)
    if team.rank == 0:
        run.save()
        p = held_out(model, device=o.device)
        print(f"done: {run.step} steps {run.seconds:.0f}s held-out psnr mean {sum(p) / len(p):.2f} min {min(p):.2f}", flush=True)


if __name__ == "__main__":
    options = parser(__doc__, minutes=40, rate=0.02, adam="a quarter", port=29531, threads=2)
    options.add_argument("--decoder-only", action="store_true")
    options.add_argument("--device", default="cpu")
    options.add_argument("--kl", type=float, default=1e-4)
    launch(train, options.parse_args())
