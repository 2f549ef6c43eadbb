"""estimate: a cheap score for each (head, query block, key block).

An estimator is `f(tokens, settings) -> (scores, must)`: tokens, a call's `Tokens`; scores float32 `(batch, heads, query blocks, key blocks)`,
and must, bool of that shape, the pairs that it insists on, or None where there can be none. What is said of key blocks that are hidden as a
whole does not matter: the selection never takes them.

A block with a bias is judged by its weighted mean, so that hidden tokens have no part in it, and by its weight, log of the mean of exp(bias):
the first-order estimate of the attention that it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import registry
from ..pool import block_mean, block_weights
from . import exact
from .tokens import Tokens

Scores = tuple[Tensor, "Tensor | None"]
Estimator = Callable[[Tokens, Mapping[str, float]], Scores]
ESTIMATORS: dict[str, Estimator] = {}


def estimator(function: Estimator) -> Estimator:
    registry.add(ESTIMATORS, "estimator", function.__name__, function)
    return function


@estimator
def pooled(tokens: Tokens, settings: Mapping[str, float]) -> Scores:
    """softmax of block means of q against block means of k: RainFusion2.0, DraftAttention, SpargeAttn."""
    return torch.softmax(_pooled_logits(tokens), -1), None


@estimator
def pooled_similarity(tokens: Tokens, settings: Mapping[str, float]) -> Scores:
    """`pooled` with SpargeAttn's guard: blocks whose tokens disagree are not judged by their mean but kept.

    Self-similarity of a block is the squared norm of its mean unit vector, in 0..1; at or below `similarity` it does not count as
    similar. A threshold of 0 or less switches the guard off.
    """
    logits = _pooled_logits(tokens)
    threshold = settings["similarity"]
    if threshold <= 0:
        return torch.softmax(logits, -1), None
    loose_q = _self_similarity(tokens.q, tokens.block, tokens.query_bias) <= threshold
    smooth = tokens.k - block_mean(tokens.k, tokens.k.shape[2], tokens.key_bias)
    loose_k = _heads_like(_self_similarity(smooth, tokens.granule, tokens.key_bias), tokens.q)[:, :, None] <= threshold
    # Columns that the guard keeps anyway take no part in the softmax of the others (SpargeAttn's order of steps).
    scores = torch.softmax(logits.masked_fill(loose_k, float("-inf")), -1)
    return scores, loose_k | loose_q[..., None]


@estimator
def random(tokens: Tokens, settings: Mapping[str, float]) -> Scores:
    """Noise, the same for every call, whatever the biases: what a selection is worth is measured against it."""
    return torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens.q.device), None


@estimator
def exact_mass(tokens: Tokens, settings: Mapping[str, float]) -> Scores:
    """The attention that each key block really gets, a mean over the query block's rows: what every cheap score stands for.

    AdaSpa (arXiv:2502.21079) looks at it once in a while; at every step it is the oracle of measurements. Costs a q.k product.
    """
    return exact.mass(tokens), None


@estimator
def tail_error(tokens: Tokens, settings: Mapping[str, float]) -> Scores:
    """What it costs to leave a key block to the pooled tail: the squared relative error |out - exact|^2 / |exact|^2 of a sample, to first order.

    Ours; the formulas are at `exact.error` and `exact.two_level`. Costs three products of q.k's size, and one pass of exponentials.
    """
    fine, coarse, energy = exact.error(tokens)
    return exact.two_level(fine, coarse, tokens.block // tokens.granule) / energy.clamp(min=torch.finfo(torch.float32).tiny)[
        :, None, None, None
    ], None


def _pooled_logits(tokens: Tokens) -> Tensor:
    """Products of block means. Smoothing k by its mean would add the same number to a whole row, which a softmax does not see."""
    q_mean = block_mean(tokens.q, tokens.block, tokens.query_bias)
    logits = q_mean @ _heads_like(block_mean(tokens.k, tokens.granule, tokens.key_bias), tokens.q).transpose(-1, -2) * tokens.scale
    if tokens.key_bias is None:
        return logits
    weights, peak = block_weights(tokens.key_bias, tokens.granule)
    return logits + (peak + block_mean(weights, tokens.granule).log()).transpose(-1, -2)


def _self_similarity(x: Tensor, block: int, bias: Tensor | None) -> Tensor:
    """`(batch, heads, blocks)`: mean cosine between the tokens of a block, which is the squared norm of their mean unit vector."""
    return block_mean(torch.nn.functional.normalize(x, dim=-1), block, bias).square().sum(-1)


def _heads_like(k: Tensor, q: Tensor) -> Tensor:
    """Repeat the kv heads of k for the query heads that share them."""
    groups = q.shape[1] // k.shape[1]
    return k if groups == 1 else k.repeat_interleave(groups, 1)
