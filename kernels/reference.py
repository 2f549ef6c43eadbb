"""Attention in float64, straight from the formula: the oracle that tests and self-tests compare against."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_mask import BlockMask


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask | None = None, key_bias: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + key_bias) v with every score in memory.

    Arguments as `kernels.attention.attention`. Returns float64 `(batch, heads, q_len, head_dim)` and the natural-log sum of
    exponentials `(batch, heads, q_len)`; rows that read nothing are 0 and -inf.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    bias = scores.new_zeros(1, 1, 1, k.shape[2]) if key_bias is None else key_bias.double()[:, None, None, :]
    if block_mask is not None:
        bias = bias.masked_fill(~block_mask.token_mask(q.shape[2], k.shape[2]), float("-inf"))
    # A common number changes no weight; taken out, biases of -3e38 leave the scores whole, which not even float64 would.
    peak = bias.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    scores = scores + (bias - peak)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.isneginf()[..., None], 0.0, (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp())
    return weights @ v, lse + peak[..., 0]
