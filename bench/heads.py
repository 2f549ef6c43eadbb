"""What sparsity costs one attention call: every recipe on recorded and on planted heads. `python bench/quality.py heads` runs it.

Recorded: q, k, v of every layer of the built-in model while it makes a clip. Planted: `planted` says how they are made. A recipe that searches
once chooses from an earlier step and is measured on a later one, as it is used; the others choose anew. Densities are of all block pairs, what a
recipe keeps anyway among them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.kernels.block_mask import BlockMask
from tessera.kernels.sparsity import RECIPES, Arrangement, Recipe, TokenGrid, choose, prepare, sparse_attention, with_tail
from tessera.models.default import vocabulary
from tessera.models.default.networks import axis_sizes, rotary, rotate
from tessera.models.patchers import diffusers
from tessera.models.patchers.attention import AttentionPatch, auto_block
from tessera.models.patchers.settings import AttentionSettings

WEIGHTS = Path(__file__).resolve().parent.parent / "models" / "default"
DENSITIES = (0.4, 0.3, 0.2, 0.1)
STEPS, EARLIER, NOW = 20, 9, 12
GRID, HEAD_DIM = TokenGrid(21, 16, 24), 128
DRIFT = 0.15
"""Share of fresh noise between the looks at a planted head. It moves q and k by 7 to 15 % of their norm, v by 13 %; recorded heads move by 5 to
12 % and 20 % between the two steps."""
KINDS = {
    "near": ("thw", 11, 0, 0),
    "tube": ("hw", 10, 0, 0),
    "column": ("tw", 9, 0, 0),
    "frame": ("t", 7, 0, 0),
    "near and object": ("thw", 7, 4, 0),
    "near and sink": ("thw", 8, 0, 5),
    "object": ("", 0, 8, 0),
    "sink": ("", 0, 0, 7),
    "spread": ("", 0, 0, 0),
}
"""Planted heads: the axes along which a query looks near itself, and what it adds to a score to be near, in the same object, one of the sinks."""
QKV = tuple[Tensor, Tensor, Tensor]
"""`(1, heads, tokens, head_dim)`, float32."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The heads of one layer: at the step at which a search looks, and at the one that is measured."""

    grid: TokenGrid
    earlier: QKV
    now: QKV

    @property
    def block(self) -> int:
        return auto_block(self.grid.seq_len)


class Recorder(AttentionPatch):
    """Keeps q, k, v of self-attention in two steps; everything runs as the host runs it."""

    def __init__(self) -> None:
        super().__init__(AttentionSettings())
        self.seen: dict[tuple[int, Any], list[tuple[TokenGrid, QKV]]] = {}

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, dense: Callable[[], Tensor], *_: Any, **__: Any) -> Tensor:
        grid = call.spans.grid(q.shape[2], k.shape[2])
        if grid is not None and call.step in (EARLIER, NOW):
            self.seen.setdefault((call.step, call.branch), []).append((grid, (q.contiguous(), k.contiguous(), v.contiguous())))
        return dense()

    def layers(self) -> Iterator[Layer]:
        """Of the pass that comes first in a step, the one with the prompt."""
        branch = next(iter(self.seen))[1]
        for (grid, earlier), (_, now) in zip(self.seen[EARLIER, branch], self.seen[NOW, branch], strict=True):
            yield Layer(grid, earlier, now)


def recorded(prompts: Sequence[str], size: int, frames: int, cfg: float, shift: float) -> Iterator[Layer]:
    """The layers of the built-in model, one clip a prompt, with seeds 1, 2, ..."""
    model = diffusers.load(WEIGHTS / "diffusion_models" / "tessera_shapes_t2v.safetensors", WEIGHTS / "vae" / "tessera_shapes_vae.safetensors")
    for seed, prompt in enumerate(prompts, 1):
        recorder = Recorder()
        texts = vocabulary.encode(prompt), vocabulary.encode("")
        with diffusers.accelerated(model.transformer, recorder):
            where = dict(width=size, height=size, frames=frames)
            diffusers.sample(model, *texts, **where, steps=STEPS, cfg=cfg, shift=shift, seed=seed, patch=recorder)
        yield from recorder.layers()


def planted(seed: int) -> Layer:
    """A layer with a head of each of KINDS, on a grid of the shape that video models have.

    Queries and keys are a field that is smooth in space and time, the same for both, and noise of their own. A head that looks near itself has
    the same vector on all queries and keys, in those channels that Wan's rotary embedding turns fast, so that their product falls with distance
    along the axes. An object is a connected region of any shape that moves; its tokens share a direction in channels that hardly turn. Sinks are
    eight tokens that every query likes. Values are a smooth field, a mean an object, and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    looks: tuple[list[QKV], list[QKV]] = ([], [])

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def smooth(channels: int) -> Tensor:
        """`(tokens, channels)`, of unit variance, from noise at a fourth of the resolution."""
        shape = GRID.frames, GRID.height, GRID.width
        x = F.interpolate(noise(1, channels, *(-(-size // 4) for size in shape)), shape, mode="trilinear", align_corners=True)[0].flatten(1).T
        return x / x.std()

    def both(make: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        now, fresh = make(), make()
        return math.sqrt(1 - DRIFT**2) * now + DRIFT * fresh, now

    tokens = GRID.seq_len
    table = rotary((GRID.frames, GRID.height, GRID.width), HEAD_DIM)
    sizes = axis_sizes(HEAD_DIM)
    fast = torch.cat([torch.arange(size) < size // 2 for size in sizes])
    axis = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    for axes, near, same, sink in KINDS.values():
        place = (fast & torch.tensor(["thw"[number] in axes for number in axis.tolist()])).float()
        slow = F.normalize(noise(9, HEAD_DIM) * ~fast, dim=-1)
        objects = smooth(8).argmax(-1)
        sinks = torch.randperm(tokens, generator=generator)[:8]
        peak = math.sqrt(HEAD_DIM)  # of a product, for a score of 1
        liking = F.normalize(place, dim=0) * math.sqrt(near * peak) + slow[objects] * math.sqrt(same * peak)
        q_extra, k_extra = liking + slow[8] * math.sqrt(sink * peak), liking.clone()
        k_extra[sinks] += slow[8] * math.sqrt(sink * peak)
        means = 0.5 * noise(8, HEAD_DIM)[objects]
        fields, own_q, own_k = both(lambda: smooth(HEAD_DIM)), both(lambda: noise(tokens, HEAD_DIM)), both(lambda: noise(tokens, HEAD_DIM))
        values = both(lambda: 0.7 * smooth(HEAD_DIM) + 0.5 * noise(tokens, HEAD_DIM))
        for look, field, q, k, v in zip(looks, fields, own_q, own_k, values, strict=True):
            turned = (rotate((0.4 * (field + x) + extra)[None, :, None], table)[0, :, 0] for x, extra in ((q, q_extra), (k, k_extra)))
            look.append((*turned, v + means))
    earlier, now = (tuple(torch.stack(x)[None] for x in zip(*look, strict=True)) for look in looks)
    return Layer(GRID, earlier, now)


def methods() -> dict[str, Recipe]:
    """Every recipe, and each with the pooled tail where it has none of its own."""
    found = {}
    for name, recipe in RECIPES.items():
        found[name] = recipe
        if with_tail(recipe) != recipe:
            found[f"{name}+tail"] = with_tail(recipe)
    return found


def asked(density: float, arrangement: Arrangement) -> float:
    """What to ask for so that `density` of all pairs are kept, those that are kept anyway among them. Nothing of its own where they are more."""
    anyway = arrangement.forced.pairs.float().mean().item()
    return max((density - anyway) / (1 - anyway), 1e-9)


def block_mass(q: Tensor, k: Tensor, block: int, granule: int) -> Tensor:
    """The attention that each key block gets, `(heads, query blocks, key blocks)`, from all scores. q, k: `(heads, tokens, head_dim)`."""
    rows = []
    for part in q.split(block, 1):
        p = (part @ k.mT * q.shape[-1] ** -0.5).softmax(-1).sum(1)
        rows.append(F.pad(p, (0, -p.shape[-1] % granule)).unflatten(-1, (-1, granule)).sum(-1))
    return torch.stack(rows, 1)


def recall(mass: Tensor, mask: BlockMask, granule: int) -> float:
    """Share of the attention that lies in kept pairs. mass: by key blocks of `granule` keys, which divides the mask's."""
    finer = mask.block_n // granule
    mass = F.pad(mass, (0, -mass.shape[-1] % finer)).unflatten(-1, (-1, finer)).sum(-1)
    return ((mass * mask.to_dense(mass.shape[-1])[0]).sum() / mass.sum()).item()


def measure(layer: Layer) -> Iterator[dict[str, Any]]:
    """One row for each method and density: what it keeps, and what that does to the output of each head."""
    q, k, v = layer.now
    masses: dict[bytes, Tensor] = {}
    for name, recipe in methods().items():
        arrangement = prepare(recipe, layer.grid, q.device, block=layer.block)
        order = torch.arange(q.shape[2]) if arrangement.order is None else arrangement.order
        finest = layer.block // 4
        key = order.numpy().tobytes()
        if key not in masses:
            masses[key] = block_mass(q[0, :, order], k[0, :, order], layer.block, finest)
        dense_seconds, exact = timed(F.scaled_dot_product_attention, q, k, v)
        look = layer.earlier if recipe.quick else layer.now
        for density in DENSITIES:
            budget = asked(density, arrangement)
            seconds, (mask, predicted) = timed(choose, recipe, arrangement, *look, density=budget)
            out, _ = sparse_attention(recipe, arrangement, q, k, v, density=budget, mask=mask, precision="native")
            yield {
                "method": name,
                "asked": density,
                "density": mask.density(arrangement.positions).item(),
                "work": arrangement.work(mask).item(),
                "off": (out - exact).square().sum((0, 2, 3)).tolist(),
                "of": exact.square().sum((0, 2, 3)).tolist(),
                "recall": recall(masses[key], mask, finest),
                "predicted": None if predicted is None else predicted.item(),
                "choosing": seconds / dense_seconds,
            }


def timed(function: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[float, Any]:
    """(CPU seconds, result): what else the machine does takes none of them."""
    start = time.process_time()
    result = function(*arguments, **named)
    return time.process_time() - start, result


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over all layers, one row for each method and density.

    error: |out - exact| / |exact|, the mean over heads; pooled_error: of all heads as one. ratio: measured / predicted error of a layer, its
    5 %, 50 % and 95 % points, where something was predicted. choosing: CPU seconds to choose / those of a dense call, the median.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["asked"]), []).append(row)
    table = []
    for (method, density), group in groups.items():
        heads = [(off, of) for row in group for off, of in zip(row["off"], row["of"], strict=True)]
        ratios = [math.sqrt(sum(row["off"]) / sum(row["of"])) / row["predicted"] for row in group if row["predicted"]]
        table.append(
            {
                "method": method,
                "asked": density,
                **{name: statistics.fmean(row[name] for row in group) for name in ("density", "work", "recall")},
                "error": statistics.fmean(math.sqrt(off / of) for off, of in heads),
                "pooled_error": math.sqrt(sum(off for off, _ in heads) / sum(of for _, of in heads)),
                "ratio": torch.tensor(ratios).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist() if ratios else None,
                "choosing": statistics.median(row["choosing"] for row in group),
            }
        )
    return table


def markdown(result: dict[str, Any]) -> list[str]:
    """The sections of the page; result: of `quality.heads_result`."""
    densities = ", ".join(f"{density:g}" for density in DENSITIES)
    about = {
        "recorded": f"Built-in model, {result['clips']} clips, all heads of all layers at step {NOW} of {STEPS}. A method that searches once "
        f"searched at step {EARLIER}; the others chose anew.",
        "planted": f"{result['layers']} layers of {len(KINDS)} planted heads ({', '.join(KINDS)}), {GRID.seq_len} tokens, head_dim {HEAD_DIM}. A "
        "method that searches once searched before everything moved a little.",
    }
    lines = [
        "## Single attention calls",
        "",
        f"`{result['command']}`, {result['date']}: torch {result['torch']}, CPU, threads: {result['threads']}. In each cell: at {densities} of all "
        "block pairs, or what the method keeps anyway where that is more. Work counts the tail, too. Error is |out - exact| / |exact|. Choosing: "
        "the CPU time that it takes, of that of a dense call beside it.",
    ]
    for name, intro in about.items():
        lines += ["", f"### {name.capitalize()} heads", "", intro, "", *_table(result[name])]
    return lines


def _table(table: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| method | kept | work | error, mean over heads | error, all heads as one | attention kept | choosing |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for method, group in itertools.groupby(table, key=lambda row: row["method"]):
        rows = list(group)
        columns = ("density", "work", "error", "pooled_error", "recall")
        cells = [" ".join(f"{row[name]:.3f}".removeprefix("0") for row in rows) for name in columns]
        lines.append(f"| {method} | {' | '.join(cells)} | {statistics.median(row['choosing'] for row in rows):.3f} |")
        if rows[0]["ratio"] is not None:
            ratios = ", ".join("{1:.2f} ({0:.2f} to {2:.2f})".format(*row["ratio"]) for row in rows)
            notes.append(f"Measured / predicted error of a layer, {method}, median (5 to 95 %): {ratios}.")
    return lines + [part for note in notes for part in ("", note)]
