"""select: which blocks to keep.

A selector is `f(scores, forced, density, block, settings) -> BlockMask`: scores `(batch, heads, query blocks, key blocks)`, +inf
where the estimator insists; forced, the pairs that are kept whatever their score; density, the share of all pairs to keep, forced
ones included. Where the forced pairs alone are more than that, they are kept and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..block_mask import BlockMask


@dataclass(frozen=True)
class RowCounts:
    """How many key blocks each query block keeps at one density. A free row keeps `width` or, where `short`, one fewer."""

    counts: Tensor  # int32 (query blocks,)
    width: int
    short: Tensor | None  # bool (free rows,); None where no row is


@dataclass(frozen=True, eq=False)
class Forced:
    """Pairs that are always kept: bool `(query blocks, key blocks)`.

    dense_rows: int64 ids of the query blocks that read everything; free_rows: the others. Row counts follow from these and the density
    alone, so they are worked out on the host, once a density, and no call waits for the device.
    """

    pairs: Tensor
    dense_rows: Tensor
    free_rows: Tensor
    widest_free_row: int  # most forced pairs in a free row
    _counts: dict[float, RowCounts] = field(default_factory=dict, repr=False)

    def row_counts(self, density: float) -> RowCounts:
        """Counts that differ by at most one between free rows and whose mean is nearest to `density`."""
        found = self._counts.get(density)
        if found is None:
            found = self._counts[density] = self._row_counts(density)
        return found

    def _row_counts(self, density: float) -> RowCounts:
        query_blocks, key_blocks = self.pairs.shape
        free = len(self.free_rows)
        budget = round(density * query_blocks * key_blocks) - len(self.dense_rows) * key_blocks
        budget = min(max(budget, free * max(self.widest_free_row, 1)), free * key_blocks)
        counts = torch.full((query_blocks,), key_blocks, dtype=torch.int32)
        # Bresenham's rule spreads the longer rows evenly.
        steps = torch.arange(free + 1) * budget // max(free, 1)
        rows = steps.diff()
        counts[self.free_rows.cpu()] = rows.to(torch.int32)
        width = int(rows.amax()) if free else 0
        short = (rows < width).to(self.pairs.device) if free and budget % free else None
        return RowCounts(counts.to(self.pairs.device), width, short)


Selector = Callable[[Tensor, Forced, float, int, Mapping[str, float]], BlockMask]
SELECTORS: dict[str, Selector] = {}


def selector(function: Selector) -> Selector:
    SELECTORS[function.__name__] = function
    return function


@selector
def topk(scores: Tensor, forced: Forced, density: float, block: int, settings: Mapping[str, float]) -> BlockMask:
    """The same number of blocks in every free row: even work, and no read from the device (RainFusion2.0, SpargeAttn top-k)."""
    batch, heads, query_blocks, key_blocks = scores.shape
    rows = forced.row_counts(density)
    best = scores.masked_fill(forced.pairs, float("inf")).index_select(2, forced.free_rows).topk(rows.width, -1).indices
    if rows.short is not None:
        best[..., -1].masked_fill_(rows.short, key_blocks)  # sorts behind every block
    if settings.get("similarity", 0.0) > 0:  # the estimator may insist on more than a row's share
        kept = scores.new_zeros((*best.shape[:3], key_blocks + 1), dtype=torch.bool).scatter_(-1, best, True)[..., :-1]
        must = forced.pairs | scores.isinf()
        return _mask(must.index_copy(2, forced.free_rows, kept) | must, forced, block)
    best = best.sort(-1).values.clamp_(max=key_blocks - 1).to(torch.int32)
    counts = rows.counts.expand(batch, heads, query_blocks).contiguous()
    if len(forced.dense_rows):
        indices = torch.arange(key_blocks, dtype=torch.int32, device=scores.device).repeat(batch, heads, query_blocks, 1)
        indices[:, :, forced.free_rows, : rows.width] = best
        best = indices
    return BlockMask(best, counts, block, block)


@selector
def global_quantile(scores: Tensor, forced: Forced, density: float, block: int, settings: Mapping[str, float]) -> BlockMask:
    """One threshold a head over all its pairs: rows that need more get more (DraftAttention)."""
    return _mask(_best_of_head(scores, scores, forced, density), forced, block)


@selector
def top_p(scores: Tensor, forced: Forced, density: float, block: int, settings: Mapping[str, float]) -> BlockMask:
    """In every row the fewest best blocks that hold the share p of its attention; p is solved for, a head, so that the density is met.

    SpargeAttn's cumulative rule (cdfthreshd) under a density. Scores are 0..1 and sum to 1 in a row.
    """
    ordered, ids = scores.masked_fill(scores.isinf(), 0.0).sort(-1, descending=True)
    before = torch.empty_like(scores).scatter_(-1, ids, ordered.cumsum(-1) - ordered)
    return _mask(_best_of_head(-before, scores, forced, density), forced, block)


def _best_of_head(rank: Tensor, scores: Tensor, forced: Forced, density: float) -> Tensor:
    """Bool like scores: per head the pairs of highest rank, as many as the density asks for, with those that must be kept among them."""
    must = forced.pairs | scores.isinf()
    flat = rank.masked_fill(must, float("inf")).flatten(2)
    keep = min(max(round(density * flat.shape[-1]), 1), flat.shape[-1])
    # By index and not by comparison with a threshold: equal scores (many are 0 where attention is sharp) would all pass it.
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(keep, -1).indices, True).view_as(scores) | must


def _mask(kept: Tensor, forced: Forced, block: int) -> BlockMask:
    """The BlockMask of a bool mask. The longest row is known without asking the device where some row is dense."""
    return BlockMask.from_dense(kept, block, block, width=kept.shape[-1] if len(forced.dense_rows) else None)
