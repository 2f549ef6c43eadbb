"""Attention maps of the concepts' words, as one forward computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...families import spans_of

MAP_SCALE = 4
"""The attention maps that are looked at are this many times smaller than the latent (16 x 32 for 512 x 1024 pixels in the paper)."""


@dataclass
class Maps:
    """Attention maps of the prompt's forwards at one step. Lists over layers; means over heads, and over the conditionings of a forward.

    size: (height, width) of the tokens that are looked at. cross: per concept `(batch, frames * height * width, words)`. with_self: also
    collect `own`, the self-attention `(batch, height * width, height * width)` (UNet).
    """

    size: tuple[int, int]
    with_self: bool = False
    cross: dict[int, list[Tensor]] = field(default_factory=dict)
    own: list[Tensor] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """False where no forward took place (a prompt that is not in force at the step), or its self-attention was another's."""
        return bool(self.cross) and (bool(self.own) or not self.with_self)

    def keep(self, index: int, found: Tensor) -> None:
        """A layer's map of the words of concept `index`."""
        self.cross.setdefault(index, []).append(found)

    def concept(self, index: int) -> Tensor:
        """`(batch, height, width, words)`, the mean over layers and frames."""
        found = torch.stack(self.cross[index]).mean(0)
        return found.view(len(found), -1, *self.size, found.shape[2]).mean(1)


def probabilities(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """float32 `(batch, queries, keys)`, the mean over heads, of q and k `(batch, heads, tokens, head_dim)` with an additive mask."""
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if bias is None else scores + bias).softmax(-1).mean(1)


def word_map(q: Tensor, k: Tensor, words: Sequence[int], scale: float | None = None) -> Tensor:
    """The same for some of the keys: float32 `(batch, queries, words)`."""
    total = torch.zeros((), device=q.device)
    for head in range(q.shape[1]):  # one by one: videos are long
        total = total + probabilities(q[:, [head]], k[:, [head]], scale)[..., list(words)]
    return total / q.shape[1]


def map_size(network: nn.Module, latent_shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of the tokens whose maps are looked at: of a UNet, the level with cross-attention whose scale is nearest to MAP_SCALE."""
    spans = spans_of(network, latent_shape, {})
    if spans is not None:
        return spans.height, spans.width
    scale, scales = 1, set()
    for block in network.get_submodule("input_blocks").children():
        scale *= 2 if any(type(module).__name__ == "Downsample" for module in block.modules()) else 1
        if any(name.endswith("attn2") for name, _ in block.named_modules()):
            scales.add(scale)
    height, width = latent_shape[-2:]
    for _ in range(min(scales, key=lambda found: abs(found - MAP_SCALE)).bit_length() - 1):
        height, width = -(-height // 2), -(-width // 2)
    return height, width
