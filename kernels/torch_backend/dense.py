"""torch's scaled_dot_product_attention behind the common signature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask, num_blocks
from .block_sparse import as_attn_mask, shifted
from .block_sparse import run as run_blocks

LSE_ROWS = 128
"""Queries whose scores are in memory at once when the lse is asked for."""


def run(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, key_bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Dense attention. torch's op does not hand out the lse, so a call that wants it runs in blocks that read every key."""
    if return_lse:
        everything = torch.zeros((1, 1, num_blocks(q.shape[2], LSE_ROWS), 1), dtype=torch.int32, device=q.device)
        mask = BlockMask(everything, torch.ones_like(everything[..., 0]), LSE_ROWS, k.shape[2], 1, trusted=True)
        return run_blocks(q, k, v, mask, key_bias, scale, True)
    grouped = q.shape[1] != k.shape[1]
    if key_bias is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped), None
    bias, _, hidden = shifted(key_bias[:, None, None])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=as_attn_mask(bias, q), scale=scale, enable_gqa=grouped)
    return out.masked_fill(hidden, 0.0), None
