"""Train the VAE on drawn clips.

python -m tessera.training.default.train_vae --work DIR --minutes 40 [--resume] [--decoder-only] [--device cuda]

Writes DIR/vae.pt (weights, optimiser state, time used). --decoder-only keeps the encoder, hence all latents, as they are
and writes DIR/vae_decoder.pt, starting from DIR/vae.pt.
"""

import argparse
import math
import os
import time

import torch
import torch.nn.functional as F

from tessera.models.default import networks

from ..optimizer import Muon, launch, set_rate
from . import clips

# (until this fraction of the time, [(batch, frames, side)]): crops first, whole frames last
STAGES = ((0.3, [(6, 5, 32)]), (0.65, [(4, 9, 32), (6, 5, 40)]), (0.88, [(2, 9, 64), (1, 17, 64), (4, 5, 64)]), (9.0, [(1, 9, 128), (2, 17, 64)]))
STAGES_DECODER = ((0.7, [(2, 9, 64), (1, 17, 64), (4, 9, 40)]), (9.0, [(1, 9, 128), (2, 17, 64)]))


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of clips in [-1, 1]."""
    return float(-10 * torch.log10((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean() / 4))


@torch.no_grad()
def held_out(model, n=6, frames=33, size=128, seed=10**6, device="cpu"):
    """PSNR of each of n whole clips never used in training (own seed)."""
    g = torch.Generator(device).manual_seed(seed)
    captions = clips.random_captions(n, g, device)
    out = []
    for c in captions:
        x = clips.draw(c[None], frames, size, g)
        out.append(psnr(model.decode(model.encode(x)), x))
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", required=True)
    ap.add_argument("--minutes", type=float, default=40, help="total, including the time before --resume")
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--decoder-only", action="store_true")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--rate", type=float, default=0.02, help="Muon step; AdamW uses a quarter of it")
    ap.add_argument("--kl", type=float, default=1e-4)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--workers", type=int, default=1, help="processes that average gradients, one thread each if more than one")
    ap.add_argument("--rank", type=int, default=-1, help="start only this worker here")
    ap.add_argument("--port", type=int, default=29531)
    launch(run, ap.parse_args())


def run(team, o):
    torch.set_num_threads(o.threads)
    os.makedirs(o.work, exist_ok=True)
    path = os.path.join(o.work, "vae_decoder.pt" if o.decoder_only else "vae.pt")
    model = networks.init_vae(networks.build_vae())
    saved = torch.load(path, weights_only=True) if o.resume else None
    if saved:
        model.load_state_dict(saved["model"])
    elif o.decoder_only:
        model.load_state_dict(torch.load(os.path.join(o.work, "vae.pt"), weights_only=True)["model"])
    networks.channels_last(model.to(o.device))
    trained = [(k, p) for k, p in model.named_parameters() if not o.decoder_only or k.startswith(("decoder", "conv2"))]
    big = [p for k, p in trained if p.ndim >= 4 and "gamma" not in k and "decoder.head" not in k and k != "encoder.conv1.weight"]
    ids = {id(p) for p in big}
    opts = [Muon(big, o.rate), torch.optim.AdamW([p for _, p in trained if id(p) not in ids], o.rate / 4, (0.9, 0.98), weight_decay=0)]
    step, used = 0, 0.0
    if saved:
        step, used = saved["step"], saved["used"]
        for opt, s in zip(opts, saved["opt"], strict=True):
            opt.load_state_dict(s)
    g = torch.Generator(o.device).manual_seed(1 + step + 7 * o.decoder_only + 10**7 * team.rank)
    total, begin, mark = o.minutes * 60, time.time() - used, time.time()
    log: list = []

    def save():
        torch.save(dict(model=model.state_dict(), opt=[x.state_dict() for x in opts], step=step, used=time.time() - begin), path + ".tmp")
        os.replace(path + ".tmp", path)

    while True:
        f = team.agree((time.time() - begin) / total)
        if f >= 1:
            break
        sizes = next(s for until, s in (STAGES_DECODER if o.decoder_only else STAGES) if f < until)
        batch, frames, side = sizes[step % len(sizes)]
        flat = 0.35 if not o.decoder_only else 0.2
        set_rate(opts, min(1, (step + 1) / 100) * (1 if f < flat else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (f - flat) / (1 - flat)))))
        x = clips.draw(clips.random_captions(batch, g, o.device), frames, 128, g, (side, 0.85) if side < 128 else None)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        with torch.set_grad_enabled(not o.decoder_only):
            mean, logvar = model.moments(x)
            logvar = logvar.clamp(-12, 4)
        z = mean + torch.randn(mean.shape, generator=g, device=o.device) * (0.5 * logvar).exp()
        y = model.decode(z)
        mse, l1 = F.mse_loss(y, x), F.l1_loss(y, x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        model.zero_grad()
        (2 * mse + 0.1 * l1 + (0 if o.decoder_only else o.kl) * kl).backward()
        team.average([p for _, p in trained])
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        for opt in opts:
            opt.step()
        step += 1
        log = log[-400:]
        log.append((mse.item(), l1.item(), kl.item(), mean.std().item(), (0.5 * logvar).exp().mean().item()))
        if step % 100 == 0 and team.rank == 0:
            a = torch.tensor(log).mean(0).tolist()
            log = []
            print(
                f"{step} {time.time() - begin:.0f}s {batch, frames, side} psnr {-10 * math.log10(a[0] / 4):.2f} l1 {a[1]:.4f} kl {a[2]:.2f} "
                f"latent std {a[3]:.2f} noise {a[4]:.3f} rate {opts[0].param_groups[0]['lr']:.4f}",
                flush=True,
            )
        if time.time() - mark > 120 and team.rank == 0:
            save()
            p = held_out(model, device=o.device)
            print(
                f"  {step} {time.time() - begin:.0f}s held-out 33x128 psnr mean {sum(p) / len(p):.2f} min {min(p):.2f} max {max(p):.2f}", flush=True
            )
            mark = time.time()
    if team.rank:
        return
    save()
    p = held_out(model, device=o.device)
    print(f"done: {step} steps {time.time() - begin:.0f}s held-out psnr mean {sum(p) / len(p):.2f} min {min(p):.2f}", flush=True)


if __name__ == "__main__":
    main()
