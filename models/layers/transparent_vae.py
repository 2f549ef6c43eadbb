"""The multi-layer transparent autoencoder of ART (arXiv 2502.18364): colour and alpha of a layer in one latent of an ordinary autoencoder.

A layer is blended with grey before an ordinary autoencoder encodes it, so that the latent knows where it is transparent. The decoder here, a
ViT over the latents' tokens of all layers at once, each 8 pixels a side, reads colour and alpha from them.

The convolutional end (`decoder.tail.*`), which knows clips too, and `decoder.layer_spacing` are ours: the published files have neither.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.attention import attention
from ..weight_files import check_fit
from .regions import Regions, positions

PIXELS = 8  # of a token's side
FRAMES = 4  # of a latent frame after the first, which is one: as in Wan's autoencoder
HEAD_DIM = 64
AXES = (8, 28, 28)  # head dimensions that turn with layer and frame, row, column
PREFIX = "decoder."
SPACING = f"{PREFIX}layer_spacing"  # int64 `(1,)`; absent: 1
MAX_SPACING = 1024


def grey_blended(image: Tensor) -> Tensor:
    """`(..., 4)` in 0..1, straight alpha -> `(..., 3)`: the paper's (alpha / 2 + 1 / 2) * RGB, whose alpha and RGB are in -1..1."""
    return torch.lerp(torch.full_like(image[..., :3], 0.5), image[..., :3], image[..., 3:])


class TransparentDecoder(nn.Module):
    """operations: where layer classes come from (`Linear`, `LayerNorm`, `Conv2d`), so that a host can manage the weights.

    tail: whether it ends in `Tail` instead of the published linear layer, and so decodes clips. layer_spacing: as in `positions`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        blocks: int,
        hidden: int,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: Any = None,
        *,
        tail: bool = False,
        layer_spacing: int = 1,
    ):
        super().__init__()
        where = {"dtype": dtype, "device": device}
        self.layer_spacing, self.hidden = layer_spacing, hidden
        self.fc_in = operations.Linear(channels, width, **where)
        self.blocks = nn.ModuleList(Block(width, hidden, operations, where) for _ in range(blocks))
        self.norm = operations.LayerNorm(width, eps=1e-6, **where)
        self.tail = Tail(width, operations, where) if tail else None
        if not tail:
            self.fc_out = operations.Linear(width, 4 * PIXELS**2, **where)

    def memory(self, regions: Regions, skip: int = 0) -> int:
        """Bytes that `pictures` needs beside the weights, in float32: those of a block or those of the end, as counted by PyTorch's profiler."""
        width, hidden = self.fc_in.out_features, self.hidden
        frames = 1 + FRAMES * (regions.frames - 1)
        pixels = [PIXELS**2 * frames * across * down for _, _, across, down in regions.boxes[skip:]]
        block = regions.tokens * (8 * width + 2 * hidden + 74)
        end = regions.tokens * (2 * width + 74) + 4 * sum(pixels) + 50 * max(pixels, default=0)
        return 4 * max(block, end)

    def forward(self, latent: Tensor, regions: Regions, skip: int = 0, report: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Each layer in its box: `(pixel frames, 8 * box height, 8 * box width, 4)` in 0..1, straight alpha.

        As `pictures`, which says what its arguments are, and what is raised.
        """
        return [((picture.movedim(1, -1) + 1) / 2).clamp(0, 1) for picture in self.pictures(latent, regions, skip, report)]

    def pictures(self, latent: Tensor, regions: Regions, skip: int = 0, report: Callable[[], None] = lambda: None) -> list[Tensor]:
        """`(channels, layers * frames, height, width)`, as the autoencoder decodes it -> `(pixel frames, 4, 8 * box height, 8 * box width)` float32
        of each layer, not clamped: colour in -1..1 and alpha, transparent -1 and opaque 1.

        regions: on the latent's grid. skip: so many of the first layers are read with the others, but not decoded. report: called after each block
        and each layer that is decoded. Of a clip, pixel frames are 1 + 4 * (frames - 1). Raises ValueError for a clip where this decoder knows
        pictures only.
        """
        if regions.frames > 1 and self.tail is None:
            raise ValueError(f"the transparent decoder is for pictures, and the layers have {regions.frames} latent frames; use one for clips")
        cos, sin = rotary(positions(regions, self.layer_spacing).to(latent.device))
        x = self.fc_in(latent.flatten(1)[:, regions.index.to(latent.device)].T[None])
        for block in self.blocks:
            x = block(x, cos.to(x.dtype), sin.to(x.dtype))
            report()
        layers = self.norm(x)[0].split([regions.frames * width * height for _, _, width, height in regions.boxes])
        found = []
        for layer, (_, _, width, height) in list(zip(layers, regions.boxes, strict=True))[skip:]:
            grid = layer.unflatten(0, (regions.frames, height, width))
            if self.tail is None:
                patches = self.fc_out(grid).unflatten(-1, (4, PIXELS, PIXELS))  # (frames, height, width, 4, 8, 8)
                picture = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
            else:
                picture = self.tail(grid)
            found.append(picture.float())
            report()
        return found


class Tail(nn.Module):
    """From tokens to pixels in three doublings with convolutions, each layer for itself: a narrow decoder's linear layer would leave seams between
    tokens. Four frames are made of each latent frame after the first."""

    CHANNELS = (64, 32, 16)  # at 4, 2 and 1 pixels

    def __init__(self, width: int, operations: Any, where: dict[str, Any]):
        super().__init__()
        self.time = operations.Linear(width, FRAMES * width, **where)
        sizes = list(itertools.pairwise((width, *self.CHANNELS)))
        self.up = nn.ModuleList(operations.Conv2d(before, 4 * after, 1, **where) for before, after in sizes)
        self.mix = nn.ModuleList(operations.Conv2d(after, after, 3, padding=1, **where) for _, after in sizes)
        self.out = operations.Conv2d(self.CHANNELS[-1], 4, 1, **where)

    def forward(self, x: Tensor) -> Tensor:
        """`(frames, height, width, channels)` -> `(1 + 4 * (frames - 1), 4, 8 * height, 8 * width)`."""
        later = self.time(x[1:]).unflatten(-1, (FRAMES, -1)).movedim(-2, 1).flatten(0, 1)
        y = torch.cat([x[:1], later]).movedim(-1, 1)
        for up, mix in zip(self.up, self.mix, strict=True):
            y = F.pixel_shuffle(up(y), 2)
            y = y + mix(F.silu(y))
        return self.out(F.silu(y))


class Block(nn.Module):
    """A block of a ViT on `(batch, tokens, width)`. What turns is its normalised input, before queries and keys are made of it."""

    def __init__(self, width: int, hidden: int, operations: Any, where: dict[str, Any]):
        super().__init__()
        self.ln_1 = operations.LayerNorm(width, eps=1e-6, **where)
        self.qk = operations.Linear(width, 2 * width, **where)
        self.v = operations.Linear(width, width, **where)
        self.out_proj = operations.Linear(width, width, **where)
        self.ln_2 = operations.LayerNorm(width, eps=1e-6, **where)
        self.mlp = nn.Sequential(operations.Linear(width, hidden, **where), nn.GELU(), operations.Linear(hidden, width, **where))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.ln_1(x)
        a, b = y.unflatten(-1, (-1, HEAD_DIM // 2, 2)).unbind(-1)
        cos, sin = cos[:, None], sin[:, None]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(2)
        q, k = self.qk(turned).unflatten(-1, (2, -1, HEAD_DIM)).transpose(1, 3).unbind(2)
        v = self.v(y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        x = x + self.out_proj(attention(q, k, v, precision="native").transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


def rotary(ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `(tokens, HEAD_DIM / 2)` float32 of positions `(tokens, 3)`, as in Flux: theta 10000, pairs of neighbours."""
    angles = [
        ids[:, axis, None].double() * 10000.0 ** -(torch.arange(0, size, 2, device=ids.device, dtype=torch.float64) / size)
        for axis, size in enumerate(AXES)
    ]
    angle = torch.cat(angles, -1)
    return angle.cos().float(), angle.sin().float()


def build(state: Mapping[str, Tensor], operations: Any = nn, dtype: torch.dtype | None = None, device: Any = None) -> TransparentDecoder:
    """The decoder of a state dict in the published layout (`decoder.fc_in.weight`, `decoder.encoder.layers.encoder_layer_0.ln_1.weight`, ...).

    With `decoder.tail.*` instead of `decoder.fc_out.*` it decodes clips, and `decoder.layer_spacing` says how far apart its layers are.

    Raises ValueError for another layout.
    """
    found = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    entry, first = found.get("fc_in.weight"), found.get(f"{_block(0)}mlp.0.weight")
    if entry is None or first is None or entry.ndim != 2 or first.ndim != 2 or not len(entry) or len(entry) % HEAD_DIM:
        raise ValueError(
            f"no transparent decoder: it needs {PREFIX}fc_in.weight, of {HEAD_DIM} features a head, and {PREFIX}{_block(0)}mlp.0.weight; "
            f"the tensors are {', '.join(sorted(state)[:5])[:200] or 'none'}"
        )
    width, channels = entry.shape
    blocks = sum(name.endswith(".mlp.0.weight") for name in found)
    spacing = state.get(SPACING, torch.ones(1))  # in the dtype of the file's weights
    if spacing.shape != (1,) or not 1 <= spacing.item() <= MAX_SPACING or spacing.item() % 1:
        raise ValueError(f"{SPACING} of the transparent decoder is {spacing.flatten()[:5].tolist()}; it is one whole number, 1 to {MAX_SPACING}")
    make = partial(TransparentDecoder, channels, width, blocks, first.shape[0], tail="tail.out.weight" in found, layer_spacing=int(spacing))
    renamed = {name: value for name, value in found.items() if name.startswith(("fc_", "tail."))}
    renamed |= {f"norm.{name.removeprefix('encoder.ln.')}": value for name, value in found.items() if name.startswith("encoder.ln.")}
    for index in range(blocks):
        old, new = _block(index), f"blocks.{index}."
        for name, value in ((name, value) for name, value in found.items() if name.startswith(old)):
            part = name.removeprefix(old).removeprefix("self_attention.")
            if part.startswith("in_proj_") and value.ndim:
                kind = part.removeprefix("in_proj_")
                renamed[f"{new}qk.{kind}"], renamed[f"{new}v.{kind}"] = value[: 2 * width], value[2 * width :]
            else:
                renamed[new + part.replace("mlp.3.", "mlp.2.")] = value
    check_fit(renamed, make, "a transparent decoder")
    network = make(operations=operations, dtype=dtype, device=device)
    network.load_state_dict(renamed)
    return network.eval()


def published(network: TransparentDecoder) -> dict[str, Tensor]:
    """The inverse of `build`: a state dict in the published layout, for safetensors."""
    state = {}
    for name, value in network.state_dict().items():
        if name.startswith("blocks."):
            _, index, part = name.split(".", 2)
            if part.startswith("qk."):
                kind = part.removeprefix("qk.")
                joined = [value, network.get_parameter(f"blocks.{index}.v.{kind}")]
                state[f"{PREFIX}{_block(int(index))}self_attention.in_proj_{kind}"] = torch.cat(joined).detach()
            elif not part.startswith("v."):
                part = part.replace("out_proj", "self_attention.out_proj").replace("mlp.2.", "mlp.3.")
                state[f"{PREFIX}{_block(int(index))}{part}"] = value
        else:
            state[PREFIX + name.replace("norm.", "encoder.ln.")] = value
    if network.layer_spacing > 1:
        state[SPACING] = torch.tensor([network.layer_spacing])
    return state


def _block(index: int) -> str:
    return f"encoder.layers.encoder_layer_{index}."
