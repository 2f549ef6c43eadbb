"""Measure the weight files; print and write gates.json and a contact sheet.

python -m tessera.training.default.evaluate --out DIR [--clips 64] [--vae-clips 32] [--device cuda]

Measured: reconstruction PSNR; colour, shape and motion read from generated clips against their captions, and against
shuffled captions (chance); share of self-attention mass in the heaviest fifth of key blocks.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tessera.models.default import networks, sampling

from . import clips
from .export import DIT_FILE, HERE, VAE_FILE
from .train_vae import psnr


def load(folder: str = HERE, device: str = "cpu") -> tuple[networks.WanVAE, networks.WanTransformer]:
    """(VAE, transformer) from the weight files, in float32."""
    vae, model = networks.build_vae(), networks.build_transformer()
    for network, name in ((vae, VAE_FILE), (model, DIT_FILE)):
        network.load_state_dict({k: v.float() for k, v in load_file(os.path.join(folder, name)).items()})
        networks.channels_last(network).to(device).eval()
    return vae, model


@torch.no_grad()
def reconstruction(vae: networks.WanVAE, n: int, seed: int = 20250101) -> list[float]:
    """PSNR per held-out 33 x 128 x 128 clip."""
    device = next(vae.parameters()).device
    g = torch.Generator(device).manual_seed(seed)
    found = []
    for c in clips.random_captions(n, g, device):
        x = clips.draw(c[None], 33, 128, g)
        found.append(psnr(vae.decode(vae.encode(x)), x))
    return found


def agreement(read: Sequence[Sequence[int | None]], captions: Tensor) -> list[float]:
    """Percentages (colour, shape, motion) of readings equal to the captions."""
    return [100.0 * sum(r[i] == int(c[i]) for r, c in zip(read, captions, strict=True)) / len(read) for i in range(3)]


def tile_order(grid: Sequence[int], tile: Sequence[int]) -> Tensor:
    """Token permutation that makes each tile of (T, H, W) contiguous, partial tiles included."""
    index = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    parts = []
    for t in range(0, grid[0], tile[0]):
        for h in range(0, grid[1], tile[1]):
            for w in range(0, grid[2], tile[2]):
                parts.append(index[t : t + tile[0], h : h + tile[1], w : w + tile[2]].flatten())
    return torch.cat(parts)


def heavy_mass(p: Tensor, block: int, share: float = 0.2) -> Tensor:
    """Mass of the heaviest `share` of key blocks for each query block; p (..., L, L) rows sum to one -> (...) mean."""
    length = p.shape[-1]
    n = -(-length // block)
    pad = n * block - length
    p = torch.nn.functional.pad(p, (0, pad, 0, pad))
    p = p.unflatten(-1, (n, block)).sum(-1).unflatten(-2, (n, block)).sum(-2)  # (..., query block, key block)
    keep = max(1, int(share * n + 0.5))
    top = p.topk(keep, -1).values.sum(-1)
    return top.sum(-1) / length


@torch.no_grad()
def attention_mass(
    model: networks.WanTransformer, x: Tensor, sigma: float, context: Tensor, settings: Mapping[str, tuple[Tensor, int]]
) -> dict[str, Tensor]:
    """{name: (layers, heads)} for each setting name -> (token order, block size), mean over the batch."""
    t = torch.full((len(x),), 1000 * sigma, device=x.device)
    y, _, e6, words, table = model.embed(x, t, context)
    out: dict[str, list[Tensor]] = {name: [] for name in settings}
    for block in model.blocks:
        e = (block.modulation + e6).chunk(6, 1)
        q, k = block.self_attn.qk(block.norm1(y) * (1 + e[1]) + e[0], table=table)
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        for name, (order, size) in settings.items():
            out[name].append(heavy_mass(p[..., order, :][..., order], size).mean(0))
        y = block(y, e6, words, table)
    return {name: torch.stack(rows) for name, rows in out.items()}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", default=".")
    ap.add_argument("--folder", default=HERE, help="where the weight files are")
    ap.add_argument("--clips", type=int, default=64)
    ap.add_argument("--vae-clips", type=int, default=32)
    ap.add_argument("--cfg", type=float, default=3.0)
    ap.add_argument("--shift", type=float, default=5.0)
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--seed", type=int, default=4242)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--threads", type=int, default=2)
    o = ap.parse_args()
    torch.set_num_threads(o.threads)
    os.makedirs(o.out, exist_ok=True)
    vae, model = load(o.folder, o.device)
    gates: dict[str, Any] = dict(settings=dict(frames=33, size=128, steps=o.steps, cfg=o.cfg, shift=o.shift, seed=o.seed, clips=o.clips))

    if o.vae_clips:
        p = reconstruction(vae, o.vae_clips)
        gates["vae_psnr_db"] = dict(mean=sum(p) / len(p), min=min(p), max=max(p), clips=len(p))
        print("vae", gates["vae_psnr_db"], flush=True)

    captions = clips.random_captions(o.clips, torch.Generator().manual_seed(o.seed))
    grid = (9, 8, 8)
    orders = dict(raster=torch.arange(576), tile_2x4x4=tile_order(grid, (2, 4, 4)))
    settings = {f"{name}_block{size}": (order, size) for name, order in orders.items() for size in (32, 64)}
    masses = []

    def probe(sigma: float, x: Tensor, context: Tensor) -> None:
        if min(abs(sigma - s) for s in (0.952, 0.833, 0.625, 0.417)) < 0.012:
            masses.append((sigma, attention_mass(model, x[:2], sigma, context[:2], settings)))

    videos, spread = [], []
    for i in range(0, o.clips, 16):
        z = sampling.latents(model, captions[i : i + 16], steps=o.steps, cfg=o.cfg, shift=o.shift, seed=o.seed + i, probe=probe if i == 0 else None)
        spread.append(float(z.std()))
        videos += list(sampling.decode(vae, z).cpu())
        print(f"generated {len(videos)}", flush=True)
    found = [clips.read(v) for v in videos]
    read = [(r["colour"], r["shape"], r["motion"]) for r in found]
    names = ("colour", "shape", "motion")
    gates["generated_percent"] = dict(zip(names, agreement(read, captions), strict=True))
    gates["shuffled_percent"] = dict(
        zip(names, agreement(read, captions[torch.randperm(len(captions), generator=torch.Generator().manual_seed(1))]), strict=True)
    )
    gates["chance_percent"] = dict(colour=100 / 6, shape=100 / 3, motion=25.0)
    gates["all_three_percent"] = 100.0 * sum(list(r) == c.tolist() for r, c in zip(read, captions, strict=True)) / len(read)
    gates["mean_overlap_with_shape"] = sum(r["fit"] for r in found) / len(found)
    gates["latent_std"] = sum(spread) / len(spread)
    gates["attention_mass_top20"] = {
        name: dict(
            mean=float(torch.stack([m[name] for _, m in masses]).mean()),
            per_sigma={f"{s:.3f}": float(m[name].mean()) for s, m in masses},
            per_layer_head=torch.stack([m[name] for _, m in masses]).mean(0).tolist(),
        )
        for name in settings
    }
    sampling.sheet(videos[:24], os.path.join(o.out, "sheet.png"))
    with open(os.path.join(o.out, "gates.json"), "w") as f:
        json.dump(gates, f, indent=1)
    for k, v in gates.items():
        print(k, {n: m["mean"] for n, m in v.items()} if k == "attention_mass_top20" else v)


if __name__ == "__main__":
    main()
