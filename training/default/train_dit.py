"""Cache latents of drawn clips, then train the transformer on them with rectified flow.

python -m tessera.training.default.train_dit fold  --work DIR                 latent statistics; writes DIR/vae_folded.pt
python -m tessera.training.default.train_dit cache --work DIR --clips 2500    writes DIR/latents/*.pt (runs beside training)
python -m tessera.training.default.train_dit train --work DIR --minutes 70 [--resume] [--device cuda]

The first n latent frames of a clip are the latents of its first 4n - 3 frames (the encoder is causal), so training starts
on short prefixes of the same cache and ends on whole clips.
"""

import argparse
import glob
import math
import os
import time

import torch

from tessera.models.default import networks, sampling, vocabulary

from ..optimizer import Muon, launch, set_rate
from . import clips

# (until this fraction of the time, latent frames, batch)
STAGES = ((0.22, 3, 24), (0.34, 5, 16), (9.0, 9, 8))


def load_vae(work, name="vae_folded.pt", device="cpu"):
    model = networks.build_vae()
    model.load_state_dict(torch.load(os.path.join(work, name), weights_only=True, map_location="cpu")["model"])
    return networks.channels_last(model.to(device)).eval()


@torch.no_grad()
def fold(o):
    """Measure channel statistics on whole 33 x 128 x 128 clips and fold Wan 2.1's into the VAE."""
    vae = load_vae(o.work, "vae.pt", o.device)
    g = torch.Generator(o.device).manual_seed(5)
    z = torch.cat([vae.encode(clips.draw(c[None], 33, 128, g)) for c in clips.random_captions(o.clips, g, o.device)])
    mean, std = z.mean((0, 2, 3, 4)).cpu(), z.std((0, 2, 3, 4)).cpu()
    print("latent mean", mean.tolist(), "std", std.tolist())
    networks.fold_statistics(vae.cpu(), mean, std)
    torch.save(dict(model=vae.state_dict(), mean=mean, std=std), os.path.join(o.work, "vae_folded.pt"))


@torch.no_grad()
def cache(o):
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
        torch.save(dict(z=z, captions=captions.cpu()), path + ".tmp")
        os.replace(path + ".tmp", path)
        print(f"shard {n} {time.time() - begin:.0f}s std {z.float().std():.3f} max {z.abs().max():.1f}", flush=True)


def load_latents(paths):
    parts = [torch.load(p, weights_only=True) for p in paths]
    return torch.cat([p["z"] for p in parts]), torch.cat([p["captions"] for p in parts])


def draw_sigma(n, g, device, shift=3.0):
    """Shifted logit-normal noise levels, one in five uniform before the shift."""
    u = torch.sigmoid(torch.randn(n, generator=g, device=device))
    u = torch.where(torch.rand(n, generator=g, device=device) < 0.2, torch.rand(n, generator=g, device=device), u)
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(model, x0, noise, sigma, context, bf16=False, weight=None):
    """Mean squared velocity error; weight (16,) per channel."""
    s = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
        v = model(s * noise + (1 - s) * x0, 1000 * sigma, context)
    error = (v.float() - (noise - x0)).square().mean((0, 2, 3, 4))
    return error.mean() if weight is None else (error * weight).sum() / weight.sum()


@torch.no_grad()
def held_out_loss(model, z, captions, bf16):
    """Fixed noise and levels."""
    g = torch.Generator().manual_seed(9)
    noise, sigma = torch.randn(z.shape, generator=g).to(z.device), (torch.arange(len(z)) % 12 + 0.5).to(z.device) / 12
    sigma = 3 * sigma / (1 + 2 * sigma)
    context = vocabulary.embed(captions).to(z.device)
    parts = [slice(i, i + 12) for i in range(0, 36, 12)]
    return sum(float(flow_loss(model, z[i], noise[i], sigma[i], context[i], bf16)) for i in parts) / len(parts)


def train(team, o):
    torch.set_num_threads(o.threads)
    folder = os.path.join(o.work, "latents")
    path = os.path.join(o.work, "dit.pt")
    model = networks.init_transformer(networks.build_transformer()).to(o.device)
    ema = networks.build_transformer().to(o.device)
    ema.load_state_dict(model.state_dict())
    vae = load_vae(o.work, device=o.device)
    # channels the VAE hardly uses (before whitening) count less
    weight = (torch.load(os.path.join(o.work, "vae_folded.pt"), weights_only=True)["std"] / 0.5).clamp(0.2, 1).to(o.device)
    big = [p for k, p in model.named_parameters() if k.startswith("blocks") and p.ndim == 2]
    ids = {id(p) for p in big}
    rest = [p for p in model.parameters() if id(p) not in ids]
    opts = [Muon(big, o.rate, decay=0.01), torch.optim.AdamW(rest, o.rate / 10, (0.9, 0.98), weight_decay=0)]
    step, used, seen = 0, 0.0, 0
    if o.resume:
        saved = torch.load(path, weights_only=True, map_location=o.device)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for opt, s in zip(opts, saved["opt"], strict=True):
            opt.load_state_dict(s)
        step, used, seen = saved["step"], saved["used"], saved["seen"]
    g = torch.Generator().manual_seed(50 + step + 10**7 * team.rank)
    zh, ch = load_latents([os.path.join(folder, "000.pt")])
    zh = zh.float().to(o.device)
    names: list = []
    log: list = []
    z = captions = torch.empty(0)
    begin, total, mark, sampled = time.time() - used, o.minutes * 60, time.time(), time.time()

    def save():
        torch.save(
            dict(model=model.state_dict(), ema=ema.state_dict(), opt=[x.state_dict() for x in opts], step=step, used=time.time() - begin, seen=seen),
            path + ".tmp",
        )
        os.replace(path + ".tmp", path)

    def samples():
        c = clips.random_captions(12, torch.Generator().manual_seed(step))
        x = sampling.latents(ema, c, seed=step, cfg=o.cfg)
        y = sampling.decode(vae, x)
        read = [clips.score(v) for v in y]
        right = [sum(r[i] == int(k[i]) for r, k in zip(read, c, strict=True)) for i in range(3)]
        print(f"  {step} samples: std {x.std():.2f} colour {right[0]}/12 shape {right[1]}/12 motion {right[2]}/12", flush=True)
        sampling.sheet(list(y.cpu()), os.path.join(o.work, f"sheet_{step:05d}.png"))

    while True:
        f = team.agree((time.time() - begin) / total)
        if f >= 1:
            break
        if step % 50 == 0 or not names:  # take up shards that the cache has added
            found = sorted(glob.glob(os.path.join(folder, "[0-9]*.pt")))[1:]
            if found != names:
                z, captions = load_latents(found)
                names = found
        frames, batch = next(s[1:] for s in STAGES if f < s[0])
        batch //= team.size
        flat = 0.45
        set_rate(opts, min(1, (step + 1) / 100) * (1 if f < flat else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (f - flat) / (1 - flat)))))
        pick = torch.randint(len(z), (batch,), generator=g)
        said = torch.rand(batch, 3, generator=g) > 0.06
        said &= torch.rand(batch, 1, generator=g) > 0.12
        context = vocabulary.embed(torch.where(said, captions[pick], -1)).to(o.device)
        x0 = z[pick, :, :frames].float().to(o.device)
        noise = torch.randn(x0.shape, generator=g).to(o.device)
        loss = flow_loss(model, x0, noise, draw_sigma(batch, g, "cpu").to(o.device), context, o.bf16, weight)
        model.zero_grad()
        loss.backward()
        team.average(list(model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        step, seen = step + 1, seen + batch * team.size
        with torch.no_grad():
            d = min(0.998, (step + 1) / (step + 20))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
        log.append(loss.item())
        if team.rank:
            continue
        if step % 50 == 0:
            t = time.time() - begin
            print(
                f"{step} {t:.0f}s seen {seen} of {len(z)} clips, frames {frames} batch {batch * team.size} loss {sum(log) / len(log):.4f} "
                f"rate {opts[0].param_groups[0]['lr']:.4f}",
                flush=True,
            )
            log = []
        if time.time() - mark > 120:
            save()
            print(f"  {step} held-out loss {held_out_loss(ema, zh, ch, o.bf16):.4f}", flush=True)
            mark = time.time()
        if time.time() - sampled > o.sample_every * 60:
            samples()
            sampled = time.time()
    if team.rank:
        return
    save()
    print(f"done: {step} steps, {seen} samples, {time.time() - begin:.0f}s, held-out loss {held_out_loss(ema, zh, ch, o.bf16):.4f}")
    samples()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=("fold", "cache", "train"))
    ap.add_argument("--work", required=True)
    ap.add_argument("--clips", type=int, default=64)
    ap.add_argument("--minutes", type=float, default=70, help="total, including the time before --resume")
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--rate", type=float, default=0.02, help="Muon step; AdamW uses a tenth of it")
    ap.add_argument("--bf16", action="store_true")
    ap.add_argument("--cfg", type=float, default=3.0)
    ap.add_argument("--sample-every", type=float, default=10, help="minutes")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--workers", type=int, default=1, help="training processes that average gradients, one thread each if more than one")
    ap.add_argument("--rank", type=int, default=-1, help="start only this worker here")
    ap.add_argument("--port", type=int, default=29532)
    o = ap.parse_args()
    torch.set_num_threads(o.threads)
    if o.what == "train":
        launch(train, o)
    else:
        dict(fold=fold, cache=cache)[o.what](o)


if __name__ == "__main__":
    main()
