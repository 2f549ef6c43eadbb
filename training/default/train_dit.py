"""Cache latents of drawn clips, then train the transformer on them with rectified flow.

python -m tessera.training.default.train_dit fold  --work DIR                 latent statistics; writes DIR/vae_folded.pt
python -m tessera.training.default.train_dit cache --work DIR --clips 2500    writes DIR/latents/*.pt (runs beside training)
python -m tessera.training.default.train_dit train --work DIR --minutes 70 [--resume] [--device cuda]

The first n latent frames of a clip are the latents of its first 4n - 3 frames (the encoder is causal), so training starts
on short prefixes of the same cache and ends on whole clips.
"""

from __future__ import annotations

import argparse
import glob
import os
import time

import torch
from torch import Tensor

from tessera.models.default import networks, sampling, vocabulary

from ..loop import Run, launch, optimisers, parser, store
from ..optimizer import Team
from . import clips

# (until this fraction of the time, latent frames, batch)
STAGES = ((0.22, 3, 24), (0.34, 5, 16), (9.0, 9, 8))


def load_vae(work: str, name: str = "vae_folded.pt", device: str = "cpu") -> networks.WanVAE:
    model = networks.build_vae()
    model.load_state_dict(torch.load(os.path.join(work, name), weights_only=True, map_location="cpu")["model"])
    return networks.channels_last(model.to(device)).eval()


@torch.no_grad()
def fold(o: argparse.Namespace) -> None:
    """Measure channel statistics on whole 33 x 128 x 128 clips and fold Wan 2.1's into the VAE."""
    vae = load_vae(o.work, "vae.pt", o.device)
    g = torch.Generator(o.device).manual_seed(5)
    z = torch.cat([vae.encode(clips.draw(c[None], 33, 128, g)) for c in clips.random_captions(o.clips, g, o.device)])
    mean, std = z.mean((0, 2, 3, 4)).cpu(), z.std((0, 2, 3, 4)).cpu()
    print("latent mean", mean.tolist(), "std", std.tolist())
    networks.fold_statistics(vae.cpu(), mean, std)
    store(dict(model=vae.state_dict(), mean=mean, std=std), os.path.join(o.work, "vae_folded.pt"))


@torch.no_grad()
def cache(o: argparse.Namespace) -> None:
    """Shards of 72 clips, one of each caption; shard 000 is held out."""
    vae = load_vae(o.work, device=o.device)
    os.makedirs(os.path.join(o.work, "latents"), exist_ok=True)
    begin = time.time()
    for n in range(-(-o.clips // 72) + 1):
        path = os.path.join(o.work, "latents", f"{n:03d}.pt")
        if os.path.exists(path):
            continue
        g = torch.Generator(o.device).manual_seed(100 + n)
        captions = clips.random_captions(72, g, o.device)
        z = torch.cat([networks.whiten(vae.encode(clips.draw(c[None], 33, 128, g))).half().cpu() for c in captions])
        store(dict(z=z, captions=captions.cpu()), path)
        print(f"shard {n} {time.time() - begin:.0f}s std {z.float().std():.3f} max {z.abs().max():.1f}", flush=True)


def load_latents(paths: list[str]) -> tuple[Tensor, Tensor]:
    parts = [torch.load(p, weights_only=True) for p in paths]
    return torch.cat([p["z"] for p in parts]), torch.cat([p["captions"] for p in parts])


def draw_sigma(n: int, g: torch.Generator, device: str, shift: float = 3.0) -> Tensor:
    """Shifted logit-normal noise levels, one in five uniform before the shift."""
    u = torch.sigmoid(torch.randn(n, generator=g, device=device))
    u = torch.where(torch.rand(n, generator=g, device=device) < 0.2, torch.rand(n, generator=g, device=device), u)
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(
    model: networks.WanTransformer, x0: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, bf16: bool = False, weight: Tensor | None = None
) -> Tensor:
    """Mean squared velocity error; weight (16,) per channel."""
    s = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
        v = model(s * noise + (1 - s) * x0, 1000 * sigma, context)
    error = (v.float() - (noise - x0)).square().mean((0, 2, 3, 4))
    return error.mean() if weight is None else (error * weight).sum() / weight.sum()


@torch.no_grad()
def held_out_loss(model: networks.WanTransformer, z: Tensor, captions: Tensor, bf16: bool) -> float:
    """Fixed noise and levels."""
    g = torch.Generator().manual_seed(9)
    noise, sigma = torch.randn(z.shape, generator=g).to(z.device), (torch.arange(len(z)) % 12 + 0.5).to(z.device) / 12
    sigma = 3 * sigma / (1 + 2 * sigma)
    context = vocabulary.embed(captions).to(z.device)
    parts = [slice(i, i + 12) for i in range(0, 36, 12)]
    return sum(float(flow_loss(model, z[i], noise[i], sigma[i], context[i], bf16)) for i in parts) / len(parts)


def samples(model: networks.WanTransformer, vae: networks.WanVAE, step: int, o: argparse.Namespace) -> None:
    """Twelve clips, read, and as a sheet."""
    c = clips.random_captions(12, torch.Generator().manual_seed(step))
    x = sampling.latents(model, c, seed=step, cfg=o.cfg)
    y = sampling.decode(vae, x)
    read = [clips.score(v) for v in y]
    right = [sum(r[i] == int(k[i]) for r, k in zip(read, c, strict=True)) for i in range(3)]
    print(f"  {step} samples: std {x.std():.2f} colour {right[0]}/12 shape {right[1]}/12 motion {right[2]}/12", flush=True)
    sampling.sheet(list(y.cpu()), os.path.join(o.work, f"sheet_{step:05d}.png"))


def train(team: Team, o: argparse.Namespace) -> None:
    folder = os.path.join(o.work, "latents")
    model = networks.init_transformer(networks.build_transformer()).to(o.device)
    vae = load_vae(o.work, device=o.device)
    # channels the VAE hardly uses (before whitening) count less
    weight = (torch.load(os.path.join(o.work, "vae_folded.pt"), weights_only=True)["std"] / 0.5).clamp(0.2, 1).to(o.device)
    opts = optimisers(model.named_parameters(), lambda name, p: name.startswith("blocks") and p.ndim == 2, o.rate, 1 / 10, decay=0.01)
    run = Run(model, opts, os.path.join(o.work, "dit.pt"), team, o, average=0.998)
    g = torch.Generator().manual_seed(50 + run.step + 10**7 * team.rank)
    zh, ch = load_latents([os.path.join(folder, "000.pt")])
    zh = zh.float().to(o.device)
    names: list[str] = []
    z = captions = torch.empty(0)
    for done in run.steps(flat=0.45):
        if run.step % 50 == 0 or not names:  # take up shards that the cache has added
            found = sorted(glob.glob(os.path.join(folder, "[0-9]*.pt")))[1:]
            if found != names:
                z, captions = load_latents(found)
                names = found
        frames, batch = next(s[1:] for s in STAGES if done < s[0])
        batch //= team.size
        pick = torch.randint(len(z), (batch,), generator=g)
        said = torch.rand(batch, 3, generator=g) > 0.06
        said &= torch.rand(batch, 1, generator=g) > 0.12
        context = vocabulary.embed(torch.where(said, captions[pick], -1)).to(o.device)
        x0 = z[pick, :, :frames].float().to(o.device)
        noise = torch.randn(x0.shape, generator=g).to(o.device)
        run.update([flow_loss(model, x0, noise, draw_sigma(batch, g, "cpu").to(o.device), context, o.bf16, weight)], samples=batch)
        if run.every(50):
            print(
                f"{run.step} {run.seconds:.0f}s seen {run.seen} of {len(z)} clips, frames {frames} batch {batch * team.size} "
                f"loss {run.means()[0]:.4f} rate {run.rate:.4f}",
                flush=True,
            )
        if run.due("save", 120):
            run.save()
            print(f"  {run.step} held-out loss {held_out_loss(run.average, zh, ch, o.bf16):.4f}", flush=True)
        if run.due("sample", o.sample_every * 60):
            samples(run.average, vae, run.step, o)
    if team.rank == 0:
        run.save()
        held = held_out_loss(run.average, zh, ch, o.bf16)
        print(f"done: {run.step} steps, {run.seen} samples, {run.seconds:.0f}s, held-out loss {held:.4f}")
        samples(run.average, vae, run.step, o)


def main() -> None:
    ap = parser(__doc__, minutes=70, rate=0.02, adam="a tenth", port=29532, threads=2)
    ap.add_argument("what", choices=("fold", "cache", "train"))
    ap.add_argument("--clips", type=int, default=64)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--bf16", action="store_true")
    ap.add_argument("--cfg", type=float, default=3.0)
    ap.add_argument("--sample-every", type=float, default=10, help="minutes")
    o = ap.parse_args()
    torch.set_num_threads(o.threads)
    if o.what == "train":
        launch(train, o)
    else:
        dict(fold=fold, cache=cache)[o.what](o)


if __name__ == "__main__":
    main()
