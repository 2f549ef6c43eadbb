"""From a recipe and a token grid to an attention call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import BlockMask, num_blocks
from .compensate import COMPENSATORS
from .estimate import ESTIMATORS
from .grid import TokenGrid
from .permute import PERMUTERS
from .recipes import Recipe
from .select import SELECTORS, Forced


@dataclass(frozen=True)
class Layout:
    """What a recipe needs to know about sequences of one grid, on one device. Made once by `prepare`, used by every call."""

    order: Tensor | None  # int64 (seq_len,): source token of each position; None = as they come
    inverse: Tensor | None
    forced: Forced
    block: int


def prepare(recipe: Recipe, grid: TokenGrid | None, device: torch.device, *, block: int = 128, seq_len: int | None = None) -> Layout:
    """The layout of `recipe` for `grid`. Without a grid (unknown model) tokens stay in order and none is protected; give seq_len then.

    Raises ValueError when there is neither, or when the recipe needs a grid and has none.
    """
    if grid is None and (seq_len is None or recipe.needs_grid):
        raise ValueError(f"{recipe.name}: no token grid is known; use a method that needs none, with seq_len")
    tokens = grid.seq_len if grid is not None else seq_len
    assert tokens is not None
    order = None
    protected = torch.zeros(tokens, dtype=torch.bool)
    if grid is not None:
        if recipe.protect_text:
            protected[: grid.before] = True
            protected[tokens - grid.after :] = True
        if recipe.protect_first_frame and grid.frames > 1:
            protected[grid.before : grid.before + grid.height * grid.width] = True
        if recipe.permute is not None:
            order = PERMUTERS[recipe.permute](grid, block, recipe.protect_first_frame)
            protected = protected[order]
    blocks = num_blocks(tokens, block)
    protected_blocks = torch.nn.functional.pad(protected, (0, blocks * block - tokens)).view(blocks, block).any(1)
    pairs = protected_blocks[:, None] | protected_blocks[None, :]
    if recipe.protect_own_block:
        pairs = pairs | torch.eye(blocks, dtype=torch.bool)
    free = (~protected_blocks).nonzero()[:, 0]
    widest = int(pairs[free].sum(1).amax()) if len(free) else 0
    forced = Forced(pairs.to(device), protected_blocks.nonzero()[:, 0].to(device), free.to(device), widest)
    if order is None:
        return Layout(None, None, forced, block)
    return Layout(order.to(device), order.argsort().to(device), forced, block)


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
) -> tuple[Tensor, BlockMask]:
    """Self-attention of q `(batch, heads, tokens, head_dim)` and k, v `(batch, kv_heads, tokens, head_dim)` as `recipe` does it.

    density: share of block pairs to keep, in (0, 1]. key_bias: `(batch, tokens)`. settings: the method's own numbers, where they differ
    from its defaults. mask: reuse this mask instead of choosing one. Returns the output in the tokens' own order, and the mask used.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    values = {name: setting.default for name, setting in recipe.settings.items()} | dict(settings or {})
    if layout.order is not None:
        q, k, v = (x.index_select(2, layout.order) for x in (q, k, v))
        key_bias = None if key_bias is None else key_bias.index_select(1, layout.order)
    if mask is None:
        scores = ESTIMATORS[recipe.estimate](q, k, layout.block, scale, values)
        mask = SELECTORS[recipe.select](scores, layout.forced, density, layout.block, values)
    out = COMPENSATORS[recipe.compensate](q, k, v, mask, key_bias, precision, scale)
    return (out if layout.inverse is None else out.index_select(2, layout.inverse)), mask
