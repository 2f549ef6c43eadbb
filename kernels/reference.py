"""Attention in float64, straight from the formula: the oracle that tests and self-tests compare against."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_mask import BlockMask, PooledTail, num_blocks


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_mask: BlockMask | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    tail: PooledTail | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + key_bias) v with every score in memory.

    Arguments as `kernels.attention.attention`. Returns float64 `(batch, heads, q_len, head_dim)` and the natural-log sum of
    exponentials `(batch, heads, q_len)`; rows that read nothing are 0 and -inf.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    bias = q.new_zeros(q.shape[0], k.shape[2]) if key_bias is None else key_bias.double()
    if block_mask is None:
        bias = bias[:, None, None]
    else:
        read = block_mask.token_mask(q.shape[2], k.shape[2])
        if tail is not None:
            terms = tail.terms(block_mask.to_dense(num_blocks(k.shape[2], block_mask.block_n)))
            read = torch.cat([read, terms.repeat_interleave(block_mask.block_m, 2)[:, :, : q.shape[2]]], -1)
            k, v, bias = with_pooled(k, v, bias, *tail.sizes(block_mask.block_n))
        bias = bias[:, None, None].masked_fill(~read, float("-inf"))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # A common number changes no weight; taken out, biases of -3e38 leave the scores whole, which not even float64 would.
    peak = bias.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    scores = scores + (bias - peak)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.isneginf()[..., None], 0.0, (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp())
    return weights @ v, lse + peak[..., 0]


def with_pooled(k: Tensor, v: Tensor, bias: Tensor, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """float64 k, v `(batch, heads, tokens, head_dim)` and bias `(batch, tokens)`, with a pooled key behind for every block of these sizes."""
    token = torch.arange(k.shape[2])
    inside = torch.cat([token // size == torch.arange(num_blocks(len(token), size))[:, None] for size in sizes]).to(k.device)
    weights = bias[:, None].masked_fill(~inside, float("-inf"))  # (batch, blocks, tokens)
    total = weights.logsumexp(-1)
    share = (weights - total.nan_to_num(neginf=0.0)[..., None]).exp()[:, None]
    return torch.cat([k, share @ k], 2), torch.cat([v, share @ v], 2), torch.cat([bias, total], 1)
