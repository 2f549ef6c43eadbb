"""select: which blocks to keep.

A selector is `f(scores, forced, density, settings) -> BlockMask ingredients`: scores `(batch, heads, query blocks, key blocks)`,
+inf where the estimator insists; forced, the pairs that are kept whatever their score; density, the share of all pairs to keep,
forced ones included. Where the forced pairs alone are more than that, they are kept and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import BlockMask


@dataclass(frozen=True)
class Forced:
    """Pairs that are always kept. pairs: bool `(query blocks, key blocks)`. The row lists are on the host, so that counts need no sync."""

    pairs: Tensor
    dense_rows: Tensor  # int64 ids of query blocks that read everything
    free_rows: Tensor  # the others
    widest_free_row: int  # most forced pairs in a free row


Selector = Callable[[Tensor, Forced, float, int, Mapping[str, float]], BlockMask]
SELECTORS: dict[str, Selector] = {}


def selector(function: Selector) -> Selector:
    SELECTORS[function.__name__] = function
    return function


@selector
def topk(scores: Tensor, forced: Forced, density: float, block: int, settings: Mapping[str, float]) -> BlockMask:
    """The same number of blocks in every free row: even work, and no read from the device (RainFusion2.0, SpargeAttn top-k)."""
    key_blocks = scores.shape[-1]
    keep = keep_count(forced, density, key_blocks)
    scores = scores.masked_fill(forced.pairs, float("inf"))
    if settings.get("similarity", 0.0) > 0:  # the estimator may insist on more than `keep` pairs of a row
        threshold = scores.topk(keep, -1).values[..., -1:]
        return BlockMask.from_dense(scores >= threshold, block, block)
    if not len(forced.dense_rows):
        return BlockMask.from_indices(scores.topk(keep, -1).indices, block, block)
    indices = torch.arange(key_blocks, dtype=torch.int32, device=scores.device).expand(scores.shape).clone()
    chosen = scores.index_select(2, forced.free_rows).topk(keep, -1).indices.sort(-1).values
    indices[:, :, forced.free_rows, :keep] = chosen.to(torch.int32)
    counts = torch.full(scores.shape[:3], keep, dtype=torch.int32, device=scores.device)
    counts[:, :, forced.dense_rows] = key_blocks
    return BlockMask(indices, counts, block, block)


@selector
def global_quantile(scores: Tensor, forced: Forced, density: float, block: int, settings: Mapping[str, float]) -> BlockMask:
    """One threshold a head over all its pairs: rows that need more get more (DraftAttention)."""
    scores = scores.masked_fill(forced.pairs, float("inf"))
    flat = scores.flatten(2)
    keep = min(max(round(density * flat.shape[-1]), 1), flat.shape[-1])
    threshold = flat.topk(keep, -1).values[..., -1, None, None]
    return BlockMask.from_dense(scores >= threshold, block, block)


def keep_count(forced: Forced, density: float, key_blocks: int) -> int:
    """Blocks that each free row keeps, so that with the dense rows the mean comes as near to `density` as whole blocks allow."""
    free = len(forced.free_rows)
    budget = density * forced.pairs.numel() - len(forced.dense_rows) * key_blocks
    return min(max(round(budget / max(free, 1)), forced.widest_free_row, 1), key_blocks)
