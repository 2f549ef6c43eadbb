"""select: which blocks to keep.

A selector is `f(pairs, density, settings) -> BlockMask`: pairs, the block pairs of a call with their scores; density, the share of the pairs that
the recipe does not keep anyway to choose, best first; settings, the method's numbers.

What is forced or insisted on comes on top of that choice and never takes its place, as in the authors' codes (RainFusion2.0, DraftAttention,
SpargeAttn), so that more is kept than `density` of all pairs. A hidden block is never kept, forced or not; and a row is never empty where
there is a visible block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import registry
from ..block_mask import BlockMask


@dataclass(frozen=True)
class RowCounts:
    """How many key blocks each query block keeps at one density."""

    own: Tensor  # int64 (query blocks, 1): of its own choice
    widest_own: int
    counts: Tensor  # int32 (query blocks,): with the forced ones
    width: int  # most that a free row keeps
    even: bool  # all free rows keep that many


@dataclass(frozen=True, eq=False)
class Forced:
    """Pairs that are always kept: bool `(query blocks, key blocks)`, on the device of the calls.

    dense_rows: int64 ids of the query blocks that read everything; free_rows: the others. Row counts follow from the pairs and the density
    alone, so they are worked out on the host, once a density, and no call waits for the device.
    """

    pairs: Tensor
    dense_rows: Tensor
    free_rows: Tensor
    open: Tensor  # int64 (query blocks,), on the host: pairs of each row that are not forced
    bare: bool  # in some row nothing is forced
    _counts: dict[float, RowCounts] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, pairs: Tensor, device: torch.device) -> Forced:
        """From pairs on the host, for calls on `device`."""
        dense = pairs.all(1)
        bare = not bool(pairs.any(1).all())
        return cls(pairs.to(device), dense.nonzero()[:, 0].to(device), (~dense).nonzero()[:, 0].to(device), (~pairs).sum(1), bare)

    def row_counts(self, density: float) -> RowCounts:
        """Own choices that are `density` of what each row may choose from, to within a block, and of all open pairs to within a pair."""
        found = self._counts.get(density)
        if found is None:
            found = self._counts[density] = self._row_counts(density)
        return found

    def _row_counts(self, density: float) -> RowCounts:
        # Rounding the running total spreads the longer rows evenly.
        total = torch.nn.functional.pad(self.open.cumsum(0).double() * density, (1, 0)).round().long()
        own = total.diff()
        counts = self.pairs.shape[1] - self.open + own
        free = counts[self.open > 0]
        width = int(free.amax()) if len(free) else 0
        device = self.pairs.device
        return RowCounts(own[:, None].to(device), int(own.amax()), counts.to(device, torch.int32), width, bool((free == width).all()))


@dataclass(frozen=True, eq=False)
class Pairs:
    """The block pairs of one call.

    scores: `(batch, heads, query blocks, key blocks)`. forced: the pairs that the recipe always keeps. blocks: tokens in a query block and in a
    key block. must: bool like scores, the pairs that the estimator insists on, or None where it never does. hidden: bool
    `(batch, key blocks)`, the blocks without a visible key, or None where there are none.
    """

    scores: Tensor
    forced: Forced
    blocks: tuple[int, int]
    must: Tensor | None = None
    hidden: Tensor | None = None

    def ranked(self, rank: Tensor) -> Tensor:
        """rank where there is a choice, elsewhere -inf."""
        rank = rank.masked_fill(self.forced.pairs, float("-inf"))
        if self.must is not None:
            rank.masked_fill_(self.must, float("-inf"))
        return self._without_hidden(rank)

    def best(self, rank: Tensor, density: float, of: int) -> Tensor:
        """Bool like rank: the open pairs of highest rank, as many as the density asks for. of: the dimension from which on they are compared."""
        flat = self.ranked(rank).flatten(of)
        keep = round(density * int(self.forced.open.sum()) * (rank.shape[1] if of == 1 else 1))
        # By index and not by comparison with a threshold: equal scores (many are 0 where attention is sharp) would all pass it.
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(keep, -1).indices, True).view_as(rank)

    def mask(self, chosen: Tensor, width: int | None = None) -> BlockMask:
        """The BlockMask of a choice, with what comes on top and without what is hidden.

        `chosen` has some of either where fewer pairs than were asked for are open. width: as for `BlockMask.from_dense`; the longest row is
        known without asking the device where some row is dense, too.
        """
        kept = chosen | self.forced.pairs
        if self.must is not None:
            kept |= self.must
        if self.hidden is not None:
            kept &= ~self.hidden[:, None, None]
        if self.hidden is not None or self.forced.bare:
            best, where = self._without_hidden(self.scores).max(-1, keepdim=True)
            kept |= torch.zeros_like(kept).scatter_(-1, where, True) & ~kept.any(-1, keepdim=True) & ~best.isneginf()
        return BlockMask.from_dense(kept, *self.blocks, width=kept.shape[-1] if len(self.forced.dense_rows) else width)

    def _without_hidden(self, scores: Tensor) -> Tensor:
        return scores if self.hidden is None else scores.masked_fill(self.hidden[:, None, None], float("-inf"))


Selector = Callable[[Pairs, float, Mapping[str, float]], BlockMask]
SELECTORS: dict[str, Selector] = {}


def selector(function: Selector) -> Selector:
    registry.add(SELECTORS, "selector", function.__name__, function)
    return function


@selector
def topk(pairs: Pairs, density: float, settings: Mapping[str, float]) -> BlockMask:
    """The same number of blocks in every free row: even work, and no read from the device (RainFusion2.0, SpargeAttn top-k)."""
    scores, forced = pairs.scores, pairs.forced
    batch, heads, query_blocks, key_blocks = scores.shape
    rows = forced.row_counts(density)
    if pairs.must is not None or pairs.hidden is not None or forced.bare:
        best = pairs.ranked(scores).topk(rows.widest_own, -1).indices
        best = best.masked_fill(torch.arange(rows.widest_own, device=scores.device) >= rows.own, key_blocks)
        chosen = scores.new_zeros((*scores.shape[:3], key_blocks + 1), dtype=torch.bool).scatter_(-1, best, True)[..., :-1]
        return pairs.mask(chosen, None if pairs.must is not None else max(rows.width, 1))
    best = scores.masked_fill(forced.pairs, float("inf")).index_select(2, forced.free_rows).topk(rows.width, -1).indices
    if not rows.even:  # what a row does not keep sorts behind every block
        short = torch.arange(rows.width, device=scores.device) >= rows.counts[forced.free_rows, None]
        best = best.masked_fill(short, key_blocks)
    best = best.sort(-1).values.clamp_(max=key_blocks - 1).to(torch.int32)
    counts = rows.counts.expand(batch, heads, query_blocks).contiguous()
    if len(forced.dense_rows):
        indices = torch.arange(key_blocks, dtype=torch.int32, device=scores.device).repeat(batch, heads, query_blocks, 1)
        indices[:, :, forced.free_rows, : rows.width] = best
        best = indices
    return BlockMask(best, counts, *pairs.blocks, key_blocks, trusted=True)


@selector
def global_quantile(pairs: Pairs, density: float, settings: Mapping[str, float]) -> BlockMask:
    """One threshold a head over all its pairs: rows that need more get more (DraftAttention)."""
    return pairs.mask(pairs.best(pairs.scores, density, 2))


@selector
def top_p(pairs: Pairs, density: float, settings: Mapping[str, float]) -> BlockMask:
    """In every row the fewest best blocks that hold the share p of its attention; p is solved for, a head, so that the density is met.

    SpargeAttn's cumulative rule (cdfthreshd) under a density. Scores are 0..1 and sum to 1 in a row.
    """
    ordered, ids = pairs.scores.sort(-1, descending=True)
    before = torch.empty_like(pairs.scores).scatter_(-1, ids, ordered.cumsum(-1) - ordered)
    return pairs.mask(pairs.best(-before, density, 2))


@selector
def threshold(pairs: Pairs, density: float, settings: Mapping[str, float]) -> BlockMask:
    """One threshold a sample, over the rows of all heads: every pair costs the same, so the best ones are kept wherever they are. Ours."""
    return pairs.mask(pairs.best(pairs.scores, density, 1))


def within_error(pairs: Pairs, error: float) -> BlockMask:
    """The threshold that an error allows: the scores of what is dropped, which are squared relative errors, add up to error^2 at most. Ours."""
    order = (-pairs.ranked(-pairs.scores)).flatten(1).sort(-1)
    dropped = order.values.cumsum(-1, dtype=torch.float64) <= error**2
    return pairs.mask(torch.ones_like(dropped).scatter_(-1, order.indices, ~dropped).view_as(pairs.scores))
