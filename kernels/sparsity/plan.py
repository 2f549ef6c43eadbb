"""From a recipe and a token grid to an attention call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import dispatch
from ..attention import as_bias
from ..block_mask import BlockMask, num_blocks
from ..pool import hidden_blocks
from .compensate import COMPENSATORS
from .estimate import ESTIMATORS
from .grid import TokenGrid
from .permute import PERMUTERS, ragged
from .recipes import Recipe
from .select import SELECTORS, Forced


@dataclass(frozen=True)
class Arrangement:
    """How a recipe puts sequences of one grid into blocks, on one device. Made once by `prepare`, used by every call."""

    order: Tensor | None  # int64 (positions,): source token of each position; None = as they come
    inverse: Tensor | None
    forced: Forced
    block: int
    tokens: int
    hidden: Tensor | None = None  # bool (positions,): what only fills a block; None where nothing does


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
    blocks = num_blocks(len(protected), block)
    protected = torch.nn.functional.pad(protected, (0, blocks * block - len(protected))).view(blocks, block).any(1)
    pairs = protected[:, None] | protected[None, :]
    if recipe.protect_own_block:
        pairs = pairs | torch.eye(blocks, dtype=torch.bool)
    order, inverse, hidden = (None if x is None else x.to(device) for x in (order, inverse, hidden))
    return Arrangement(order, inverse, Forced.of(pairs, device), block, tokens, hidden)


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
    problem = dispatch.describe(q, k, v, blocks=(arrangement.block, arrangement.block), key_bias=key_bias)
    if not problem.q_len == problem.k_len == arrangement.tokens:
        raise ValueError(f"sparse_attention: the layout is for {arrangement.tokens} tokens, but q has {problem.q_len} and k {problem.k_len}")
    if arrangement.order is None:
        return problem
    positions = len(arrangement.order)
    return replace(problem, q_len=positions, k_len=positions, key_bias=problem.key_bias or arrangement.hidden is not None)


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
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is {density}; use a value above 0 and up to 1")
    if unknown := set(settings or {}) - set(recipe.settings):
        raise ValueError(f"{recipe.name} has no setting {', '.join(sorted(unknown))}; it has {', '.join(recipe.settings) or 'none'}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    values = {name: setting.default for name, setting in recipe.settings.items()} | dict(settings or {})
    describe(arrangement, q, k, v, key_bias=key_bias)  # before anything is chosen from tensors that do not fit
    if key_bias is not None:
        key_bias = as_bias(key_bias, q)
    if arrangement.order is not None:
        q, k, v = (x.index_select(2, arrangement.order) for x in (q, k, v))
        key_bias = None if key_bias is None else key_bias.index_select(1, arrangement.order)
    query_bias = None
    if arrangement.hidden is not None:
        query_bias = torch.zeros(1, len(arrangement.hidden), device=q.device).masked_fill_(arrangement.hidden, float("-inf"))
        key_bias = query_bias.expand(q.shape[0], -1) if key_bias is None else key_bias + query_bias
    scores = None
    if mask is None:
        scores, must = ESTIMATORS[recipe.estimate](q, k, query_bias, key_bias, arrangement.block, scale, values)
        hidden = None if key_bias is None else hidden_blocks(key_bias, arrangement.block)
        mask = SELECTORS[recipe.select](scores, arrangement.forced, density, arrangement.block, values, must, hidden)
    out = COMPENSATORS[recipe.compensate](q, k, v, mask, arrangement.block, scores, values, key_bias, scale, precision, choice)
    return (out if arrangement.inverse is None else out.index_select(2, arrangement.inverse)), mask
