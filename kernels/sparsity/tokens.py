"""Tokens: one attention call as the parts of a recipe see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import num_blocks
from ..pool import block_bias, block_mean


@dataclass(frozen=True, eq=False)
class Tokens:
    """Queries, keys and values of a call, in the order of the blocks.

    q `(batch, heads, tokens, head_dim)`; k, v `(batch, kv_heads, tokens, head_dim)`. query_bias: `(1, tokens)`, -inf for what only fills a
    block, or None. key_bias: `(batch, tokens)`, added to every score of a key, or None; both are float32, logarithms of weights.
    block: queries in a block; granule: keys in a block, which divides it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    block: int
    granule: int
    scale: float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of scores: (batch, heads, query blocks, key blocks)."""
        return (*self.q.shape[:2], num_blocks(self.q.shape[2], self.block), num_blocks(self.k.shape[2], self.granule))

    def pooled_keys(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(means of keys, of values, log of what the keys weigh together) of blocks of that size: float32, the last `(batch or 1, blocks)`."""
        bias = torch.zeros(1, self.k.shape[2], device=self.k.device) if self.key_bias is None else self.key_bias
        keys, values = (block_mean(x, size, self.key_bias) for x in (self.k, self.v))
        return keys, values, block_bias(bias, size)
