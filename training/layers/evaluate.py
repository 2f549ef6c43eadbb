"""The layered weights on held-out layouts: does the merged picture show the layers, and are the layers what the caption says?

python -m tessera.training.layers.evaluate [--folder WHERE] [--layouts 100] [--clips 20] [--layers 2 52] [--boxes scattered] [--out FILE]

autoencoder: PSNR of held-out pictures and clips that the VAE alone encodes and decodes. merged: PSNR of the merged picture against the composite of
ground and layers, and against the composite of another layout, on its canvas. iou: of a layer's alpha with the best-fitting object that the caption
names, drawn into its box; box: the same of a filled box. named: share of layers whose colour and best-fitting shape the caption names together.
rows: each layout. --layers: so many layouts with each of these numbers of layers, merged picture and ground counted, instead of the numbers that
training has. --boxes: other places than training has: scattered, of any size and place, over one another; whole, one box over the canvas;
large, the layout four times as wide and high, its boxes with it. --sheet FILE: a picture of the first ones.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tessera.models.default.networks import build_vae
from tessera.models.layers import transparent_vae
from tessera.models.layers.compose import on_checkerboard
from tessera.models.layers.default import sampling, vocabulary
from tessera.models.layers.default.networks import LayeredTransformer
from tessera.models.layers.document import Box
from tessera.models.layers.regions import WHOLE, Regions

from ..default.clips import PALETTE
from ..default.train_vae import psnr
from . import dataset, drawn, export
from .train_vae import held_out

SEED = 2 * 10**6
LARGE = 4
BOXES = ("drawn", "scattered", "whole", "large")


def load(folder: Path) -> tuple[Any, LayeredTransformer, transparent_vae.TransparentDecoder]:
    """VAE, transformer and decoder from the files that nodes load."""

    def tensors(file: Path) -> dict[str, Tensor]:
        return {name: value.float() for name, value in load_file(folder / file).items()}

    vae, model = build_vae(), LayeredTransformer()
    vae.load_state_dict(tensors(export.VAE))
    model.load_state_dict(tensors(export.TRANSFORMER) | tensors(export.EMBEDDING))
    return vae.eval(), model.eval(), transparent_vae.build(tensors(export.DECODER))


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two alphas, soft edges counted in part."""
    return float(torch.minimum(a, b).sum() / torch.maximum(a, b).sum().clamp_min(1e-6))


def read(layer: Tensor, kinds: list[vocabulary.Kind]) -> tuple[float, float, bool]:
    """Of a layer `(frames, height, width, 4)` cut to its box: IoU with the best-fitting kind, that of the filled box, and whether its colour and
    shape are named together. Means over frames."""
    frames, height, width, _ = layer.shape
    named = []
    for kind in kinds:
        truth = drawn.foreground(kind, width, height, frames)[..., 3]
        fits = [iou(mine, theirs) for mine, theirs in zip(layer[..., 3], truth, strict=True)]
        boxes = [iou(torch.ones_like(theirs), theirs) for theirs in truth]
        named.append((sum(fits) / frames, sum(boxes) / frames, kind))
    fit, _, best = max(named, key=lambda found: found[0])
    solid = layer[layer[..., 3] > 0.5][:, :3]
    colour = int((PALETTE - solid.mean(0)).norm(dim=1).argmin()) if len(solid) else -1
    return fit, max(box for _, box, _ in named), any(kind.colour == colour and kind.shape == best.shape for kind in kinds)


def placed(boxes: list[Box], where: str, generator: torch.Generator) -> list[Box]:
    """Boxes in tokens, of canvas, ground and foregrounds, where training has none: see BOXES in the module's words."""
    width, height = boxes[0][2:]

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    if where == "scattered":
        sizes = [(1 + below(min(dataset.SIZES[-1], width)), 1 + below(min(dataset.SIZES[-1], height))) for _ in boxes[WHOLE:]]
        return [*boxes[:WHOLE], *((below(width - w + 1), below(height - h + 1), w, h) for w, h in sizes)]
    if where == "whole":
        return [*boxes[:WHOLE], boxes[0]]
    if where == "large":
        return [(LARGE * x, LARGE * y, LARGE * w, LARGE * h) for x, y, w, h in boxes]
    return boxes


def evaluate(
    networks: tuple[Any, LayeredTransformer, transparent_vae.TransparentDecoder],
    layouts: int,
    frames: int,
    generator: torch.Generator,
    layers: int | None = None,
    where: str = "drawn",
) -> tuple[dict[str, Any], list[tuple[str, sampling.Decoded]]]:
    """Figures, and what was made. layers: of each layout; None leaves it to `dataset.sample`. where: one of BOXES."""
    vae, model, decoder = networks
    made: list[tuple[str, sampling.Decoded]] = []
    rows: list[dict[str, Any]] = []
    for number in range(layouts):
        found = dataset.sample(frames, generator, None if layers is None else layers - WHOLE)
        boxes, caption = placed(dataset.boxes_of(found), where, generator), dataset.caption_of(found)
        regions = Regions(*boxes[0][2:], tuple(boxes), (frames - 1) // 4 + 1)
        decoded = sampling.decode(vae, decoder, sampling.latents(model, regions, caption, number), regions)
        read_back = []
        for box, cut in zip(boxes[WHOLE:], decoded.layers, strict=True):
            x, y, width, height = drawn.pixels(box)
            read_back.append(read(cut[:, y : y + height, x : x + width], list(caption.kinds)))
        own = psnr(2 * decoded.merged - 1, 2 * decoded.composite() - 1)
        rows.append(dict(layers=len(boxes), merged=own, read=read_back, canvas=decoded.merged.shape[1:3], caption=vocabulary.text(caption)))
        made.append((vocabulary.text(caption), decoded))
    others = []
    for (_, decoded), (_, other) in zip(made, made[1:] + made[:1], strict=True):
        size = decoded.merged.shape[1:3]
        picture = F.interpolate(other.composite().movedim(-1, 1), size, mode="bilinear").movedim(1, -1)
        others.append(psnr(2 * decoded.merged - 1, 2 * picture - 1))
    every = [read_back for row in rows for read_back in row["read"]]

    def mean(values: list[float]) -> float | None:
        return round(sum(values) / len(values), 3) if values else None

    def span(rows: list[dict[str, Any]]) -> str:
        return f"{min(row['layers'] for row in rows)} to {max(row['layers'] for row in rows)}"

    groups = {}
    for low, high in ((2, 5), (6, 11), (12, 21), (22, 52)):
        group = [row for row in rows if low <= row["layers"] <= high]
        if group:
            groups[f"{span(group)} layers"] = dict(
                layouts=len(group), merged_db=mean([row["merged"] for row in group]), iou=mean([fit for row in group for fit, _, _ in row["read"]])
            )
    figures = dict(
        layouts=layouts,
        layers=span(rows),
        merged_db=mean([row["merged"] for row in rows]),
        merged_lowest_db=round(min(row["merged"] for row in rows), 3),
        another_layout_db=mean(others),
        iou=mean([fit for fit, _, _ in every]),
        filled_box_iou=mean([box for _, box, _ in every]),
        named=mean([float(named) for _, _, named in every]),
        by_layers=groups,
        rows=[
            dict(
                layers=row["layers"],
                canvas=f"{row['canvas'][1]} x {row['canvas'][0]}",
                caption=row["caption"],
                merged_db=round(row["merged"], 3),
                iou=mean([fit for fit, _, _ in row["read"]]),
                named=mean([float(named) for _, _, named in row["read"]]),
            )
            for row in rows
        ],
    )
    return figures, made


def sheet(made: list[tuple[str, sampling.Decoded]], file: str, columns: int = 8, side: int = 160) -> None:
    """One row each: merged, composite, ground, and the first layers on a checkerboard; of clips the middle frame."""

    def cell(picture: Tensor) -> Tensor:
        if picture.shape[-1] == 4:
            picture = on_checkerboard(picture)
        return F.pad(picture[..., :3], (0, 0, 0, side - picture.shape[1], 0, side - picture.shape[0]), value=0.15)

    rows = []
    for _, decoded in made:
        frame = len(decoded.merged) // 2
        cells = [decoded.merged[frame], decoded.composite()[frame], decoded.back[frame], *(layer[frame] for layer in decoded.layers)]
        cells = [cell(picture) for picture in cells[:columns]]
        cells += [torch.full((side, side, 3), 0.15)] * (columns - len(cells))
        rows.append(torch.cat(cells, 1))
    Image.fromarray((torch.cat(rows) * 255).round().byte().numpy()).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=str(export.HERE))
    parser.add_argument("--layouts", type=int, default=100)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--layers", type=int, nargs="*", default=[])
    parser.add_argument("--boxes", choices=BOXES, nargs="+", default=["drawn"])
    parser.add_argument("--out")
    parser.add_argument("--sheet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    networks = load(Path(options.folder))
    about = dict(date=options.date, device=f"cpu ({platform.machine()})", threads=options.threads, torch=torch.__version__)
    about |= dict(python=platform.python_version(), steps=sampling.STEPS, cfg=sampling.CFG, shift=sampling.SHIFT)
    results: dict[str, Any] = {"about": about}
    results["autoencoder"] = {
        name: {"mean_db": round(mean, 3), "lowest_db": round(least, 3), "samples": many}
        for name, frames, many in (("pictures", 1, 24), ("clips", 9, 8))
        for mean, least in [held_out(networks[0], frames, many)]
    }
    made: list[tuple[str, sampling.Decoded]] = []
    for what, many, frames in (("pictures", options.layouts, 1), ("clips", options.clips, 9)):
        for layers, where in itertools.product(options.layers or [None], options.boxes) if many else []:
            name = (what if layers is None else f"{what} of {layers} layers") + ("" if where == "drawn" else f", {where} boxes")
            results[name], some = evaluate(networks, many, frames, torch.Generator().manual_seed(SEED + frames), layers, where)
            made += some[:12]
            print(name, json.dumps({key: value for key, value in results[name].items() if key != "rows"}, indent=1), flush=True)
    if options.sheet:
        sheet(made, options.sheet)
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
