"""estimate: a cheap score for each (head, query block, key block).

An estimator is `f(q, k, block, scale, settings) -> (scores, must)`: q, k `(batch, heads, tokens, head_dim)` in permuted order (k may have
fewer heads), scores float32 `(batch, heads, query blocks, key blocks)`, and must, bool of that shape, the pairs that it insists on, or None
where there can be none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..block_mask import num_blocks

Estimator = Callable[[Tensor, Tensor, int, float, Mapping[str, float]], "tuple[Tensor, Tensor | None]"]
ESTIMATORS: dict[str, Estimator] = {}


def estimator(function: Estimator) -> Estimator:
    ESTIMATORS[function.__name__] = function
    return function


@estimator
def pooled(q: Tensor, k: Tensor, block: int, scale: float, settings: Mapping[str, float]) -> tuple[Tensor, Tensor | None]:
    """softmax of block means of q against block means of k: RainFusion2.0, DraftAttention, SpargeAttn."""
    return torch.softmax(_pooled_logits(q, k, block, scale), -1), None


@estimator
def pooled_similarity(q: Tensor, k: Tensor, block: int, scale: float, settings: Mapping[str, float]) -> tuple[Tensor, Tensor | None]:
    """`pooled` with SpargeAttn's guard: blocks whose tokens disagree are not judged by their mean but kept.

    Self-similarity of a block is the squared norm of its mean unit vector, in 0..1; at or below `similarity` it does not count as
    similar. A threshold of 0 or less switches the guard off.
    """
    logits = _pooled_logits(q, k, block, scale)
    threshold = settings["similarity"]
    if threshold <= 0:
        return torch.softmax(logits, -1), None
    loose_q = _self_similarity(q, block) <= threshold
    loose_k = _heads_like(_self_similarity(k - k.mean(2, keepdim=True), block), q)[:, :, None] <= threshold
    # Columns that the guard keeps anyway take no part in the softmax of the others (SpargeAttn's order of steps).
    scores = torch.softmax(logits.masked_fill(loose_k, float("-inf")), -1)
    return scores, loose_k | loose_q[..., None]


@estimator
def random(q: Tensor, k: Tensor, block: int, scale: float, settings: Mapping[str, float]) -> tuple[Tensor, Tensor | None]:
    """Noise, the same for every call: what a selection is worth is measured against it."""
    shape = (*q.shape[:2], num_blocks(q.shape[2], block), num_blocks(k.shape[2], block))
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(q.device), None


def block_mean(x: Tensor, block: int) -> Tensor:
    """Means of blocks of tokens: `(batch, heads, tokens, head_dim)` -> float32 `(batch, heads, blocks, head_dim)`; the last may be ragged."""
    whole = x.shape[2] - x.shape[2] % block
    means = x[:, :, :whole].unflatten(2, (-1, block)).mean(3, dtype=torch.float32)
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], 2)


def _pooled_logits(q: Tensor, k: Tensor, block: int, scale: float) -> Tensor:
    """Products of block means. Smoothing k by its mean would add the same number to a whole row, which a softmax does not see."""
    return block_mean(q, block) @ _heads_like(block_mean(k, block), q).transpose(-1, -2) * scale


def _self_similarity(x: Tensor, block: int) -> Tensor:
    """`(batch, heads, blocks)`: mean cosine between the tokens of a block, which is the squared norm of their mean unit vector."""
    return block_mean(torch.nn.functional.normalize(x, dim=-1), block).square().sum(-1)


def _heads_like(k: Tensor, q: Tensor) -> Tensor:
    """Repeat the kv heads of k for the query heads that share them."""
    groups = q.shape[1] // k.shape[1]
    return k if groups == 1 else k.repeat_interleave(groups, 1)
