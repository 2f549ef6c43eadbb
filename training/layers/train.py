"""Train the layered transformer on the latents that dataset.py makes, with rectified flow.

python -m tessera.training.layers.train --work DIR --minutes 80 [--resume]    writes DIR/layers.pt

A batch holds as many layouts of a similar number of tokens as fit into --tokens. New files of latents are taken up while it runs; clips join
when their files are there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tessera.models.default.networks import WanVAE, unwhiten
from tessera.models.layers.default import networks, vocabulary
from tessera.models.layers.regions import WHOLE, Regions

from ..default import export
from ..default.train_dit import draw_sigma, load_vae
from ..loop import Run, launch, optimisers, parser
from ..optimizer import Team
from . import dataset

CLIPS = 0.4  # of the batches
MERGED = 4.0  # how much more a token of the merged picture counts: it has to repeat what all the others show
FROM_VIDEO = (0, 2, 4, 5)  # the blocks of the default video model that training starts from
FLAT = 0.4  # of the time before the rate falls


def start() -> networks.LayeredTransformer:
    """Weights of the default video model, without two of its blocks, and no difference between layers."""
    model = networks.LayeredTransformer()
    state = load_file(Path(export.HERE, export.DIT_FILE))
    kept = {f"blocks.{old}.": f"blocks.{new}." for new, old in enumerate(FROM_VIDEO)}
    found = {}
    for name, value in state.items():
        prefix = next((old for old in kept if name.startswith(old)), None)
        if prefix or not name.startswith("blocks."):
            found[kept[prefix] + name.removeprefix(prefix) if prefix else name] = value.float()
    model.load_state_dict(found | {"layer_pe": torch.randn(model.layer_pe.shape, generator=torch.Generator().manual_seed(0)) * 0.02})
    return model


class Layouts:
    """Layouts with their latents, by number of tokens. tokens: int64 `(layouts,)`, ascending."""

    def __init__(self, work: str, frames: int, paths: list[str]):
        self.frames = frames
        self.table = torch.load(dataset.table_path(work, frames), weights_only=True)
        found = [sample for path in paths for sample in torch.load(path, weights_only=True)]
        areas = torch.tensor([int(sample["boxes"][:, 2:].prod(1).sum()) for sample in found])
        order = areas.argsort()
        self.samples, self.tokens = [found[index] for index in order.tolist()], areas[order] * ((frames - 1) // 4 + 1)

    def regions(self, index: int) -> Regions:
        boxes = dataset.boxes_of(self.samples[index])
        return Regions(*boxes[0][2:], tuple(boxes), (self.frames - 1) // 4 + 1)

    def strip(self, index: int) -> Tensor:
        """`(16, 2, 2 * tokens)`: what Regions.crop makes of the layers' latents."""
        sample = self.samples[index]
        layers = list(sample["whole"])
        for kind, (_, _, width, height) in zip(sample["shown"].tolist(), dataset.boxes_of(sample)[2:], strict=True):
            key = (*kind, width, height)
            layers.append(self.table[key])
        return torch.cat([tokens(layer, 2) for layer in layers], 2)

    def batch(self, tokens: int, generator: torch.Generator) -> range:
        """Neighbours in number of tokens that fit into `tokens`, around a random one."""
        first = last = int(torch.randint(len(self.samples), (), generator=generator))
        while last + 1 < len(self.samples) and (last + 2 - first) * int(self.tokens[last + 1]) <= tokens:
            last += 1
        while first > 0 and (last + 2 - first) * int(self.tokens[last]) <= tokens:
            first -= 1
        return range(first, last + 1)


def tokens(layer: Tensor, patch: int) -> Tensor:
    """`(channels, frames, patch * height, patch * width)` -> `(channels, patch, patch * tokens)`: what Regions.crop makes of one layer."""
    parts = layer.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (channels, frames, height, patch, width, patch)
    return parts.permute(0, 3, 1, 2, 4, 5).flatten(2)


def take_up(known: dict[int, Layouts], work: str) -> None:
    """Read what dataset.py has made meanwhile, pictures and clips, by frames; the first file of each is held out."""
    for frames in (1, 9):
        found = dataset.shards(work, frames)[1:]
        ready = found and os.path.exists(dataset.table_path(work, frames))
        if ready and (frames not in known or len(known[frames].samples) != len(found) * dataset.SHARD):
            known[frames] = Layouts(work, frames, found)


def strips(layouts: Layouts, which: range) -> Tensor:
    """`(batch, 16, 1, 2, 2 * tokens)`, zeros beyond the end."""
    parts = [layouts.strip(index).float().movedim(-1, 0) for index in which]
    return pad_sequence(parts, True).movedim(1, -1)[:, :, None]


def said(sample: dict[str, Any], generator: torch.Generator) -> Tensor:
    """The caption's tokens, in any order; one time in ten nothing."""
    if float(torch.rand((), generator=generator)) < 0.1:
        return vocabulary.embed(vocabulary.Caption(()))
    caption = dataset.caption_of(sample)
    order = torch.randperm(len(caption.kinds), generator=generator).tolist()
    return vocabulary.embed(caption._replace(kinds=tuple(caption.kinds[place] for place in order)))


@torch.no_grad()
def channel_weights(vae: WanVAE, layouts: Layouts, noise: float = 0.3, many: int = 6) -> Tensor:
    """`(2, 16)`: how much a channel's error counts in merged picture and ground, and in foregrounds; means of one.

    The VAE shows an error of one channel hundreds of times as strongly as one of another. Most of the weight goes by that, measured with
    some noise on one channel at a time; all channels keep a quarter, as each is also what the others are read from. The transparent decoder
    reads foregrounds from all channels alike.
    """
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(16)
    for sample in layouts.samples[:: len(layouts.samples) // many]:
        latent = sample["whole"][:1].float()
        right = vae.decode(unwhiten(latent))
        for channel in range(16):
            changed = latent.clone()
            changed[:, channel] += noise * torch.randn(latent[:, channel].shape, generator=generator)
            found[channel] += (vae.decode(unwhiten(changed)) - right).square().mean()
    return torch.stack([0.25 + 0.75 * found / found.mean(), torch.ones(16)])


def flow_loss(model: networks.LayeredTransformer, x0: Tensor, noise: Tensor, sigma: Tensor, given: dict[str, Tensor], weights: Tensor) -> Tensor:
    """Mean squared velocity error of the tokens that are there. weights: as `channel_weights` gives them."""
    s = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast(x0.device.type, torch.bfloat16):
        v = model(s * noise + (1 - s) * x0, 1000 * sigma, **given)
    counts = torch.where(given["layers"] == 0, MERGED, 1.0) * (given["pad"][:, 0, 0] == 0)
    scale = weights[(given["layers"] >= WHOLE).long()] * counts[..., None]  # (batch, tokens, 16)
    scale = scale.movedim(-1, 1).repeat_interleave(2, 2)[:, :, None, None]
    return ((v.float() - (noise - x0)).square() * scale).sum() / (2 * scale.sum())


@torch.no_grad()
def held_out_loss(model: networks.LayeredTransformer, layouts: Layouts, weights: Tensor) -> float:
    """Fixed noise and levels."""
    generator, device = torch.Generator().manual_seed(9), weights.device
    losses = []
    for first in range(0, len(layouts.samples), 10):
        which = range(first, min(first + 10, len(layouts.samples)))
        x0 = strips(layouts, which)
        sigma = (torch.arange(len(which)) + 0.5) / len(which)
        given = networks.collate(
            [layouts.regions(i) for i in which], [vocabulary.embed(dataset.caption_of(layouts.samples[i])) for i in which], device
        )
        noise = torch.randn(x0.shape, generator=generator)
        losses.append(float(flow_loss(model, x0.to(device), noise.to(device), (3 * sigma / (1 + 2 * sigma)).to(device), given, weights)))
    return sum(losses) / len(losses)


def train(team: Team, options: argparse.Namespace) -> None:
    device = options.device
    model = start().to(device)
    opts = optimisers(
        model.named_parameters(),
        lambda name, p: name.startswith("blocks") and p.ndim == 2,
        options.rate,
        1 / 10,
        decay=0.01,
        adam_decay=0.01,
        team=team,
    )
    run = Run(model, opts, os.path.join(options.work, "layers.pt"), team, options, average=0.998)
    generator = torch.Generator().manual_seed(50 + run.step + 10**7 * team.rank)
    kinds = torch.Generator().manual_seed(50 + run.step)  # all of a team take pictures, or all clips: their steps last equally long
    held = Layouts(options.work, 1, dataset.shards(options.work, 1)[:1])
    weights = channel_weights(load_vae(options.work), held).to(device)
    known: dict[int, Layouts] = {}
    if options.compile:
        for block in model.blocks:
            block.compile(dynamic=True)
    for _ in run.steps(flat=FLAT):
        if run.step % 200 == 0 or not known:
            take_up(known, options.work)
        clips = 9 in known and float(torch.rand((), generator=kinds)) < CLIPS
        layouts = known[9 if clips else 1]
        which = layouts.batch(options.tokens, generator)
        x0 = strips(layouts, which)
        given = networks.collate([layouts.regions(i) for i in which], [said(layouts.samples[i], generator) for i in which], device)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = draw_sigma(len(which), generator, "cpu")
        run.update([flow_loss(model, x0.to(device), noise.to(device), sigma.to(device), given, weights)], samples=len(which))
        if run.every(50):
            about = {frames: len(layouts.samples) for frames, layouts in known.items()}
            print(f"{run.step} {run.seconds:.0f}s seen {run.seen} of {about} loss {run.means()[0]:.4f}", flush=True)
        if run.due("save", 150):
            run.save()
            print(f"  {run.step} held-out loss {held_out_loss(run.average, held, weights):.4f}", flush=True)
    if team.rank == 0:
        run.save()
        loss = held_out_loss(run.average, held, weights)
        print(f"done: {run.step} steps, {run.seen} layouts, {run.seconds:.0f}s, held-out loss {loss:.4f}", flush=True)


def main() -> None:
    options = parser(__doc__, minutes=80, rate=0.02, adam="a tenth", port=29542)
    options.add_argument("--tokens", type=int, default=2560, help="of a batch")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--compile", action="store_true", help="a third faster on a CPU; needs a C++ compiler")
    launch(train, options.parse_args())


if __name__ == "__main__":
    main()
