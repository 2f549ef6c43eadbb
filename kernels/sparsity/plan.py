"""From a recipe and a token grid to an attention call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import attention as kernel
from ..block_mask import BlockMask, num_blocks
from ..dispatch import Choice, Problem
from .compensate import COMPENSATORS
from .estimate import ESTIMATORS, hidden_blocks
from .grid import TokenGrid
from .permute import PERMUTERS, ragged
from .recipes import Recipe
from .select import SELECTORS, Forced


@dataclass(frozen=True)
class Layout:
    """What a recipe needs to know about sequences of one grid, on one device. Made once by `prepare`, used by every call."""

    order: Tensor | None  # int64 (positions,): source token of each position; None = as they come
    inverse: Tensor | None
    forced: Forced
    block: int
    tokens: int
    hidden: Tensor | None = None  # bool (positions,): what only fills a block; None where nothing does


def prepare(recipe: Recipe, grid: TokenGrid | None, device: torch.device, *, block: int = 128, seq_len: int | None = None) -> Layout:
    """The layout of `recipe` for `grid`. Without a grid (unknown model) tokens stay in order and none is protected; give seq_len then.

    Raises ValueError when there is neither, or when the recipe needs a grid and has none.
    """
    if grid is None and (seq_len is None or recipe.needs_grid):
        raise ValueError(f"{recipe.name}: no token grid is known; use a method that needs none, with seq_len")
    if block < 1:
        raise ValueError(f"block is {block}; use 1 token or more")
    tokens = grid.seq_len if grid is not None else seq_len
    assert tokens is not None
    order = hidden = None
    protected = torch.zeros(tokens, dtype=torch.bool)
    if grid is not None:
        if recipe.protect_text:
            protected[: grid.before] = True
            protected[tokens - grid.after :] = True
        if recipe.protect_first_frame and grid.frames > 1:
            protected[grid.before : grid.before + grid.height * grid.width] = True
        if grid.boxes:
            order, hidden = ragged(grid, block, None if recipe.permute is None else PERMUTERS[recipe.permute])
            protected = protected[order]
        elif recipe.permute is not None:
            order = PERMUTERS[recipe.permute](grid, block, recipe.protect_first_frame)
            protected = protected[order]
    positions = len(protected)
    blocks = num_blocks(positions, block)
    protected_blocks = torch.nn.functional.pad(protected, (0, blocks * block - positions)).view(blocks, block).any(1)
    pairs = protected_blocks[:, None] | protected_blocks[None, :]
    if recipe.protect_own_block:
        pairs = pairs | torch.eye(blocks, dtype=torch.bool)
    forced = Forced.of(pairs, device)
    if order is None:
        return Layout(None, None, forced, block, tokens)
    if hidden is None:
        return Layout(order.to(device), order.argsort().to(device), forced, block, tokens)
    shown = (~hidden).nonzero()[:, 0]
    return Layout(order.to(device), shown[order[shown].argsort()].to(device), forced, block, tokens, hidden.to(device))


def describe(layout: Layout, q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Problem:
    """The kernel's `Problem` of `sparse_attention` with these tensors: what to ask `kernels.attention.explain` about before the call."""
    problem = kernel.describe(q, k, v, blocks=(layout.block, layout.block), key_bias=key_bias)
    if not problem.q_len == problem.k_len == layout.tokens:
        raise ValueError(f"sparse_attention: the layout is for {layout.tokens} tokens, but q has {problem.q_len} and k {problem.k_len}")
    if layout.order is None:
        return problem
    positions = len(layout.order)
    return replace(problem, q_len=positions, k_len=positions, key_bias=problem.key_bias or layout.hidden is not None)


def sparse_attention(
    recipe: Recipe,
    layout: Layout,
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
    choice: Choice | None = None,
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
    describe(layout, q, k, v, key_bias=key_bias)  # before anything is chosen from tensors that do not fit
    if key_bias is not None:
        key_bias = kernel.as_bias(key_bias, q)
    if layout.order is not None:
        q, k, v = (x.index_select(2, layout.order) for x in (q, k, v))
        key_bias = None if key_bias is None else key_bias.index_select(1, layout.order)
    query_bias = None
    if layout.hidden is not None:
        query_bias = torch.zeros(1, len(layout.hidden), device=q.device).masked_fill_(layout.hidden, float("-inf"))
        key_bias = query_bias.expand(q.shape[0], -1) if key_bias is None else key_bias + query_bias
    scores = None
    if mask is None:
        scores, must = ESTIMATORS[recipe.estimate](q, k, query_bias, key_bias, layout.block, scale, values)
        hidden = None if key_bias is None else hidden_blocks(key_bias, layout.block)
        mask = SELECTORS[recipe.select](scores, layout.forced, density, layout.block, values, must, hidden)
    out = COMPENSATORS[recipe.compensate](q, k, v, mask, layout.block, scores, values, key_bias, scale, precision, choice)
    return (out if layout.inverse is None else out.index_select(2, layout.inverse)), mask
