"""The multi-layer transparent autoencoder of ART (arXiv 2502.18364): colour and alpha of a layer in one latent of an ordinary autoencoder.

A layer is blended with grey before an ordinary autoencoder encodes it, so that the latent knows where it is transparent. The decoder here, a
ViT over the latents' tokens of all layers at once, each 8 pixels a side, reads colour and alpha from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.attention import attention
from .regions import Regions

PIXELS = 8  # of a token's side
HEAD_DIM = 64
AXES = (8, 28, 28)  # head dimensions that turn with layer, row and column
PREFIX = "decoder."


def grey_blended(image: Tensor) -> Tensor:
    """`(..., 4)` in 0..1, straight alpha -> `(..., 3)`: the paper's (alpha / 2 + 1 / 2) * RGB, whose alpha and RGB are in -1..1."""
    return torch.lerp(torch.full_like(image[..., :3], 0.5), image[..., :3], image[..., 3:])


class TransparentDecoder(nn.Module):
    """operations: where layer classes come from (`Linear`, `LayerNorm`), so that a host can manage the weights."""

    def __init__(
        self, channels: int, width: int, blocks: int, hidden: int, operations: Any = nn, dtype: torch.dtype | None = None, device: Any = None
    ):
        super().__init__()
        where = {"dtype": dtype, "device": device}
        self.fc_in = operations.Linear(channels, width, **where)
        self.blocks = nn.ModuleList(Block(width, hidden, operations, where) for _ in range(blocks))
        self.norm = operations.LayerNorm(width, eps=1e-6, **where)
        self.fc_out = operations.Linear(width, 4 * PIXELS**2, **where)

    def forward(self, latent: Tensor, regions: Regions) -> Tensor:
        """`(channels, layers, height, width)`, as the autoencoder decodes it -> `(layers, 8 * height, 8 * width, 4)` in 0..1, straight alpha.

        regions: on the latent's grid. Outside of its box a layer is grey and fully transparent.
        """
        cos, sin = rotary(regions.ids.to(latent.device))
        x = self.fc_in(latent.flatten(1)[:, regions.index.to(latent.device)].T[None])
        for block in self.blocks:
            x = block(x, cos.to(x.dtype), sin.to(x.dtype))
        patches = self.fc_out(self.norm(x))[0].float().unflatten(-1, (4, PIXELS, PIXELS)).permute(1, 2, 0, 3).flatten(-2)[None]
        canvas = patches.new_zeros(1, 4, len(regions.boxes), PIXELS * regions.height, PIXELS * regions.width)
        canvas[:, 3] = -1
        return ((regions.scatter(patches, canvas, PIXELS)[0].movedim(0, -1) + 1) / 2).clamp(0, 1)


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

    Raises ValueError for another layout.
    """
    found = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    entry, first = found.get("fc_in.weight"), found.get(f"{_block(0)}mlp.0.weight")
    if entry is None or first is None or entry.shape[0] % HEAD_DIM:
        raise ValueError(
            f"no transparent decoder: it needs {PREFIX}fc_in.weight, of {HEAD_DIM} features a head, and {PREFIX}{_block(0)}mlp.0.weight; "
            f"the tensors are {', '.join(sorted(state)[:5]) or 'none'}"
        )
    width, channels = entry.shape
    blocks = sum(name.endswith(".mlp.0.weight") for name in found)
    network = TransparentDecoder(channels, width, blocks, first.shape[0], operations, dtype, device)
    renamed = {name: value for name, value in found.items() if name.startswith("fc_")}
    renamed |= {f"norm.{name.removeprefix('encoder.ln.')}": value for name, value in found.items() if name.startswith("encoder.ln.")}
    for index in range(blocks):
        old, new = _block(index), f"blocks.{index}."
        for name, value in ((name, value) for name, value in found.items() if name.startswith(old)):
            part = name.removeprefix(old).removeprefix("self_attention.")
            if part.startswith("in_proj_"):
                kind = part.removeprefix("in_proj_")
                renamed[f"{new}qk.{kind}"], renamed[f"{new}v.{kind}"] = value[: 2 * width], value[2 * width :]
            else:
                renamed[new + part.replace("mlp.3.", "mlp.2.")] = value
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"the tensors of the transparent decoder do not fit together: {error}") from error
    return network.eval()


def _block(index: int) -> str:
    return f"encoder.layers.encoder_layer_{index}."
