"""The layered transformer: Wan's text-to-video transformer on the tokens of regions, with ART's layer embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...default import networks
from ..regions import LAYER_SPACING, MAX_FOREGROUNDS, WHOLE, Regions, positions

LAYERS = WHOLE + MAX_FOREGROUNDS
CONFIG = dict(networks.DIT_CONFIG, layers=4)


class LayeredTransformer(networks.WanTransformer):
    """Velocity of the tokens of regions, side by side in a strip one token high, as a host samples them."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**{**CONFIG, **config})
        self.layer_pe = nn.Parameter(torch.zeros(1, LAYERS, 1, 1, self.dim))

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, context: Tensor, positions: Tensor, layers: Tensor, pad: Tensor | None = None, context_pad: Tensor | None = None
    ) -> Tensor:
        """strip x `(batch, 16, 1, 2, 2 * tokens)`, t `(batch,)` in 0..1000, context `(batch, words, text_dim)`, positions `(batch, tokens, 3)`,
        layers int64 `(batch, tokens)`, pad and context_pad `(batch, 1, 1, tokens or words)`: -inf where nothing is. Returns like x.
        """
        y = self.patch_embedding(x).flatten(2).transpose(1, 2) + self.layer_pe[0, :, 0, 0][layers]
        e = self.time_embedding(networks.sinusoid(t, self.freq_dim))
        modulation = self.time_projection(e).unflatten(1, (6, -1))
        context, table = self.text_embedding(context), rotary(positions, self.head_dim)
        for block in self.blocks:
            y = block(y, modulation, context, table, pad, context_pad)
        y = self.head(y, e).unflatten(-1, (2, 2, -1))  # (batch, tokens, 2, 2, channels)
        return y.permute(0, 4, 2, 1, 3).flatten(-2).unsqueeze(2)


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each `(batch, tokens, 1, head_dim / 2)`."""
    angles = [positions[..., axis, None].double() * networks.rotary_frequencies(size) for axis, size in enumerate(networks.axis_sizes(head_dim))]
    angle = torch.cat(angles, -1)[:, :, None]
    return angle.cos().float(), angle.sin().float()


def padding(lengths: Tensor) -> Tensor:
    """`(batch,)` -> `(batch, 1, 1, longest)`: 0 where something is, -inf beyond."""
    beyond = torch.arange(int(lengths.max())) >= lengths[:, None]
    return torch.zeros(beyond.shape).masked_fill(beyond, -math.inf)[:, None, None]


def collate(regions: list[Regions], contexts: list[Tensor], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """What LayeredTransformer.forward needs beside the strip and t."""
    ids = [part.ids for part in regions]
    given = dict(
        context=pad_sequence(contexts, True),
        context_pad=padding(torch.tensor([len(part) for part in contexts])),
        positions=pad_sequence([positions(part, LAYER_SPACING) for part in regions], True),
        layers=pad_sequence([part[:, 0] for part in ids], True),
        pad=padding(torch.tensor([len(part) for part in ids])),
    )
    return {name: value.to(device) for name, value in given.items()}
