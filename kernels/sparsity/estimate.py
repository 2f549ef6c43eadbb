"""estimate: a cheap score for each (head, query block, key block).

An estimator is `f(q, k, query_bias, key_bias, block, scale, settings) -> (scores, must)`, all in permuted order: q, k
`(batch, heads, tokens, head_dim)` (k may have fewer heads); query_bias float32 `(1, tokens)`, -inf for what only fills a block, or None;
key_bias float32 `(batch, tokens)`, added to every score of a key, or None; scores float32 `(batch, heads, query blocks, key blocks)`, and
must, bool of that shape, the pairs that it insists on, or None where there can be none. What is said of key blocks that are hidden as a
whole does not matter: the selection never takes them.

Both biases are logarithms of weights. A block with a bias is judged by its weighted mean, so that hidden tokens have no part in it, and by
its weight, log of the mean of exp(bias): the first-order estimate of the attention that it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import registry
from ..block_mask import num_blocks
from ..pool import block_mean, block_weights

Scores = tuple[Tensor, "Tensor | None"]
Estimator = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None", int, float, Mapping[str, float]], Scores]
ESTIMATORS: dict[str, Estimator] = {}


def estimator(function: Estimator) -> Estimator:
    registry.add(ESTIMATORS, "estimator", function.__name__, function)
    return function


@estimator
def pooled(
    q: Tensor, k: Tensor, query_bias: Tensor | None, key_bias: Tensor | None, block: int, scale: float, settings: Mapping[str, float]
) -> Scores:
    """softmax of block means of q against block means of k: RainFusion2.0, DraftAttention, SpargeAttn."""
    return torch.softmax(_pooled_logits(q, k, query_bias, key_bias, block, scale), -1), None


@estimator
def pooled_similarity(
    q: Tensor, k: Tensor, query_bias: Tensor | None, key_bias: Tensor | None, block: int, scale: float, settings: Mapping[str, float]
) -> Scores:
    """`pooled` with SpargeAttn's guard: blocks whose tokens disagree are not judged by their mean but kept.

    Self-similarity of a block is the squared norm of its mean unit vector, in 0..1; at or below `similarity` it does not count as
    similar. A threshold of 0 or less switches the guard off.
    """
    logits = _pooled_logits(q, k, query_bias, key_bias, block, scale)
    threshold = settings["similarity"]
    if threshold <= 0:
        return torch.softmax(logits, -1), None
    loose_q = _self_similarity(q, block, query_bias) <= threshold
    smooth = k - block_mean(k, k.shape[2], key_bias)
    loose_k = _heads_like(_self_similarity(smooth, block, key_bias), q)[:, :, None] <= threshold
    # Columns that the guard keeps anyway take no part in the softmax of the others (SpargeAttn's order of steps).
    scores = torch.softmax(logits.masked_fill(loose_k, float("-inf")), -1)
    return scores, loose_k | loose_q[..., None]


@estimator
def random(
    q: Tensor, k: Tensor, query_bias: Tensor | None, key_bias: Tensor | None, block: int, scale: float, settings: Mapping[str, float]
) -> Scores:
    """Noise, the same for every call, whatever the biases: what a selection is worth is measured against it."""
    shape = (*q.shape[:2], num_blocks(q.shape[2], block), num_blocks(k.shape[2], block))
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(q.device), None


def _pooled_logits(q: Tensor, k: Tensor, query_bias: Tensor | None, key_bias: Tensor | None, block: int, scale: float) -> Tensor:
    """Products of block means. Smoothing k by its mean would add the same number to a whole row, which a softmax does not see."""
    logits = block_mean(q, block, query_bias) @ _heads_like(block_mean(k, block, key_bias), q).transpose(-1, -2) * scale
    if key_bias is None:
        return logits
    weights, peak = block_weights(key_bias, block)
    return logits + (peak + block_mean(weights, block).log()).transpose(-1, -2)


def _self_similarity(x: Tensor, block: int, bias: Tensor | None) -> Tensor:
    """`(batch, heads, blocks)`: mean cosine between the tokens of a block, which is the squared norm of their mean unit vector."""
    return block_mean(torch.nn.functional.normalize(x, dim=-1), block, bias).square().sum(-1)


def _heads_like(k: Tensor, q: Tensor) -> Tensor:
    """Repeat the kv heads of k for the query heads that share them."""
    groups = q.shape[1] // k.shape[1]
    return k if groups == 1 else k.repeat_interleave(groups, 1)
