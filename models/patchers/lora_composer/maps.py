"""Attention maps of the concepts' words, as one forward computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...families import layout_of
from .isolation import Isolation

if TYPE_CHECKING:
    from .composer import Call

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

    def look(self, call: Call, module: Any, x: Tensor) -> None:
        """At a cross-attention: the concepts' keys against the base's queries of the whole picture."""
        if call.composer.kind == "unet":
            if x.shape[1] != math.prod(self.size):
                return
            to_q, to_k, heads = module.to_q, module.to_k, module.heads
        else:
            heads = module.num_heads
            to_q, to_k = (lambda x: module.norm_q(module.q(x))), (lambda x: module.norm_k(module.k(x)))
        q = to_q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for index in range(len(call.composer.concepts)):
            with call.concept(index):
                k = to_k(call.text(index, x)).unflatten(-1, (heads, -1)).transpose(1, 2)
            self._keep(call, index, q, k, None)

    def look_joint(self, call: Call, q: Tensor, k: Tensor, scale: float | None) -> None:
        """At a joint attention of text and picture: the same with the appended prompts."""
        assert call.layout is not None
        first = q.shape[2] - call.layout.image_tokens + call.layout.references_before
        last = q.shape[2] - call.layout.references_after
        start = q.shape[2] - call.layout.image_tokens - sum(call.prompts)
        for index, length in enumerate(call.prompts):
            self._keep(call, index, q[:, :, first:last], k[:, :, start : start + length], scale)
            start += length

    def look_self(self, call: Call, q: Tensor, k: Tensor, isolation: Isolation | None, scale: float | None) -> None:
        if self.with_self and q.shape[2] == math.prod(self.size):
            bias = None if isolation is None else isolation.bias(torch.float32)
            self.own.append(call.per_latent(_probabilities(q, k, bias, scale)))

    def _keep(self, call: Call, index: int, q: Tensor, k: Tensor, scale: float | None) -> None:
        words = call.composer.concepts[index].words
        probabilities = torch.zeros((), device=q.device)
        for head in range(q.shape[1]):  # one by one: videos are long
            probabilities = probabilities + _probabilities(q[:, [head]], k[:, [head]], None, scale)[..., list(words)]
        self.cross.setdefault(index, []).append(call.per_latent(probabilities / q.shape[1]))

    def concept(self, index: int) -> Tensor:
        """`(batch, height, width, words)`, the mean over layers and frames."""
        return torch.stack(self.cross[index]).mean(0).unflatten(1, (-1, *self.size)).mean(1)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if bias is None else scores + bias).softmax(-1).mean(1)


def map_size(network: nn.Module, latent_shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of the tokens whose maps are looked at: of a UNet, the level with cross-attention whose scale is nearest to MAP_SCALE."""
    layout = layout_of(network, latent_shape, {})
    if layout is not None:
        return layout.height, layout.width
    scale, scales = 1, set()
    for block in network.get_submodule("input_blocks").children():
        scale *= 2 if any(type(module).__name__ == "Downsample" for module in block.modules()) else 1
        if any(name.endswith("attn2") for name, _ in block.named_modules()):
            scales.add(scale)
    height, width = latent_shape[-2:]
    for _ in range(min(scales, key=lambda found: abs(found - MAP_SCALE)).bit_length() - 1):
        height, width = -(-height // 2), -(-width // 2)
    return height, width
