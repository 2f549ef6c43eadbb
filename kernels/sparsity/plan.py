"""From a recipe and a token grid to an attention call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import dispatch
from ..attention import as_bias
from ..block_mask import BlockMask, PooledTail
from ..pool import hidden_blocks
from .compensate import COMPENSATORS, tail_of
from .estimate import ESTIMATORS
from .grid import TokenGrid
from .permute import PERMUTERS, ragged
from .recipes import LEAST_GRANULE, Recipe
from .select import SELECTORS, Forced, Pairs, within_error
from .tokens import Tokens


@dataclass(frozen=True)
class Arrangement:
    """How a recipe puts sequences of one grid into blocks, on one device. Made once by `prepare`, used by every call."""

    order: Tensor | None  # int64 (positions,): source token of each position; None = as they come
    inverse: Tensor | None
    forced: Forced
    block: int
    tokens: int
    granule: int  # keys in a key block
    tail: PooledTail | None
    hidden: Tensor | None = None  # bool (positions,): what only fills a block; None where nothing does

    @property
    def positions(self) -> int:
        return self.tokens if self.order is None else len(self.order)

    def work(self, mask: BlockMask) -> Tensor:
        """Query-key pairs that a call with `mask` computes, its tail's included, of all: a float32 scalar on the mask's device."""
        kept = mask.density(self.positions)
        return kept if self.tail is None else kept + self.tail.density(mask, self.positions)


def prepare(recipe: Recipe, grid: TokenGrid | None, device: torch.device, *, block: int = 128, seq_len: int | None = None) -> Arrangement:
    """The arrangement of `recipe` for `grid`. Without a grid (unknown model) tokens stay in order and none is protected; give seq_len then.

    Raises ValueError when there is neither, or when the recipe needs a grid and has none.
    """
    if block < 1:
        raise ValueError(f"block is {block}; use 1 token or more")
    order = hidden = inverse = None
    if grid is not None:
        tokens, protected = grid.seq_len, _protected(recipe, grid)
        permute = None if recipe.permute is None else PERMUTERS[recipe.permute]
        if grid.boxes:
            order, hidden = ragged(grid, block, permute)
        elif permute is not None:
            order = permute(grid, block, recipe.protect_first_frame)
    elif seq_len is not None and not recipe.needs_grid:
        tokens, protected = seq_len, torch.zeros(seq_len, dtype=torch.bool)
    else:
        raise ValueError(f"{recipe.name}: no token grid is known; use a method that needs none, with seq_len")
    if order is not None:
        protected = protected[order]
        shown = torch.arange(len(order)) if hidden is None else (~hidden).nonzero()[:, 0]
        inverse = shown[order[shown].argsort()]
    granule = max(block // recipe.granules, min(block, LEAST_GRANULE))
    rows, columns = (_any_of_block(protected, size) for size in (block, granule))
    pairs = rows[:, None] | columns[None, :]
    if recipe.protect_own_block:
        pairs |= torch.arange(len(rows))[:, None] == torch.arange(len(columns)) * granule // block
    order, inverse, hidden = (None if x is None else x.to(device) for x in (order, inverse, hidden))
    return Arrangement(order, inverse, Forced.of(pairs, device), block, tokens, granule, tail_of(recipe.compensate, block, granule), hidden)


def _any_of_block(token: Tensor, block: int) -> Tensor:
    """Bool `(tokens,)` -> `(blocks,)`."""
    return torch.nn.functional.pad(token, (0, -len(token) % block)).view(-1, block).any(1)


def _protected(recipe: Recipe, grid: TokenGrid) -> Tensor:
    """Bool `(tokens,)`, in their own order: text and first frame, where the recipe protects them."""
    token = torch.arange(grid.seq_len) - grid.before
    protected = torch.zeros(grid.seq_len, dtype=torch.bool)
    if recipe.protect_text:
        protected |= (token < 0) | (token >= grid.video_tokens)
    if recipe.protect_first_frame and grid.frames > 1:
        protected |= (token >= 0) & (token < grid.height * grid.width)
    return protected


def describe(arrangement: Arrangement, q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> dispatch.Problem:
    """The kernel's `Problem` of `sparse_attention` with these tensors: what to ask `kernels.attention.explain` about before the call."""
    problem = dispatch.describe(q, k, v, blocks=(arrangement.block, arrangement.granule), key_bias=key_bias, tail=arrangement.tail)
    if not problem.q_len == problem.k_len == arrangement.tokens:
        raise ValueError(f"sparse_attention: the layout is for {arrangement.tokens} tokens, but q has {problem.q_len} and k {problem.k_len}")
    positions = arrangement.positions
    return replace(problem, q_len=positions, k_len=positions, key_bias=problem.key_bias or arrangement.hidden is not None)


def choose(
    recipe: Recipe,
    arrangement: Arrangement,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    density: float | None = None,
    error: float | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    settings: Mapping[str, float] | None = None,
) -> tuple[BlockMask, Tensor | None]:
    """The mask that `recipe` chooses for a call, and the error that it predicts: float32 `(batch,)`, |out - exact| / |exact|, None where it cannot.

    density, error: one of them; an error, above 0 and up to 1, for recipes that predict one. The prediction takes the errors of blocks for
    independent, which they are not: what is measured is larger. Other arguments as for `sparse_attention`.
    """
    _check_budget(recipe, density, error)
    tokens = _tokens(arrangement, q, k, v, key_bias, scale)
    mask, scores = _choose(recipe, arrangement, tokens, density, error, _values(recipe, settings))
    if not recipe.by_error:
        return mask, None
    # Where nothing is dropped the sum is 0 and not what rounding leaves of a difference.
    return mask, scores.masked_fill(mask.to_dense(scores.shape[-1]), 0.0).sum((1, 2, 3)).sqrt()


def sparse_attention(
    recipe: Recipe,
    arrangement: Arrangement,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    density: float,
    precision: str = "auto",
    scale: float | None = None,
    key_bias: Tensor | None = None,
    settings: Mapping[str, float] | None = None,
    mask: BlockMask | None = None,
    choice: dispatch.Choice | None = None,
) -> tuple[Tensor, BlockMask]:
    """Self-attention of q `(batch, heads, tokens, head_dim)` and k, v `(batch, kv_heads, tokens, head_dim)` as `recipe` does it.

    density: share to choose, in (0, 1], of the block pairs that the recipe does not keep anyway. What it keeps anyway (text, first frame, own
    block, what the estimator insists on) comes on top: `BlockMask.density` of the mask says how much that is of all pairs.
    key_bias: as for `attention`. The choice knows it: no block is taken whose keys are all hidden, and hidden keys judge none.
    settings: the method's own numbers, where they differ from its defaults. mask: reuse this mask instead of choosing one. choice: what
    `kernels.attention.explain` answered for `describe` of this call, in place of precision.
    Returns the output in the tokens' own order, and the mask used.
    """
    _check_budget(recipe, density, None)
    values = _values(recipe, settings)
    tokens = _tokens(arrangement, q, k, v, key_bias, scale)
    scores = None
    if mask is None:
        mask, scores = _choose(recipe, arrangement, tokens, density, None, values)
    out = COMPENSATORS[recipe.compensate](tokens, mask, scores, values, precision, choice)
    return (out if arrangement.inverse is None else out.index_select(2, arrangement.inverse)), mask


def _check_budget(recipe: Recipe, density: float | None, error: float | None) -> None:
    if (density is None) == (error is None):
        raise ValueError(f"density is {density}, error {error}; give one of them")
    for name, budget in (("density", density), ("error", error)):
        if budget is not None and not 0.0 < budget <= 1.0:
            raise ValueError(f"{name} is {budget}; use a value above 0 and up to 1")
    if error is not None and not recipe.by_error:
        raise ValueError(f"error is {error}, but {recipe.name} cannot predict one; give it a density")


def _values(recipe: Recipe, settings: Mapping[str, float] | None) -> dict[str, float]:
    if unknown := set(settings or {}) - set(recipe.settings):
        raise ValueError(f"{recipe.name} has no setting {', '.join(sorted(unknown))}; it has {', '.join(recipe.settings) or 'none'}")
    return {name: setting.default for name, setting in recipe.settings.items()} | dict(settings or {})


def _tokens(arrangement: Arrangement, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float | None) -> Tokens:
    """The call in the order of the blocks. Raises ValueError, before anything is chosen from them, where tensors do not fit."""
    describe(arrangement, q, k, v, key_bias=key_bias)
    if key_bias is not None:
        key_bias = as_bias(key_bias, q)
    if arrangement.order is not None:
        q, k, v = (x.index_select(2, arrangement.order) for x in (q, k, v))
        key_bias = None if key_bias is None else key_bias.index_select(1, arrangement.order)
    query_bias = None
    if arrangement.hidden is not None:
        query_bias = torch.zeros(1, len(arrangement.hidden), device=q.device).masked_fill_(arrangement.hidden, float("-inf"))
        key_bias = query_bias.expand(q.shape[0], -1) if key_bias is None else key_bias + query_bias
    return Tokens(q, k, v, query_bias, key_bias, arrangement.block, arrangement.granule, q.shape[-1] ** -0.5 if scale is None else scale)


def _choose(
    recipe: Recipe, arrangement: Arrangement, tokens: Tokens, density: float | None, error: float | None, values: Mapping[str, float]
) -> tuple[BlockMask, Tensor]:
    scores, must = ESTIMATORS[recipe.estimate](tokens, values)
    hidden = None if tokens.key_bias is None else hidden_blocks(tokens.key_bias, tokens.granule)
    pairs = Pairs(scores, arrangement.forced, (tokens.block, tokens.granule), must, hidden)
    if error is not None:
        return within_error(pairs, error), scores
    assert density is not None, "checked before"
    return SELECTORS[recipe.select](pairs, density, values), scores
