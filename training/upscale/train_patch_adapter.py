"""Train the patch adapter of the default video model, and measure it.

    python -m tessera.training.upscale.train_patch_adapter cache    --work DIR --clips 400
    python -m tessera.training.upscale.train_patch_adapter train    --work DIR --minutes 60

Clips are drawn at twice the side that the model was trained for (256 pixels), made small, noisy, and enlarged again by bicubic
interpolation. Both are encoded as a whole, and training windows are cut from the latents, as they are when the adapter is used.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.models.default import networks
from tessera.models.upscale import patch_adapter
from tessera.models.upscale.patch_adapter import LORA, Config, PatchAdapter, Window, initialise, metadata

from ..default import clips, evaluate
from ..default.train_dit import draw_sigma
from ..loop import Run, launch, optimisers, parser, store
from ..optimizer import Team

HERE = Path(patch_adapter.__file__).parent  # of the weights
WEIGHTS = "patch_adapters/tessera_shapes_patch_adapter.safetensors"

CANVAS, NATIVE = 256, 128  # pixels
FACTORS = (8, 8, 8, 4)
NOISE = 0.1  # largest standard deviation of the noise on the small clip, in [-1, 1] units
SHARD = 24


def resize(clip: Tensor, side: int) -> Tensor:
    """`(1, 3, frames, height, width)` in [-1, 1] to side x side, bicubic, with antialiasing where it gets smaller."""
    frames = F.interpolate(clip[0].movedim(1, 0), size=(side, side), mode="bicubic", antialias=side < clip.shape[-1])
    return frames.clamp(-1, 1).movedim(0, 1)[None]


def degrade(clip: Tensor, factor: int, noise: float, generator: torch.Generator) -> Tensor:
    """The small clip that is to be upscaled: bicubic, then Gaussian noise, the same in no two frames."""
    small = resize(clip, clip.shape[-1] // factor)
    return (small + noise * torch.randn(small.shape, generator=generator)).clamp(-1, 1)


@torch.no_grad()
def cache(options: argparse.Namespace) -> None:
    """Latents of the large clips, of the enlarged small ones and of the small ones at the model's own size, in shards."""
    vae, _ = evaluate.load()
    folder = Path(options.work) / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    for index in range(-(-options.clips // SHARD)):
        path = folder / f"{index:03d}.pt"
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(1000 + index)
        frames = 33 if index % 5 == 4 else 17
        rows = []
        for caption in clips.random_captions(SHARD if frames == 17 else SHARD // 2, generator):
            factor = FACTORS[int(torch.randint(len(FACTORS), (1,), generator=generator))]
            noise = NOISE * float(torch.rand(1, generator=generator))
            large = clips.draw(caption[None], frames, CANVAS, generator)
            small = degrade(large, factor, noise, generator)
            parts = [networks.whiten(vae.encode(x)).half() for x in (large, resize(small, CANVAS), resize(small, NATIVE))]
            rows.append((*parts, torch.tensor([factor])))
        names = ("large", "enlarged", "whole", "factor")
        store({name: torch.cat(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}, str(path))
        print(f"shard {index}: {frames} frames, {time.time() - begin:.0f} s", flush=True)


class LoraLinear(nn.Module):
    """A frozen linear layer and a low-rank update of it that starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.base = base
        self.lora_down = nn.Linear(base.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False)
        with torch.no_grad():
            self.lora_down.weight.copy_(torch.randn(rank, base.in_features, generator=generator) * base.in_features**-0.5)
            self.lora_up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_up(self.lora_down(x))


LORA_TARGETS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


def add_lora(base: networks.WanTransformer, rank: int) -> dict[str, LoraLinear]:
    """Freeze the base and put updates on its blocks' matrices; returns them by the matrix's name."""
    base.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    added = {}
    for index, block in enumerate(base.blocks):
        for name in LORA_TARGETS:
            parent, _, leaf = name.rpartition(".")
            matrix = block.get_submodule(name)
            assert isinstance(matrix, nn.Linear)
            layer = LoraLinear(matrix, rank, generator)
            setattr(block.get_submodule(parent), leaf, layer)
            added[f"blocks.{index}.{name}"] = layer
    return added


class Model(nn.Module):
    """Base, adapter and LoRA as one network, for training. At inference the host's own forward takes the place of the base's."""

    def __init__(self, base: networks.WanTransformer, config: Config, rank: int):
        super().__init__()
        self.base, self.adapter = base, initialise(PatchAdapter(config))
        self.lora = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in add_lora(base, rank).items()})

    def trained(self) -> dict[str, Tensor]:
        """Everything that a file holds, under the names in it."""
        out = dict(self.adapter.state_dict())
        for name, layer in self.lora.items():
            for part in ("lora_down", "lora_up"):
                out[f"{LORA}{name.replace('/', '.')}.{part}.weight"] = layer.get_submodule(part).weight
        return out

    def forward(self, x: Tensor, sigma: Tensor, patch: Tensor, augmentation: Tensor, factor: Tensor, windows: list[Window], whole: Tensor) -> Tensor:
        """Velocity `(batch, channels, frames, height, width)`. The text is empty, as it is at inference."""
        b, c, f, h, w = x.shape
        base: Any = self.base
        hints = self.adapter.hints(patch, sigma, augmentation, factor, windows)
        view = self.adapter.view(whole, windows)
        y, e, e6, context, table = base.embed(x, 1000 * sigma, x.new_zeros(b, 3, base.text_embedding[0].in_features))
        for block, hint, (k, v) in zip(base.blocks, hints, view, strict=True):
            m = (block.modulation + e6).chunk(6, 1)
            y = y + block.self_attn(block.norm1(y) * (1 + m[1]) + m[0], table=table) * m[2]
            cross = block.cross_attn
            query, key = cross.qk(block.norm3(y), context)
            value, k, v = (part.unflatten(-1, (cross.heads, -1)).transpose(1, 2) for part in (cross.v(context), k, v))
            out = attend(query, key, value) + attend(query, k, v)
            y = y + cross.o(out.transpose(1, 2).flatten(2))
            y = y + block.ffn(block.norm2(y) * (1 + m[4]) + m[3]) * m[5] + hint
        y = base.head(y, e).view(b, f, h // 2, w // 2, 1, 2, 2, c)
        return y.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, f, h, w)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return networks.plain_attention(q.to(v.dtype), k.to(v.dtype), v)


class Latents:
    """The cached shards in memory, and windows cut from them."""

    def __init__(self, paths: list[Path], native: tuple[int, int]):
        shards = [torch.load(path, weights_only=True) for path in paths]
        self.groups = {}
        for frames in sorted({shard["large"].shape[2] for shard in shards}):
            parts = [shard for shard in shards if shard["large"].shape[2] == frames]
            self.groups[frames] = {name: torch.cat([part[name] for part in parts]) for name in ("large", "enlarged", "whole", "factor")}
        self.native = native

    def batch(self, frames: int, count: int, generator: torch.Generator, candidates: int = 2) -> dict[str, Any]:
        """Windows of the first `frames` latent frames; of some candidates the one from whose latent most was lost."""
        group = self.groups[min(size for size in self.groups if size >= frames)]
        pick = torch.randint(len(group["large"]), (count,), generator=generator)
        large, enlarged = (group[name][pick, :, :frames].float() for name in ("large", "enlarged"))
        height, width = self.native
        cuts: dict[str, list[Tensor]] = {"x0": [], "patch": []}
        windows = []
        for index in range(count):
            best = None
            for _ in range(candidates):
                sides = zip(large.shape[-2:], self.native, strict=True)
                top, left = (2 * int(torch.randint((full - side) // 2 + 1, (1,), generator=generator)) for full, side in sides)
                place = (slice(top, top + height), slice(left, left + width))
                parts = (large[index][..., place[0], place[1]], enlarged[index][..., place[0], place[1]])
                lost = float((parts[0] - parts[1]).square().mean())
                if best is None or lost > best[0]:
                    best = (lost, parts, (top, left))
            assert best is not None
            cuts["x0"].append(best[1][0])
            cuts["patch"].append(best[1][1])
            (top, left), (full_height, full_width) = best[2], large.shape[-2:]
            windows.append(Window(top / full_height, left / full_width, (top + height) / full_height, (left + width) / full_width))
        return dict(
            x0=torch.stack(cuts["x0"]),
            patch=torch.stack(cuts["patch"]),
            windows=windows,
            whole=group["whole"][pick, :, :frames].float(),
            factor=group["factor"][pick].float(),
        )


def loss_of(model: Model, batch: dict[str, Any], generator: torch.Generator, bf16: bool, largest: float = 0.3) -> Tensor:
    """Mean squared velocity error at random noise levels, with random noise on what the patch branch sees."""
    x0, patch = batch["x0"], batch["patch"]
    sigma = draw_sigma(len(x0), generator, "cpu")
    augmentation = largest * torch.rand(len(x0), generator=generator)
    noise, other = (torch.randn(x0.shape, generator=generator) for _ in range(2))
    x = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1, 1))
    patch = torch.lerp(patch, other, augmentation.view(-1, 1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        velocity = model(x, sigma, patch, augmentation, batch["factor"], batch["windows"], batch["whole"])
    return (velocity.float() - (noise - x0)).square().mean()


def train(team: Team, options: argparse.Namespace) -> None:
    """Adapter and LoRA on the cached latents; shard 000 is held out. Writes DIR/adapter.pt and, at the end, the weight file."""
    torch.manual_seed(0)
    folder = Path(options.work)
    _, base = evaluate.load()
    config = Config()
    model = Model(base, config, options.rank_of_lora)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    opts = optimisers(trained, lambda name, p: name.startswith("adapter.") and p.ndim > 1, options.rate, 1 / 10)
    run = Run(model, opts, str(folder / "adapter.pt"), team, options, average=0.998)
    print(f"{sum(value.numel() for value in model.trained().values()) / 1e6:.2f} M parameters", flush=True)
    generator = torch.Generator().manual_seed(7 + run.step + 10**6 * team.rank)
    held = Latents([folder / "latents" / "000.pt"], config.native).batch(5, 16, torch.Generator().manual_seed(3))
    names: list[Path] = []
    for _ in run.steps(flat=0.5):
        if run.step % 100 == 0 or not names:
            found = sorted((folder / "latents").glob("[0-9]*.pt"))[1:]
            if found != names:
                names, data = found, Latents(found, config.native)
        frames = (3, 5, 5, 5, 9)[run.step % 5]
        if frames > max(data.groups):
            frames = 5
        batch = data.batch(frames, {3: 12, 5: 8, 9: 4}[frames] // team.size, generator)
        run.update([loss_of(model, batch, generator, options.bf16)])
        if run.due("save", 60):
            run.save()
            with torch.no_grad():
                fixed = loss_of(run.average, held, torch.Generator().manual_seed(9), False).item()
            count = sum(len(group["large"]) for group in data.groups.values())
            print(f"{run.step} {run.seconds:.0f} s, {count} clips, loss {run.means()[0]:.4f}, held out {fixed:.4f}", flush=True)
    if team.rank == 0:
        run.save()
        save(run.average.trained(), config, HERE / WEIGHTS, f"{run.step} steps in {options.minutes:.0f} minutes on a CPU, {team.size} processes")


def save(state: dict[str, Tensor], config: Config, path: Path, note: str) -> None:
    """Write the weight file, bf16."""
    path.parent.mkdir(exist_ok=True)
    about = {"title": "Tessera shapes patch adapter", "license": "Apache-2.0", "dataset": "drawn clips (training/default/clips.py)", "training": note}
    save_file({name: value.detach().bfloat16().contiguous() for name, value in state.items()}, path, metadata={**metadata(config), **about})
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    options = parser(__doc__, minutes=60, rate=0.01, adam="a tenth", port=29541)
    options.add_argument("what", choices=("cache", "train"))
    options.add_argument("--clips", type=int, default=480)
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--rank-of-lora", type=int, default=8)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.what == "train":
        launch(train, chosen)
    else:
        cache(chosen)


if __name__ == "__main__":
    main()
