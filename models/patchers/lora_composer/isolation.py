"""Concept isolation: self-attention that does not pass from one concept's box to another's, as a mask or as blocks that are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels import attention as kernel
from ....kernels import dispatch
from ....kernels.block_mask import BlockMask, num_blocks

BLOCK = 64


class Isolation:
    """Who reads whom in self-attention, as groups of tokens: background, one a concept, and in front of them the text if there is any.

    labels: int64 `(image tokens,)`, 0 for the background. text: lengths of the global prompt and of each concept's prompt (joint attention).
    A concept's box reads the background, itself, and its own prompt (without one, the global prompt), and other boxes unless `isolate`.
    """

    def __init__(self, concepts: int, labels: Tensor, text: Sequence[int], isolate: bool, device: torch.device):
        prompts = len(text) > 1
        everything = 1 + concepts  # the label of the global prompt; the concepts' prompts follow
        self.groups = torch.cat([*(torch.full((length,), everything + index) for index, length in enumerate(text)), labels]).to(device)
        reads = torch.zeros(2 + 2 * concepts, 2 + 2 * concepts, dtype=torch.bool)
        picture = slice(0, 1 + concepts)
        reads[[0, everything], picture] = True
        reads[[0, everything], everything] = True
        for index in range(1, 1 + concepts):
            reads[index, picture] = not isolate
            reads[index, [0, index]] = True
            reads[index, everything + index if prompts else everything] = True
            reads[everything + index, [index, everything + index]] = True
        self.reads = reads.to(device)

    def allowed(self) -> Tensor:
        """bool `(tokens, tokens)`, True where a query reads a key."""
        return self.reads[self.groups][:, self.groups]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The same as an additive mask: 0 or -inf."""
        allowed = self.allowed()
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))

    def blocks(self) -> Blocks:
        """The same as a block mask: tokens sorted by group, and every group filled up to whole blocks with hidden keys."""
        order, real, block_groups = [], [], []
        for group in sorted(set(self.groups.tolist())):
            ids = (self.groups == group).nonzero()[:, 0]
            count = num_blocks(len(ids), BLOCK)
            order.append(F.pad(ids, (0, count * BLOCK - len(ids))))
            real.append(torch.arange(count * BLOCK, device=ids.device) < len(ids))
            block_groups += [group] * count
        sources, kept = torch.cat(order), torch.cat(real)
        inverse = torch.empty_like(self.groups)
        inverse[sources[kept]] = kept.nonzero()[:, 0]
        key_bias = torch.zeros(len(sources), device=kept.device).masked_fill_(~kept, float("-inf"))
        mask = BlockMask.from_dense(self.reads[block_groups][:, block_groups][None, None], BLOCK, BLOCK)
        return Blocks(sources, inverse, key_bias, mask, float(mask.density(len(sources))))


@dataclass(frozen=True)
class Blocks:
    """order: int64 (padded,) source of each position. inverse: int64 (tokens,) position of each token. key_bias: float32 (padded,).

    density: kept / all block pairs.
    """

    order: Tensor
    inverse: Tensor
    key_bias: Tensor
    mask: BlockMask
    density: float


def skip(blocks: Blocks, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor | None:
    """Attention of `(batch, heads, tokens, head_dim)` that skips what is not read; None where no backend takes the call."""
    q, k, v = (x.index_select(2, blocks.order) for x in (q, k, v))
    key_bias = blocks.key_bias.expand(q.shape[0], -1)
    problem = dispatch.describe(q, k, v, block_mask=blocks.mask, key_bias=key_bias)
    own = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(q.dtype, "native")
    choices = (kernel.explain(problem, precision) for precision in (own, "native"))
    choice = next((choice for choice in choices if choice.implementation is not None), None)
    if choice is None:
        return None
    return kernel.attention(q, k, v, block_mask=blocks.mask, key_bias=key_bias, choice=choice, scale=scale).index_select(2, blocks.inverse)
