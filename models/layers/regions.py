"""Anonymous regions: several layers of one canvas as one sequence of the tokens inside the layers' boxes.

Pu et al. 2025, "ART: Anonymous Region Transformer" (arXiv 2502.18364): layer 0 is the merged picture, layer 1 the background, both as large as
the canvas, then come the foregrounds, each in a box of whole tokens. One caption describes everything; no layer has a text of its own. A token
keeps its true place on the canvas, and the number of its layer, as its position. Clips are ours: every layer has as many latent frames, and its
box stays where it is.

The published weights of the method were a layer embedding (`layer_pe`) and a LoRA for Flux.1-dev in the layout of diffusers, which ComfyUI's own
LoRA loader reads. They have been withdrawn; nothing here fetches or contains any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from .compose import composite
from .document import Box, Document, Layer

PATCH = 2  # latent pixels of a token's side
TOKEN = 16  # pixels of a token's side: 8 of the autoencoder for each of the patch's
WHOLE = 2  # layers that have no box of their own: merged picture and background
MAX_FOREGROUNDS = 50  # the published layer embedding has 52 rows
LAYER_PE = "layer_pe"  # the tensor of a published layer embedding
TRAINED = "trained"  # key of a layer embedding's metadata: see `beyond_training`
LAYER_SPACING = 4  # from one layer to the next on the axis of time, for models that have one; more where a layer has more frames


@dataclass(frozen=True)
class Regions:
    """width, height: of the canvas. boxes: one a layer, inside the canvas. All in tokens. frames: of each layer, in latent frames."""

    width: int
    height: int
    boxes: tuple[Box, ...]
    frames: int = 1

    @property
    def tokens(self) -> int:
        return self.frames * sum(width * height for _, _, width, height in self.boxes)

    @cached_property
    def ids(self) -> Tensor:
        """int64 `(tokens, 4)`: layer, frame, row and column on the canvas; layer by layer, frame by frame, row by row."""
        parts = []
        for layer, (x, y, width, height) in enumerate(self.boxes):
            parts.append(
                torch.cartesian_prod(torch.tensor([layer]), torch.arange(self.frames), torch.arange(y, y + height), torch.arange(x, x + width))
            )
        return torch.cat(parts)

    @cached_property
    def index(self) -> Tensor:
        """int64 `(tokens,)`, ascending: places in the flattened `(layers, frames, height, width)`."""
        layer, frame, row, column = self.ids.unbind(1)
        return ((layer * self.frames + frame) * self.height + row) * self.width + column

    def finer(self, factor: int) -> Regions:
        """The same regions on a grid of `factor` times smaller tokens."""
        boxes = tuple((x * factor, y * factor, width * factor, height * factor) for x, y, width, height in self.boxes)
        return replace(self, width=self.width * factor, height=self.height * factor, boxes=boxes)

    def latent(self, patch: int) -> tuple[int, int, int]:
        """`(layers * frames, patch * height, patch * width)`: the last axes of a latent; layer by layer, frame by frame."""
        return len(self.boxes) * self.frames, patch * self.height, patch * self.width

    def fits(self, latent: Tensor, patch: int) -> bool:
        """Whether a latent is `(batch, channels, layers * frames, patch * height, patch * width)`."""
        return latent.ndim == 5 and tuple(latent.shape[2:]) == self.latent(patch)

    def crop(self, latent: Tensor, patch: int) -> Tensor:
        """`(batch, channels, layers * frames, patch * height, patch * width)` -> `(batch, channels, patch, patch * tokens)`, side by side.

        A network that patchifies this strip reads exactly the tokens inside the boxes, in the order of `ids`.
        """
        return self._patches(latent, patch)[..., self.index.to(latent.device), :].flatten(-2)

    def scatter(self, strip: Tensor, canvas: Tensor, patch: int) -> Tensor:
        """The inverse of `crop`: a copy of `canvas` with the strip's tokens inside the boxes."""
        patches = self._patches(canvas, patch).to(strip.dtype, copy=True)
        patches[..., self.index.to(canvas.device), :] = strip.unflatten(-1, (-1, patch)).to(canvas.device)
        grid: Tensor = patches.unflatten(-2, (-1, self.height, self.width))
        return grid.permute(0, 1, 3, 4, 2, 5, 6).flatten(-2).flatten(-3, -2)

    def _patches(self, latent: Tensor, patch: int) -> Tensor:
        """`(batch, channels, patch, layers * frames * height * width, patch)`."""
        grid: Tensor = latent.unflatten(-1, (self.width, patch)).unflatten(-3, (self.height, patch))
        return grid.permute(0, 1, 4, 2, 3, 5, 6).flatten(3, 5)


def parse_boxes(text: str) -> list[Box]:
    """One box a line: x, y, width, height in pixels. Raises ValueError naming the line."""
    boxes: list[Box] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        values = re.fullmatch(r"\s*(-?\d{1,6})[\s,]+(-?\d{1,6})[\s,]+(-?\d{1,6})[\s,]+(-?\d{1,6})\s*", line)
        if values is None:
            raise ValueError(f"boxes has {line.strip()[:40]!r} in line {number}; write x, y, width, height in pixels, such as 64, 32, 256, 128")
        x, y, width, height = map(int, values.groups())
        boxes.append((x, y, width, height))
    return boxes


def snap(boxes: Sequence[Box], width: int, height: int, frames: int = 1) -> Regions:
    """The regions of a canvas of `width` x `height` pixels with foregrounds in `boxes`, in pixels, lowest first. Boxes may overlap.

    frames: latent frames of each layer.

    Boxes grow to whole tokens and are cut at the canvas, which itself grows to whole tokens. Raises ValueError that names all boxes without an
    area and all outside of the canvas, and for more than MAX_FOREGROUNDS.
    """
    if len(boxes) > MAX_FOREGROUNDS:
        raise ValueError(f"boxes has {len(boxes)} foregrounds; use at most {MAX_FOREGROUNDS}")
    if min(width, height) < 1:
        raise ValueError(f"the canvas is {width} x {height} pixels; use 1 or more a side")
    problems = []
    for number, (x, y, box_width, box_height) in enumerate(boxes, 1):
        if min(box_width, box_height) < 1:
            problems.append(f"box {number} ({box_width} x {box_height} pixels) has no area")
        elif x >= width or y >= height or x + box_width <= 0 or y + box_height <= 0:
            problems.append(f"box {number} (at {x}, {y}, {box_width} x {box_height}) lies outside of the canvas of {width} x {height}")
    if problems:
        raise ValueError(f"{'; '.join(problems)}; give each box as x, y, width, height in pixels, with a part of it on the canvas")
    across, down = -(-width // TOKEN), -(-height // TOKEN)
    snapped = []
    for x, y, box_width, box_height in boxes:
        left, top = max(x // TOKEN, 0), max(y // TOKEN, 0)
        right, bottom = min(-(-(x + box_width) // TOKEN), across), min(-(-(y + box_height) // TOKEN), down)
        snapped.append((left, top, right - left, bottom - top))
    return Regions(across, down, ((0, 0, across, down),) * WHOLE + tuple(snapped), frames)


def positions(regions: Regions, spacing: int) -> Tensor:
    """int64 `(tokens, 3)` for a rotary embedding: layer and frame on one axis, row, column.

    spacing: 1 for image models, whose first axis counts pictures; LAYER_SPACING for video models. Layers of more frames are further apart.
    """
    layer, frame, row, column = regions.ids.unbind(1)
    return torch.stack([layer * max(spacing, regions.frames) + frame, row, column], 1)


def schedule_shift(tokens: int, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """Flux's exponential time shift `mu`: base_shift at 256 tokens, max_shift at 4096, on that line beyond. ART counts tokens inside boxes only."""
    return base_shift + (max_shift - base_shift) * (tokens - 256) / (4096 - 256)


def layer_embedding(state: Mapping[str, Tensor], regions: Regions, width: int) -> Tensor:
    """`(layers, width)`: what is added to a layer's tokens after the patch embedding of a transformer of this width: ART's, in the published layout.

    state: holds `layer_pe` `(1, at least layers, 1, 1, width)`. Raises ValueError.
    """
    table = state.get(LAYER_PE)
    if table is None:
        raise ValueError(f"the layer embedding has no tensor {LAYER_PE!r}; its tensors are {', '.join(sorted(state)[:5])[:200] or 'none'}")
    if table.ndim != 5 or tuple(table.shape[::2]) != (1, 1, width) or table.shape[3] != 1 or table.shape[1] < len(regions.boxes):
        raise ValueError(
            f"the layer embedding is {tuple(table.shape)}; model and boxes need (1, {len(regions.boxes)} or more, 1, 1, {width}): "
            "use the embedding of this model, or fewer boxes"
        )
    return table[0, : len(regions.boxes), 0, 0]


def beyond_training(trained: str, regions: Regions) -> list[str]:
    """What of these regions the model of a layer embedding was not trained on, a phrase each.

    trained: JSON of the file's metadata: `side` of canvases and `box` of boxes, both least and most pixels; `foregrounds`; `coverage`, the most
    that the boxes' areas together are of the canvas; `latent_frames`, each number of them. `clip_side` and `clip_foregrounds` hold for clips.
    """
    ranges, clip = json.loads(trained), "clip_" if regions.frames > 1 else ""
    foregrounds = regions.boxes[WHOLE:]
    found = []
    low, high = ranges[f"{clip}side"]
    for name, side in (("width", TOKEN * regions.width), ("height", TOKEN * regions.height)):
        if not low <= side <= high:
            found.append(f"{name} {side} ({low} to {high})")
    low, high = ranges["box"]
    sides = [TOKEN * side for *_, w, h in foregrounds for side in (w, h)]
    if sides and not low <= min(sides) <= max(sides) <= high:
        found.append(f"a box of {min(sides) if min(sides) < low else max(sides)} pixels ({low} to {high})")
    if len(foregrounds) > ranges[f"{clip}foregrounds"]:
        found.append(f"{len(foregrounds)} foregrounds (up to {ranges[f'{clip}foregrounds']})")
    if regions.frames not in ranges["latent_frames"]:
        found.append(f"{regions.frames} latent frames ({' or '.join(map(str, ranges['latent_frames']))})")
    coverage = sum(w * h for *_, w, h in foregrounds) / (regions.width * regions.height)
    if coverage > ranges["coverage"]:
        found.append(f"boxes {coverage:.1f} times the canvas together (up to {ranges['coverage']})")
    return found


def visible(document: Document, width: int, height: int) -> list[Layer]:
    """The layers of a document that show, lowest first, with the opacities of their groups. Raises ValueError where its canvas is another.

    width, height: of the canvas in pixels, which count in whole tokens.
    """
    given, found = ([-(-side // TOKEN) * TOKEN for side in sides] for sides in ((width, height), (document.width, document.height)))
    if given != found:
        raise ValueError(
            f"layers has a canvas of {document.width} x {document.height} pixels, and Region Layers one of {width} x {height}; "
            f"set width and height of Region Layers to {found[0]} and {found[1]}"
        )
    return [
        replace(layer, opacity=prod([layer.opacity, *(group.opacity for group in groups)]))
        for groups, layer in document.walk()
        if layer.visible and all(group.visible for group in groups)
    ]


def pictures(document: Document, regions: Regions) -> list[Tensor]:
    """What an autoencoder is shown of each layer: float32 `(height, width, 4)` in 0..1, straight alpha, on the CPU.

    Merged picture and background, which is the lowest visible layer, are as large as the canvas. Each other visible layer is a foreground: its box
    with a token of nothing around it, so that its border is no border of the picture. Raises ValueError for another canvas, another number of
    layers, and layers that reach out of their boxes.
    """
    width, height = TOKEN * regions.width, TOKEN * regions.height
    layers = visible(document, width, height)
    boxes = [tuple(TOKEN * value for value in box) for box in regions.boxes[WHOLE:]]
    if len(layers) != 1 + len(boxes):
        raise ValueError(
            f"layers has {len(layers)} visible layers, and latent has boxes for {len(boxes)} foregrounds; give the background and one layer a box"
        )
    problems = []
    for layer, (left, top, across, down) in zip(layers[1:], boxes, strict=True):
        x, y, w, h = layer.bounds
        inside = max(x, 0) >= left and max(y, 0) >= top and min(x + w, width) <= left + across and min(y + h, height) <= top + down
        if not inside:
            problems.append(f"layer {layer.name!r} (at {x}, {y}, {w} x {h}) reaches out of its box ({left}, {top}, {across} x {down})")
    if problems:
        raise ValueError(f"{'; '.join(problems)}; give Region Layers boxes that hold the layers, in their order")
    canvas = replace(document, width=width, height=height)
    found = [composite(canvas), composite(replace(canvas, layers=(layers[0],)))]
    for layer, (left, top, across, down) in zip(layers[1:], boxes, strict=True):
        alone = composite(Document(across, down, (replace(layer, x=layer.x - left, y=layer.y - top),)))
        found.append(F.pad(alone, (0, 0, TOKEN, TOKEN, TOKEN, TOKEN)))
    return found


def filled(latent: Tensor, regions: Regions, codes: Iterable[Tensor]) -> Tensor:
    """A copy of a latent `(channels, layers, PATCH * height, PATCH * width)` with each layer's code in its box.

    codes: `(channels, rows, columns)` each, what an autoencoder makes of `pictures`. Raises ValueError for another autoencoder's.
    """
    out = latent.clone()
    for layer, (code, (x, y, width, height)) in enumerate(zip(codes, regions.finer(PATCH).boxes, strict=True)):
        part = out[:, layer, y : y + height, x : x + width]
        inner = code if layer < WHOLE else code[:, PATCH:-PATCH, PATCH:-PATCH]
        if inner.shape != part.shape:
            raise ValueError(f"vae encodes layers to {tuple(inner.shape)}, and latent has {tuple(part.shape)}; use the VAE that Region Layers had")
        part.copy_(inner)
    return out
