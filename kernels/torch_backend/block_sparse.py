"""Block-sparse attention in plain torch. Blocks that a row does not read are neither copied nor multiplied.

Query blocks with the same number of key blocks are computed together: their key blocks are gathered into one contiguous batch
and handed to torch's own fused attention, in chunks small enough to stay in cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask, num_blocks

CPU_CHUNK_BYTES = 4 << 20
"""Gathered keys and values of one chunk on a CPU: they should still be in cache when they are multiplied."""

CUDA_CHUNK_BYTES = 256 << 20

GROUPS = 16
"""Row lengths are rounded up to a multiple of (longest / GROUPS), so that few groups remain however the counts vary."""


def run(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, key_bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.attention.attention`. Reads the row lengths back from the device once."""
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    block_m, block_n = block_mask.block_m, block_mask.block_n
    query_blocks, key_blocks = num_blocks(q_len, block_m), num_blocks(k_len, block_n)

    q_blocks = _blocks(q, block_m)  # (batch * heads * query blocks, block_m, head_dim)
    k_blocks, v_blocks = _blocks(k, block_n), _blocks(v, block_n)
    bias = _bias_blocks(key_bias, batch, k_len, block_n, q)

    counts = block_mask.counts.expand(batch, heads, query_blocks).reshape(-1)
    indices = block_mask.indices.expand(batch, heads, query_blocks, -1).flatten(0, 2)
    out = torch.empty_like(q_blocks)
    lse = torch.empty(q_blocks.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None

    row_batch = torch.arange(counts.shape[0], device=q.device) // (heads * query_blocks)
    row_head = torch.arange(counts.shape[0], device=q.device) // query_blocks % heads // (heads // kv_heads)
    row_offset = (row_batch * kv_heads + row_head) * key_blocks

    for width, rows, padded in _groups(counts):
        if width == 0:
            out[rows] = 0
            if lse is not None:
                lse[rows] = float("-inf")
            continue
        chunk = max(1, (CUDA_CHUNK_BYTES if q.is_cuda else CPU_CHUNK_BYTES) // (2 * width * block_n * head_dim * q.element_size()))
        for part in rows.split(chunk):
            ids = indices[part, :width].long()
            spare = torch.arange(width, device=q.device) >= counts[part, None] if padded else None
            if spare is not None:
                ids = ids.masked_fill(spare, 0)
            flat = (ids + row_offset[part, None]).flatten()
            keys = k_blocks.index_select(0, flat).view(len(part), width * block_n, head_dim)
            values = v_blocks.index_select(0, flat).view(len(part), width * block_n, head_dim)
            score_bias = None
            if bias is not None:
                score_bias = bias.index_select(0, (ids + row_batch[part, None] * key_blocks).flatten()).view(len(part), 1, -1)
            if spare is not None:
                hidden = torch.zeros(spare.shape, dtype=q.dtype, device=q.device).masked_fill_(spare, float("-inf"))
                hidden = hidden.repeat_interleave(block_n, 1)[:, None]
                score_bias = hidden if score_bias is None else score_bias + hidden
            queries = q_blocks.index_select(0, part)
            if lse is None:
                fused = F.scaled_dot_product_attention(
                    queries[:, None], keys[:, None], values[:, None], attn_mask=None if score_bias is None else score_bias[:, None], scale=scale
                )
                out[part] = fused[:, 0]
            else:
                out[part], lse[part] = _with_lse(queries, keys, values, score_bias, scale)

    out = out.view(batch, heads, query_blocks * block_m, head_dim)[:, :, :q_len]
    if key_bias is not None:
        out = out.nan_to_num(nan=0.0)  # a row whose every kept key is hidden by -inf reads nothing
    return out, None if lse is None else lse.view(batch, heads, -1)[:, :, :q_len]


def _blocks(x: Tensor, block: int) -> Tensor:
    """`(batch, heads, tokens, head_dim)` -> contiguous `(batch * heads * blocks, block, head_dim)`, the ragged end filled with zeros."""
    spare = -x.shape[2] % block
    return (F.pad(x, (0, 0, 0, spare)) if spare else x).reshape(-1, block, x.shape[3])


def _bias_blocks(key_bias: Tensor | None, batch: int, k_len: int, block_n: int, q: Tensor) -> Tensor | None:
    """`(batch * key blocks, block_n)` in q's dtype, -inf behind the last key; None where nothing is hidden or weighed."""
    spare = -k_len % block_n
    if key_bias is None and not spare:
        return None
    bias = torch.zeros((batch, k_len), dtype=q.dtype, device=q.device) if key_bias is None else key_bias.to(q.dtype)
    return F.pad(bias, (0, spare), value=float("-inf")).reshape(-1, block_n)


def _groups(counts: Tensor) -> list[tuple[int, Tensor, bool]]:
    """[(width, rows, whether some row of the group is shorter than width)], covering every row once."""
    lengths = counts.tolist()
    longest = max(lengths)
    distinct = set(lengths)
    if len(distinct) == 1:
        return [(longest, torch.arange(len(lengths), device=counts.device), False)]
    step = 1 if len(distinct) <= GROUPS else -(-longest // GROUPS)
    members: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        members.setdefault(min(-(-length // step) * step, longest), []).append(row)
    return [
        (width, torch.tensor(rows, device=counts.device), any(lengths[row] != width for row in rows)) for width, rows in sorted(members.items())
    ]


def _with_lse(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The same attention with its log-sum-exp, which torch's fused op keeps to itself."""
    scores = (queries @ keys.transpose(1, 2)).float() * scale
    if bias is not None:
        scores += bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp_()
    return weights.to(values.dtype) @ values, lse
